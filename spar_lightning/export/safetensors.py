"""Students for this package: one safetensors file, in whose header stands what network it is of."""

import json
from pathlib import Path
from typing import Final

from safetensors.torch import save_file

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.checkpoints import STUDENT
from spar_lightning.export.recipe import Recipe, Recipes
from spar_lightning.student import HEADER, Student


def write(student: Student, folder: Path) -> None:
    """The vision weights, in the names of the library that they come from."""
    tensors = {name: t.contiguous() for name, t in student.backbone.vision_state_dict().items()}
    save_file(tensors, folder / STUDENT, {"format": "pt", HEADER: json.dumps(student.block)})


LOAD: Final = """
import spar_lightning as spar

model = spar.load(".").backbone  # with classes=["cat", "dog"] a segmenter: labels = spar.load(".", [..])("photo.jpg")
"""

ANY_SIZE: Final = """
def tokens(model, images):
    return model.trunk_tokens(images)


def dense(model, images):
    return model(images)
"""

SIZES: Final = "spar_lightning takes images of any size; the sides of what its networks see are multiples of the patch."

RECIPES: Final[Recipes] = {Backbone: Recipe(write, LOAD, ANY_SIZE, SIZES, Backbone.trunk_tokens)}  # type: ignore[type-abstract]
