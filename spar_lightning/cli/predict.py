"""`spar predict`: segmentation maps, overlays, scores, features and PCA plots of images, with any weights."""

import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from tqdm import tqdm

from spar_lightning.cli.backbone_arguments import split_backbone_arguments
from spar_lightning.cli.blocks import block_bar
from spar_lightning.cli.class_options import given_classes
from spar_lightning.cli.error_messages import out_of_memory
from spar_lightning.cli.parser import Parser
from spar_lightning.cli.predict_inputs import image_files
from spar_lightning.cli.predict_outputs import PredictionFolder
from spar_lightning.errors import UserError
from spar_lightning.formatting import bytes_text
from spar_lightning.image.codec import ImageError, decode_image, image_size
from spar_lightning.image.inputs import as_pixels
from spar_lightning.image.resize import at_most
from spar_lightning.image.rows import ImageRows, as_rows
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.student import Student, load_student, usable_device
from spar_lightning.visualization.overlay import LONGEST
from spar_lightning.visualization.pca import Basis, draw_pca

MOST: Final = 4 * 2**30  # bytes; limit for the scores of one image in memory, and for its features

DESCRIPTION = """Segment images of any size with a trained student or with a pretrained backbone.

Segmentation maps have the size of the image. --out receives labels/ (PNG with a palette), overlays/ (with a legend)
and classes.json; on request scores/, features/ and pca/. Images that cannot be read are listed at the end, and the exit
code is then 1.

A class is a name, or `label: name, name` for a class with several names. Settings of inference default to those of the
run. Arguments of the backbone that differ from those of the run are passed as --model.backbone.NAME VALUE."""
# They follow `spar fit --config quickstart`.
EXAMPLES = (
    'spar predict data/scenes/seed-0/scenes_192/images --weights runs/quickstart --classes "red dot; blue dot"',
    "spar predict data/scenes/seed-0/scenes_192/images/0000.png --weights runs/quickstart --pca --features",
)


# Errors of the file system that concern the results of all images, not only of one.
FOR_ALL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class NoResultError(Exception):
    """Error of one image; the other images are still processed."""


def parser() -> Parser:
    """Return the parser of the command; its inference options are the fields of `InferenceConfig`."""
    parser = Parser("spar predict", description=DESCRIPTION, default_env=False)
    parser.usage_line = "IMAGE [IMAGE ...] --weights WEIGHTS --classes CLASSES [options]"
    parser.examples = EXAMPLES
    add = parser.add_argument
    add("images", nargs="+", type=str, help="Image files, folders (with all subfolders, also linked ones) or glob "
        "patterns in quotes")  # fmt: skip
    add("--weights", required=True, type=str, help="Run folder, checkpoint, export, hf-hub:org/name, weight file "
        "together with --config, or name of a backbone such as siglip2")  # fmt: skip
    add("--classes", type=str, help="Classes to segment, such as 'cat; dog; grass, lawn', or a file of class "
        "names (.txt with one class per line, or .json)")  # fmt: skip
    add("--out", type=str, default="runs/predict", help="Folder for the results")
    add("--config", type=str, help="YAML file of the run, if the weights do not name their network")
    add("--max_side", type=int | None, help="Largest long side of the network input, in pixels: larger images are "
        "resized; segmentation maps keep the size of the image; no limit by default")  # fmt: skip
    add("--device", type=str, help="Device such as cpu, cuda or cuda:1; a GPU by default, if available")
    add("--scores", action="store_true", help="Also write the scores of all classes for each pixel (npz)")
    add("--features", action="store_true", help="Also write dense features (safetensors)")
    add("--pca", action="store_true", help="Also draw the features of single pass, teacher and student as colors, "
        "in the teacher's PCA basis")  # fmt: skip
    parser.add_class_arguments(InferenceConfig)
    return parser


def run(args: Sequence[str]) -> int:
    """Segment images; return 1 if some of them have no result."""
    own, arguments = split_backbone_arguments(args)
    options = parser()
    given = options.instantiate(options.parse_args(own))
    changed = options.parse_args(own, defaults=False)
    settings = {name: given[name] for name in InferenceConfig.__dataclass_fields__ if name in changed}
    out = Path(given.out)
    classes = given_classes(given.classes) if given.classes is not None else {}
    if not classes and (given.scores or not (given.features or given.pca)):
        raise UserError("--classes is missing. Pass the classes to segment, such as --classes 'cat; dog; grass, lawn'.")
    files, others = image_files(given.images, out)
    device = usable_device(given.device)
    student = load_student(given.weights, given.config, settings, arguments)
    student.backbone.to(device)
    segmenter = student.segmenter(classes, given.max_side)
    if given.pca and segmenter.blocks is not None:
        raise UserError("--pca compares networks on whole images. Leave out --block_size, or set it to null.")
    folder = PredictionFolder(out, classes)
    panels = _panels(student, given.max_side) if given.pca else {}
    failed: list[Exception] = []
    done = 0
    try:
        for file, name in tqdm(files.items(), "predict", unit="image", disable=None):
            try:
                _predict(file, name, segmenter, folder, panels, given)
                done += 1
            except (ImageError, NoResultError) as error:
                failed.append(error)
            except OSError as error:
                if error.errno in FOR_ALL:
                    raise
                failed.append(NoResultError(f"{file}: its results cannot be written ({error.strerror})."))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                said = f"{file} is too large for the memory of {segmenter.device}."
                failed.append(NoResultError(f"{said} Use a smaller --block_size or --max_side."))
    finally:
        code = _report(done, failed, others, out)
    return code


