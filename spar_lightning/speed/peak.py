"""What the device can do: the rate of a large matrix product, which every share in a report refers to."""

import time

import torch

from spar_lightning.evaluation.timing import now


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; without that bf16 is slower than fp32."""
    if device.type == "cpu":
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def peak_rate(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Floating point operations per second of a large matrix product: the best of as many as fit into the time."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = now(device)
        a @ b
        best = min(best, now(device) - start)
    return 2 * side**3 / best
