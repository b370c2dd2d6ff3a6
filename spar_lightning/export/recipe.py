"""Recipes: how the weights of a backbone family are written for a library, and the Python code that uses them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.student import Student

TOLERANCE = 1e-4  # largest difference that the check allows, in standard deviations of the output, fp32


@dataclass(frozen=True)
class Recipe:
    """Export of one family of backbones to one library.

    Attributes:
        write: Function that writes the files of a student to an empty folder.
        load: Python code that creates `model` from the current directory, offline.
        any_size: Python code that defines `dense(model, images)`, which returns features (B, h, w, d), and
            `tokens(model, images)`, which returns the tokens of the trunk (B, P+N, D) with P class and register
            tokens. The sides of images must be multiples of the patch size.
        sizes: Text for the README: how the library itself handles images of other sizes.
        tokens: Function that computes the same tokens with a backbone of this package; None if the export does not
            return tokens.
        pixels: True if the model takes pixels in [0, 1] and normalizes them itself.
        tolerance: Largest difference that the check allows, in standard deviations of the student's output.
    """

    write: Callable[[Student, Path], None]
    load: str
    any_size: str
    sizes: str
    tokens: Callable[[Backbone, Tensor], Tensor] | None
    pixels: bool = False
    tolerance: float = TOLERANCE


Recipes = Mapping[type[Backbone], Recipe]


def normed(norm: str) -> Callable[[Backbone, Tensor], Tensor]:
    """Return a function that computes the tokens after the final norm.

    Args:
        norm: Name of the final norm among the submodules of the backbone.
    """
    return lambda backbone, images: backbone.get_submodule(norm)(backbone.trunk_tokens(images))


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """Return the name of a tensor with each key of `parts` replaced by its value, in order."""
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name
