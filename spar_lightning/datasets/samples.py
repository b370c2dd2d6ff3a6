"""What the loaders hand over, one image at a time; a batch is a list of these.

Images stay uint8 until they are on the device of the network, which knows its own normalisation.
"""

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """One training image (3, H, W) uint8 and its target (h, w, d); without a cache the target is None."""

    key: str
    image: Tensor
    features: Tensor | None


class ActivationSample(NamedTuple):
    """One training image as the tokens (prefix+N, D) that enter the first trainable block, and its target (h, w, d)."""

    key: str
    tokens: Tensor
    features: Tensor


class LabelledImage(NamedTuple):
    """One validation image (3, H, W) uint8 and its labels (H, W) int16, `IGNORED` where no class counts."""

    key: str
    image: Tensor
    labels: Tensor


IGNORED = -1  # not 255, which may be a class