def _predict(
    file: Path,
    name: Path,
    segmenter: Segmenter,
    folder: PredictionFolder,
    panels: Mapping[str, Callable[[Tensor], Tensor]],
    given: Any,
) -> None:
    """Compute and write all requested results of one image."""
    image: Tensor | ImageRows
    if segmenter.blocks is None:
        image, shown, size = _read(file, given.max_side)
        blocks = 0
    else:
        original = as_rows(file)
        image, shown, size = segmenter.rows(original), original.at_most(LONGEST), original.size
        h, w = segmenter.grid(size)
        patch, passes = segmenter.backbone.patch_size, bool(folder.labels) + given.features
        blocks = passes * segmenter.blocks.count(h * patch, w * patch)
    height, width = size
    with block_bar(segmenter, blocks, name.name):
        if given.scores:
            needed = 4 * (len(folder.labels) + len(segmenter.classifier.owner)) * height * width  # of classes and names
            _check_memory(file, f"scores of {len(folder.labels):,} classes on {height} x {width} pixels", needed)
            labels, scores = segmenter(image, True, size=size, dtype=folder.dtype)
            folder.write_labels(name, shown, labels)
            folder.write_scores(name, scores)
        elif folder.labels:
            folder.write_labels(name, shown, segmenter(image, size=size, dtype=folder.dtype))
        if given.features:
            h, w = segmenter.grid(size)
            _check_memory(file, f"features of {h} x {w} patches", 4 * h * w * segmenter.backbone.embed_dim)
            about = {"image": str(file), "height": str(height), "width": str(width), "weights": given.weights}
            folder.write_features(name, segmenter.features(image), about)
    if given.pca:
        assert isinstance(image, Tensor)
        features = {title: make(image) for title, make in panels.items()}
        picture = at_most(shown, LONGEST).permute(1, 2, 0).numpy()
        draw_pca(picture, features, Basis.of(features[TEACHER]), folder.path("pca", name, ".png"))


def _check_memory(file: Path, what: str, needed: int) -> None:
    """Raise NoResultError if results that are in memory as a whole take too much of it."""
    if needed > MOST:
        raise NoResultError(
            f"{file} has no results: {what} take up to {bytes_text(needed)}, more than {bytes_text(MOST)}. Use a "
            "smaller --max_side, fewer classes, or leave out --scores and --features."
        )


def _read(file: Path, max_side: int | None) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return the image for the network, the image for pictures, and the size of the original.

    A large image that the network sees at a low resolution is decoded twice, so that it is never in memory as a whole.
    """
    pixels = as_pixels(file, max_side)
    size = (pixels.shape[-2], pixels.shape[-1])
    if max(size) != max_side:
        return pixels, pixels, size
    with file.open("rb") as content:
        size = image_size(content, upright=True)
        shown = pixels if max_side >= min(LONGEST, max(size)) else decode_image(content, True, max_side=LONGEST)
    return pixels, shown, size


TEACHER: Final = "teacher"


def _panels(student: Student, max_side: int | None) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Return the feature function of each panel: the backbone before training and, if trained, the student."""
    before = student.base()
    panels = {
        "single pass": student.segmenter({}, max_side, "single", before).features,
        TEACHER: student.segmenter({}, max_side, "sliding", before).features,
    }
    if student.weights is not None:
        panels["student"] = student.segmenter({}, max_side, "single").features
    return panels


def _report(done: int, failed: Sequence[Exception], others: Sequence[Path], out: Path) -> int:
    """Print a summary and return the exit code."""
    print(f"{done} {'image' if done == 1 else 'images'} done, results in {out}")
    if others:
        print(f"{len(others)} other files without an image suffix were skipped, such as {others[0]}")
    if failed:
        print(f"{len(failed)} without a result:", *(f"  {error}" for error in failed), sep="\n", file=sys.stderr)
    return 1 if failed else 0
