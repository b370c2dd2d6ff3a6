"""Time of the network alone, as in Figures 1 and 3 of the paper: forward passes of one image.

Loading, text encoding, stitching of windows and upsampling are excluded. After the warm-up passes, each pass is timed
between two device synchronizations; median and quartiles are reported.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from spar_lightning.segmentation.segmenter import Segmenter

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Timing of the forward passes of one image.

    Attributes:
        ms: Median time in milliseconds.
        quartiles: First and third quartile in milliseconds.
        size: Height and width of the resized image that the network receives, in pixels.
        patches: Number of patches in that image.
        windows: Number of windows; 1 for single-pass inference.
        memory: Peak memory in MiB. CUDA: memory allocated by torch, including the weights. Other devices: memory of
            the process, or None if the system does not report it.
    """

    ms: float
    quartiles: tuple[float, float]
    size: tuple[int, int]
    patches: int
    windows: int
    memory: float | None

    @classmethod
    def of(
        cls,
        segmenter: Segmenter,
        image: Tensor,
        precision: Callable[[], AbstractContextManager[Any]],
        warm_ups: int,
        repeats: int,
    ) -> "Timing":
        """Time the forward passes of an image.

        Args:
            segmenter: Segmenter with its backbone on the device of `image`.
            image: Image (3, H, W) uint8 at its original size.
            precision: Function that returns the precision context of the network, such as autocast.
            warm_ups: Number of initial passes that do not count.
            repeats: Number of passes that count, at least 1.
        """
        pixels = segmenter.pixels(image)
        peak = Peak(image.device)
        times = []
        for _ in range(warm_ups + repeats):
            with precision():
                times.append(timed(lambda: segmenter.run_network(pixels), image.device)[1])
        counted = times[warm_ups:]
        first, third = statistics.quantiles(counted, n=4, method="inclusive")[::2] if repeats > 1 else counted * 2
        height, width = pixels.shape[-2:]
        count = 1 if segmenter.windows is None else segmenter.windows.count(height, width)
        patches = height * width // segmenter.backbone.patch_size**2
        return cls(statistics.median(counted), (first, third), (height, width), patches, count, peak.mebibytes())


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return the result of a call, and its time in milliseconds until the device has finished."""
    start = now(device)
    result = run()
    return result, 1000 * (now(device) - start)


def now(device: torch.device) -> float:
    """Return the current time in seconds, after the device has finished all pending work."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


class Peak:
    """Peak memory since the creation of the object.

    Args:
        device: CUDA: the memory that torch allocates on this device is measured; otherwise that of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM, the peak of the process
        except OSError:
            self._known = False

    def mebibytes(self) -> float | None:
        """Return the peak memory in MiB, or None if the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        if not self._known:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
