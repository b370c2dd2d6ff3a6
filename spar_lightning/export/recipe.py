"""Recipe: how the weights of a family become files of a library, and what its user does with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.student import Student

TOLERANCE = 1e-4  # largest difference of the check, fp32


@dataclass(frozen=True)
class Recipe:
    """One library, one family.

    Attributes:
        write: Puts the files of a student into an empty folder.
        load: Python that makes `model` from the folder in which it runs, without a network.
        any_size: Python that defines `dense(model, images)`, features (B, h, w, d) of images whose sides the patch
            divides, and `tokens(model, images)`, what the trunk gives (B, prefix+N, D).
        sizes: What the library itself does with images of other sizes.
        tokens: Our own trunk tokens, from a backbone and images; None where the format has none.
        pixels: Whether images are pixels in [0, 1], which the model normalises itself.
        tolerance: Of the check.
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
    """What gives the tokens behind the final norm, a submodule of the backbone by its name."""
    return lambda backbone, images: backbone.get_submodule(norm)(backbone.trunk_tokens(images))


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """A tensor's name with parts of it replaced, one after the other."""
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name
