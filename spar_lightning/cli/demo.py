"""`spar demo`: a local page that segments images with any words."""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from jsonargparse import ArgumentParser
from PIL import Image

from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.cli.parser import Parser
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.folder_reader import images_below
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.demo.limits import SHOWN
from spar_lightning.errors import UserError
from spar_lightning.feature_index import FeatureIndex
from spar_lightning.image.inputs import as_pixels
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.student import load_student, usable_device

DESCRIPTION = """Serve a page on this machine: drop an image, type class names, and compare single pass, windowed
attention, sliding window and student, with their times.

Without options, the page shows the bundled Tiny backbone on synthetic images. It needs the extra packages of
`pip install -e ".[demo]"`. The page sends nothing to other hosts."""
EXAMPLES = ("spar demo", "spar demo --weights runs/quickstart --port 7860")
CLASSES: Final = "red dot; blue dot; background: plain, grain, waves, checks"
MOST_EXAMPLES: Final = 8


def parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("spar demo", description=DESCRIPTION, default_env=False)
    parser.usage_line = "[--weights WEIGHTS] [options]"
    parser.examples = EXAMPLES
    add = parser.add_argument
    add("--weights", type=str, default="tiny", help="Run folder, checkpoint, export, hf-hub:org/name, weight file "
        "together with --config, or name of a backbone such as siglip2")  # fmt: skip
    add("--config", type=str, help="YAML file of the run, if the weights do not name their network")
    add("--classes", type=str, default=CLASSES, help="Class names at the start")
    add("--images", type=str, help="Folder of example images; by default those of the run's last validation set, or "
        "synthetic ones")  # fmt: skip
    add("--index", type=str, help="Folder of spar index: adds a tab that searches its images")
    add("--host", type=str, default="127.0.0.1", help="Address to listen on; 0.0.0.0 serves other machines, too")
    add("--port", type=int | None, help="Port; a free one from 7860 on by default")
    add("--device", type=str, help="Device such as cpu, cuda or cuda:1; a GPU by default, if available")
    parser.add_class_arguments(InferenceConfig, skip=set(InferenceConfig.__dataclass_fields__) - {"stride", "blend"})
    return parser


def run(args: Sequence[str]) -> int:
    """Serve the page until the command is stopped."""
    if find_spec("gradio") is None:
        raise UserError('spar demo needs gradio, which is not installed. Run pip install "spar-lightning[demo]".')
    from spar_lightning.demo.page import build, serve
    from spar_lightning.demo.side_by_side import SideBySide
    from spar_lightning.demo.stored import StoredImages

    own, arguments = split_backbone_arguments(args)
    options = parser()
    given = options.instantiate(options.parse_args(own))
    changed = options.parse_args(own, defaults=False)
    settings = {name: given[name] for name in ("stride", "blend") if name in changed}
    student = load_student(given.weights, given.config, settings, arguments)
    student.backbone.to(usable_device(given.device))
    side_by_side = SideBySide(student)
    stored = None if given.index is None else StoredImages(FeatureIndex(given.index))
    # Errors of the removal are ignored: the server may still be writing an upload.
    with tempfile.TemporaryDirectory(prefix="spar-demo-", ignore_cleanup_errors=True) as place:
        os.environ["GRADIO_TEMP_DIR"] = place
        examples = _chosen(_below(given.images) or _of_run(student.run), Path(place)) or _rendered(Path(place))
        page = build(side_by_side, examples, given.classes, stored, Path(place))
        try:
            print(f"{serve(page, given.host, given.port)} (stop with Ctrl-C)", flush=True)
            page.block_thread()
        finally:
            page.close()
            time.sleep(0.2)  # uploads that are being written end
    return 0


def _rendered(folder: Path) -> list[Path]:
    """Write synthetic images and return their paths."""
    paths = [folder / f"scene {i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(render(seed=1, index=i, height=192, width=192).image).save(path)
    return paths


def _below(folder: str | None) -> list[Path]:
    """Return the images of the folder given by --images."""
    if folder is None:
        return []
    names = images_below(Path(folder))
    if not names:
        raise UserError(f"--images {folder} contains no images.")
    return [Path(folder, name) for name in names]


def _of_run(run: Mapping[str, Any]) -> list[Path]:
    """Return the images of the last validation set of a run; none if they are not on this machine."""
    options = ArgumentParser(exit_on_error=False)
    options.add_subclass_arguments(SA1B, "data")
    try:
        *_, benchmark = options.instantiate_classes(options.parse_object({"data": run["data"]})).data.benchmarks
        benchmark.open()
    except Exception:  # no run, another data module, no validation set, moved files: there are other examples
        return []
    return list(benchmark.paths)


def _chosen(images: Sequence[Path], place: Path) -> list[Path]:
    """Copy evenly spread images as small pictures to `place`, and return their paths."""
    paths: list[Path] = []
    for path in images[:: max(1, len(images) // MOST_EXAMPLES)][:MOST_EXAMPLES]:
        pixels = as_pixels(path, SHOWN)
        paths.append(place / f"{len(paths)} {path.stem}.png")
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(paths[-1])
    return paths
