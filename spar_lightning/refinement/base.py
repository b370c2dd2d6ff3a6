"""Refinement: what may follow the patch-text similarities, without training and without knowing a backbone."""

from abc import ABC, abstractmethod
from typing import Any, Final

from torch import Tensor

BAND: Final = 2**22  # values that one step of a loop over rows holds (16 MiB in fp32)


class Refinement(ABC):
    """Maps similarities on the patch grid to better scores on the same grid.

    A subclass that is imported can be named in configurations by its class name or class path, like losses.
    """

    @abstractmethod
    def __call__(self, features: Tensor, similarities: Tensor, patch_size: int) -> Tensor:
        """Return refined scores (Q, h, w), at least fp32.

        Args:
            features: Dense features of the patches (h, w, d).
            similarities: Cosine similarities of patches and names (Q, h, w).
            patch_size: Side of a patch in pixels.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what the scores depend on, as plain data; it is part of every evaluation's protocol."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.identity().items() if key != "name")
        return f"{type(self).__name__}({settings})"
