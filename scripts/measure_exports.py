"""Measure how far the outputs of exports differ from those of the student, and write docs/exports.md.

A small student of each family is trained for two steps and exported to every library that supports it. Each library
runs in a separate process on images of five sizes.

    python scripts/measure_exports.py                      # a quarter of an hour on two cores
    python scripts/measure_exports.py --out /tmp/exports.md
"""

import argparse
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Final

from PIL import Image

from spar_lightning.cli import main as spar
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.errors import UserError
from spar_lightning.export import LIBRARIES, export
from spar_lightning.export.exporter import recipe_of
from spar_lightning.formatting import markdown
from spar_lightning.student import load_student

ROOT: Final = Path(__file__).parents[1]
FAMILIES: Final = {
    "SigLIP2": {"model": "ViT-B-32-SigLIP2-256", "pretrained": "null"},
    "OpenCLIP": {"model": "ViT-S-32", "pretrained": "null"},
    "DINOv3Text": {"model": "vit_tiny_patch16_dinov3_qkvb", "window": "128"},
    "NaFlex": {"pretrained": "null"},
    "Tiny": {},
}
PACKAGES: Final = ("torch", "open_clip_torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime")

PAGE: Final = """\
# Exports, measured

Written by `python scripts/measure_exports.py`: {families}, each with random weights (`Tiny` with its own)
and trained for two steps, then exported with `spar export`. The library loads the folder in a separate process with the
code of the README in that folder. It gets images of five sizes: native, smaller, larger, elongated, and 2 x 3 patches.
The table lists the largest absolute difference from the student in fp32.

{packages}; {machine}.

{table}

An export is rejected if the difference is above 1e-4 (ONNX: 1e-3). Not measured: real weights, larger models, GPUs.
"""


def train(family: str, arguments: dict[str, str], folder: Path) -> Path:
    """Train for two steps on two images and return the run folder."""
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    for i in range(2):
        Image.fromarray(render(seed=9, index=i, height=160, width=224).image).save(photos / f"{i}.png")
    run = folder / family
    settings = [word for name, value in arguments.items() for word in (f"--model.backbone.{name}", value)]
    code = spar([
        "fit", "--model.backbone", family, *settings, "--model.stride", "96" if family != "Tiny" else "32",
        "--model.lr", "1e-3", "--data", "SA1B", "--data.shards", str(photos), "--data.augmentation.scale", "[224,160]",
        "--data.augmentation.min_side", "128", "--data.augmentation.multiple", "32",
        "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--run_dir", str(run),
    ])  # fmt: skip
    if code:
        sys.exit(f"Training the student of {family} failed.")
    return run


def main() -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "exports.md")
    given = parser.parse_args()
    rows = [["student", "library", "output", "largest difference", "at"]]
    with tempfile.TemporaryDirectory() as place:
        for family, arguments in FAMILIES.items():
            run = train(family, arguments, Path(place))
            for library in LIBRARIES:
                student = load_student(run)
                try:
                    recipe_of(student.backbone, library)
                except UserError:  # the library does not support this family
                    continue
                found = export(student, library, Path(place) / f"{family}-{library}")
                for output in sorted({each.output for each in found}):
                    worst = max((each for each in found if each.output == output), key=lambda each: each.largest)
                    size = f"{worst.size[0]} x {worst.size[1]}" if worst.largest else "all sizes"
                    rows.append([family, library, output, f"{worst.largest:.1e}", size])
                    print(*rows[-1], flush=True)
    page = PAGE.format(
        families=", ".join(f"{name} ({values['model']})" if "model" in values else name
                           for name, values in FAMILIES.items()),
        packages=", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
        machine=f"{platform.machine()}, {os.cpu_count()} CPU cores, no GPU used",
        table=markdown(rows),
    )  # fmt: skip
    given.out.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
