"""One interface check, and what the checks share: random images and the comparison of features."""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone

Factory = Callable[[], Backbone]
TOLERANCE: Final = 2e-4  # fp32, relative to the standard deviation of the features


@dataclass(frozen=True)
class Check:
    """Named interface check; calling it raises AssertionError if the backbone fails the check.

    A check that does not apply, for example because the weights of a text encoder are missing, raises
    unittest.SkipTest.

    Attributes:
        run: Function of the check.
        method: Method of the backbone that the check tests.
        factory: Function that returns a new backbone.
    """

    run: Callable[[Factory], None]
    method: str
    factory: Factory

    @property
    def name(self) -> str:
        """Name of the check."""
        return self.run.__name__

    def __call__(self) -> None:
        """Run the check; raise AssertionError if it fails."""
        self.run(self.factory)

    def __str__(self) -> str:
        return self.name

    def place(self, error: BaseException) -> str | None:
        """Return file and line of the author's code that an error of this check is about, or None.

        This is the innermost line of the traceback in a file of the backbone's class, or else the tested method, or the
        class.
        """
        classes = [cls for cls in type(self.factory()).__mro__ if issubclass(cls, Backbone) and cls is not Backbone]
        classes = [cls for cls in classes if cls.__module__.partition(".")[0] != "spar_lightning"] or classes
        files = {_file(cls) for cls in classes}
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if Path(frame.filename) in files:
                return f"{frame.filename}:{frame.lineno}"
            if Path(frame.filename).parent == Path(__file__).parent:
                break  # further out is the caller of the check
        for cls in classes:
            if (method := cls.__dict__.get(self.method)) is not None and inspect.isfunction(inspect.unwrap(method)):
                return _place(inspect.unwrap(method))
        return _place(classes[0])


def _file(cls: type) -> Path | None:
    try:
        return Path(inspect.getfile(cls))
    except (OSError, TypeError):  # defined in an interactive session
        return None


def _place(code: Any) -> str | None:
    try:
        return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
    except (OSError, TypeError):
        return None


def random_images(backbone: Backbone, h: int, w: int, batch: int = 1) -> Tensor:
    """Return smooth random images (batch, 3, H, W) of h x w patches, normalized."""
    generator = torch.Generator().manual_seed(100 * h + w)
    coarse = torch.randn(batch, 3, 2 * h, 2 * w, generator=generator)
    size = (h * backbone.patch_size, w * backbone.patch_size)
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def random_tokens(backbone: Backbone, h: int, w: int) -> Tensor:
    """Return the tokens (1, prefix+N, D) of a random image of h x w patches."""
    return backbone.embed(random_images(backbone, h, w))


def assert_same(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError if two tensors differ by more than `tolerance` standard deviations of the second one."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    worst = ((actual - expected).abs().max() / expected.std().clamp(min=1e-6)).item()
    assert worst <= tolerance, f"{what}: differs by {worst:.1e} standard deviations, allowed: {tolerance:.0e}"
