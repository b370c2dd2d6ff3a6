"""Open-vocabulary segmentation with vision transformers at any resolution (SPAR, arXiv 2604.02252).

`load` creates a segmenter from a run, a weight file or the name of a backbone. It is imported on first use, so
that importing the package is fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spar_lightning.student import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from spar_lightning.student import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
