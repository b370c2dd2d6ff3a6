"""Interface of refinements: training-free improvements of patch-text similarities for any backbone."""

from abc import ABC, abstractmethod
from typing import Any, Final

from torch import Tensor

BAND: Final = 2**22  # maximum number of values in one step of a loop over rows (16 MiB in fp32)


class Refinement(ABC):
    """Base class of refinements, which map similarities on the patch grid to better scores on the same grid.

    Configurations can name an imported subclass by its class name or class path, like losses.
    """

    @abstractmethod
    def __call__(self, features: Tensor, similarities: Tensor, patch_size: int) -> Tensor:
        """Return refined scores (Q, h, w), in fp32 or higher precision.

        Args:
            features: Dense features of the patches (h, w, d).
            similarities: Cosine similarities of patches and names (Q, h, w).
            patch_size: Patch size in pixels.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the name and settings that determine the scores, as plain data for the evaluation protocol."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.identity().items() if key != "name")
        return f"{type(self).__name__}({settings})"
