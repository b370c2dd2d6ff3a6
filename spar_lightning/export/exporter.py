"""Folder of an export: the files of the library and a README. It gets its name only after the check has passed."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.registry import plugins
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

WINDOWED: Final = ("safetensors", "onnx")  # exports that keep windowed attention


def export(student: Student, library: str, folder: Path) -> list[Difference]:
    """Export a student to a library and check the result with that library.

    Args:
        student: Student on the CPU, in fp32.
        library: Key of `LIBRARIES`.
        folder: Output folder, which must not exist yet. It is removed if the export fails.

    Returns:
        Largest difference from the student for each output at each of five image sizes.

    Raises:
        UserError: The library does not support this backbone or its attention, or the folder already exists or cannot
            be written.
        ExportError: The check failed.
    """
    backbone = student.backbone.requires_grad_(False)
    recipe = recipe_of(backbone, library)
    try:
        if os.path.lexists(folder):
            raise UserError(f"--out {folder} already exists. Pass a folder that does not exist yet.")
        with new_folder(folder) as unfinished:
            recipe.write(student, unfinished)
            found = check(backbone, recipe, unfinished)
            (unfinished / "README.md").write_text(card(student, library, recipe, found, unfinished), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"--out {folder} cannot be written ({reason}). Nothing was exported. Free some space, or pass a folder on "
            "another disk."
        ) from error
    return found


def recipe_of(backbone: Backbone, library: str) -> Recipe:
    """Return the recipe that exports a backbone to a library.

    Raises:
        UserError: The library does not support this backbone or its attention.
    """
    if backbone.windowed is not None and library not in WINDOWED:
        raise UserError(
            f"--to {library}: this student uses windowed attention, which {library} does not have. Its features would "
            f"be different. Allowed libraries: {', '.join(WINDOWED)}. For others, train with model.attention: full."
        )
    kinds = type(backbone).__mro__
    for kind in kinds:
        if recipe := LIBRARIES[library].get(kind):
            return recipe if library != "safetensors" else _with_import(recipe, type(backbone))
    others = [name for name, recipes in LIBRARIES.items() if any(kind in recipes for kind in kinds)]
    raise UserError(
        f"--to {library} does not support {type(backbone).__name__}. Allowed libraries: {', '.join(others)}."
    )


def _with_import(recipe: Recipe, kind: type[Backbone]) -> Recipe:
    """Return a recipe that first imports the class of the backbone, if it is neither built in nor of a plugin."""
    if kind.__module__.startswith("spar_lightning.") or kind in [plugin.backbone for plugin in plugins()]:
        return recipe
    line = f"\nimport {kind.__module__}  # defines {kind.__name__}, which spar.load does not import on its own"
    return replace(recipe, load=line + recipe.load)
