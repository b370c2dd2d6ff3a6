"""Tests of the peak rate: bf16 is selected only if it is faster than fp32."""

from typing import Any

import pytest
import torch

from spar_lightning.speed import peak


@pytest.mark.parametrize(("bf16", "expected"), [(0.5, True), (4.6, False)])
def test_emulated_bf16_is_not_native(bf16: float, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 4.6 times as slow as fp32 was measured on a CPU that emulates it, although mkldnn reports support."""

    def seconds(device: torch.device, dtype: torch.dtype, *_: Any) -> float:
        return {torch.float32: 1.0, torch.bfloat16: bf16}[dtype]

    monkeypatch.setattr(peak, "_seconds", seconds)
    assert peak.native_bf16(torch.device("cpu")) == expected


def test_the_fastest_product_counts() -> None:
    assert peak.peak_rate(torch.device("cpu"), torch.float32, 0.0) > 0
