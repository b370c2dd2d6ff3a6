"""Tolerances derived from floating-point rounding in a network, instead of measurements on one machine."""

import math

import torch
from torch import Tensor

SAFETY = 16  # for the maximum over many elements, and for kernels with a different order of summation


def rounding(expected: Tensor, depth: int, width: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the absolute tolerance for comparing two implementations of the same network or matrix product.

    The rounding errors of `depth` sums over `width` products are assumed independent, so that their squares add up.

    Args:
        expected: Result of one implementation; its largest magnitude scales the tolerance.
        depth: Number of layers (a transformer block counts as one); 1 for a single matrix product.
        width: Number of terms of a sum: channels, or the longest inner dimension.
        dtype: Data type of the computation.
    """
    return SAFETY * torch.finfo(dtype).eps * math.sqrt(depth * width) * float(expected.detach().abs().max())


def assert_rounded(actual: Tensor, expected: Tensor, depth: int, width: int, msg: str | None = None) -> None:
    """Raise AssertionError if two results differ by more than the tolerance of `rounding`."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(expected, depth, width), msg=msg)
