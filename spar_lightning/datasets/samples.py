"""Items that the data loaders return, one per image; a batch is a list of items.

Images stay uint8 until they are on the network's device, where the network applies its own normalization.
"""

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """Training image (3, H, W) uint8 and its target features (h, w, d), or None without a cache."""

    key: str
    image: Tensor
    features: Tensor | None


class ActivationSample(NamedTuple):
    """Training image as activations, with its target features (h, w, d).

    `tokens` (P + N, D) enter the first trainable block: P class and register tokens, then N patches.
    """

    key: str
    tokens: Tensor
    features: Tensor


class LabelledImage(NamedTuple):
    """Validation image (3, H, W) uint8 and its labels (H, W) int16; `IGNORED` marks pixels that are not evaluated."""

    key: str
    image: Tensor
    labels: Tensor


IGNORED = -1  # not 255, which may be a class index
