"""Tolerances that follow from arithmetic, not from one machine: how far fp32 rounding carries through a network."""

import math

import torch
from torch import Tensor

SAFETY = 16  # kernels of other processors add in other orders: largest of many elements, not their deviation


def rounding(expected: Tensor, depth: int, width: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the absolute tolerance for two implementations of the same network or product.

    Errors of `depth` sums over `width` products are independent and add as their squares do.

    Args:
        expected: Result of one of them; its largest magnitude scales the tolerance.
        depth: Layers (blocks of a transformer count once), 1 for a single matrix product.
        width: Terms of a sum: channels, or the longest inner dimension.
        dtype: Type of the arithmetic.
    """
    return SAFETY * torch.finfo(dtype).eps * math.sqrt(depth * width) * float(expected.detach().abs().max())


def assert_rounded(actual: Tensor, expected: Tensor, depth: int, width: int, msg: str | None = None) -> None:
    """Raise AssertionError unless two results differ by no more than rounding explains."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(expected, depth, width), msg=msg)
