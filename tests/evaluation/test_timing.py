"""Tests of timing: counted passes, statistics and peak memory."""

import contextlib
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.datasets.scene_renderer import CLASSES
from spar_lightning.evaluation import timing as module
from spar_lightning.evaluation.timing import Timing
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter


def test_warm_ups_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 0.0, 8.0, *(t for ms in (5, 1, 3, 2, 4) for t in (0.0, ms / 1000))])
    monkeypatch.setattr(module, "now", lambda device: next(clock))
    segmenter = Segmenter(Tiny(), CLASSES, InferenceConfig("sliding", 16))
    passes = []
    monkeypatch.setattr(segmenter, "run_network", lambda pixels: passes.append(pixels.shape))
    image = torch.randint(0, 256, (3, 97, 130), dtype=torch.uint8)
    found = Timing.of(segmenter, image, contextlib.nullcontext, warm_ups=2, repeats=5)
    assert passes == [(3, 96, 128)] * 7
    assert found.ms == pytest.approx(3) and found.quartiles == pytest.approx((2, 4))
    assert (found.size, found.patches, found.windows) == ((96, 128), 192, 15)
    with pytest.raises(StopIteration):
        next(clock)


def test_a_single_repeat_has_no_spread() -> None:
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    found = Timing.of(Segmenter(Tiny(), CLASSES), image, contextlib.nullcontext, 0, 1)
    assert found.quartiles == (found.ms, found.ms) and found.ms > 0 and found.windows == 1


def fill(mebibytes: int) -> None:
    """Allocate new memory with mmap and release it; malloc could reuse memory of the process."""
    if mebibytes:
        np.frombuffer(mmap.mmap(-1, mebibytes * 2**20), np.uint8).fill(1)


def test_peak_memory_is_that_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that memory held during a pass is measured, and memory released before it is not."""
    segmenter = Segmenter(Tiny(), CLASSES)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    fill(512)
    peaks = []
    for mebibytes in (0, 256, 0):
        monkeypatch.setattr(segmenter, "run_network", lambda pixels, n=mebibytes: fill(n))
        peaks.append(Timing.of(segmenter, image, contextlib.nullcontext, 0, 1).memory)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the system cannot reset the peak of a process
        assert peaks == [None] * 3
    else:
        before, during, after = (peak or 0 for peak in peaks)
        assert during - (before + after) / 2 == pytest.approx(256, rel=0.1)


def test_peak_memory_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert Timing.of(Segmenter(Tiny(), CLASSES), image, contextlib.nullcontext, 0, 1).memory is None
