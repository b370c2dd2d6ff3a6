"""The folder of an export: files of the library, a README, and the check before it gets its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError
from spar_lightning.export import onnx, open_clip, safetensors, timm, transformers
from spar_lightning.export.model_card import card
from spar_lightning.export.parity import Difference, check
from spar_lightning.export.recipe import Recipe, Recipes
from spar_lightning.files.atomic import new_folder
from spar_lightning.student import Student

LIBRARIES: Final[Mapping[str, Recipes]] = {
    "safetensors": safetensors.RECIPES,
    "open_clip": open_clip.RECIPES,
    "timm": timm.RECIPES,
    "transformers": transformers.RECIPES,
    "onnx": onnx.RECIPES,
}


def export(student: Student, library: str, folder: Path) -> list[Difference]:
    """Write a student for a library and let that library check it; returns what the check found.

    Args:
        student: On the CPU, in fp32.
        library: One of `LIBRARIES`.
        folder: Is made; nothing is left of an export that fails.

    Raises:
        UserError: The library has no place for this backbone, or the folder is taken.
        ExportError: The check failed.
    """
    backbone = student.backbone.requires_grad_(False)
    recipe = recipe_of(backbone, library)
    if folder.exists():
        raise UserError(f"--out {folder} is there already. Give a folder that does not exist yet.")
    with new_folder(folder) as unfinished:
        recipe.write(student, unfinished)
        found = check(backbone, recipe, unfinished)
        (unfinished / "README.md").write_text(card(student, library, recipe, found, unfinished), encoding="utf-8")
    return found


def recipe_of(backbone: Backbone, library: str) -> Recipe:
    """How a backbone goes to a library.

    Raises:
        UserError: It does not.
    """
    kinds = type(backbone).__mro__
    for kind in kinds:
        if recipe := LIBRARIES[library].get(kind):
            return recipe
    others = [name for name, recipes in LIBRARIES.items() if any(kind in recipes for kind in kinds)]
    raise UserError(
        f"--to {library}: that library has no place for {type(backbone).__name__}. Allowed are {', '.join(others)}."
    )
