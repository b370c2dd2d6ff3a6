"""Peak rate of a device, measured with a large matrix product. Reports give rates as fractions of it."""

import time

import torch

from spar_lightning.evaluation.timing import timed


def native_bf16(device: torch.device) -> bool:
    """Return whether bf16 matrix products run in hardware; emulated bf16 is several times slower than fp32.

    On a CPU, both are measured, because libraries also report emulated bf16 as supported (0.05 against 0.25 TFLOP/s on
    an Intel CPU with AVX-512 but without AVX512-BF16).
    """
    if device.type == "cpu":
        return _seconds(device, torch.bfloat16, 1024, 0.2) < _seconds(device, torch.float32, 1024, 0.2)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def peak_rate(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Return the floating point operations per second of the fastest large matrix product within `seconds`."""
    side = 2048 if device.type == "cpu" else 8192
    return 2 * side**3 / _seconds(device, dtype, side, seconds)


def _seconds(device: torch.device, dtype: torch.dtype, side: int, seconds: float) -> float:
    """Return the time of the fastest product of two matrices (side, side) that was run within `seconds`."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b  # warm-up: the first product selects kernels
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, timed(lambda: a @ b, device)[1] / 1000)
    return best
