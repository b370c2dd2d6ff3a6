"""Export of students for this package: one safetensors file whose metadata records the network.

config.json is for readers and for the Hugging Face Hub, which counts its downloads. It is not read.
"""

import json
from pathlib import Path
from typing import Final

from safetensors.torch import save_file

from spar_lightning import __version__
from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.checkpoints import STUDENT
from spar_lightning.backbones.registry import class_path, package_of
from spar_lightning.export.recipe import Recipe, Recipes
from spar_lightning.header import HEADER, PACKAGE
from spar_lightning.student import Student


def write(student: Student, folder: Path) -> None:
    """Write the vision weights under the names of their original library."""
    tensors = {name: t.contiguous() for name, t in student.backbone.vision_state_dict().items()}
    metadata = {"format": "pt", HEADER: json.dumps(student.block)}
    if package := package_of(type(student.backbone)):
        metadata[PACKAGE] = package
    save_file(tensors, folder / STUDENT, metadata)
    config = {"library_name": "spar_lightning", "version": __version__, "backbone": class_path(type(student.backbone))}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


LOAD: Final = """
import spar_lightning as spar

model = spar.load(".").backbone
# Segment an image: labels = spar.load(".", classes=["cat", "dog"])("photo.jpg")
"""

ANY_SIZE: Final = """
def tokens(model, images):
    return model.trunk_tokens(images)


def dense(model, images):
    return model(images)
"""

SIZES: Final = "A segmenter from `spar_lightning.load` accepts images of any size. `model` itself does not."

RECIPES: Final[Recipes] = {Backbone: Recipe(write, LOAD, ANY_SIZE, SIZES, Backbone.trunk_tokens)}  # type: ignore[type-abstract]
