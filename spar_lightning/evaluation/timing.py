"""Time of the network alone, as the paper's Figures 1 and 3 give it: forward passes of one image and nothing else.

No loading, no text, no stitching, no upsampling. Warm-ups first, then several passes, each between two waits
for the device; median and quartiles.
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
    """Forward passes of one image.

    Attributes:
        ms: Median.
        quartiles: First and third, in milliseconds.
        size: Height and width of what the network saw, in pixels.
        patches: Of that image.
        windows: 1 in a single pass.
        memory: Peak in MiB: on CUDA what torch has allocated, weights included; otherwise of the process; null where
            the system does not say.
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
        """Measure on the device of the image (3, H, W) uint8.

        Args:
            segmenter: Its backbone lies there too.
            image: As the benchmark has it.
            precision: Context of the network's arithmetic, such as autocast.
            warm_ups: Passes that do not count.
            repeats: Passes that do, at least 1.
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
    """Return the result of a call, and the milliseconds until the device has finished it."""
    start = now(device)
    result = run()
    return result, 1000 * (now(device) - start)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


class Peak:
    """Peak memory since this was made.

    Args:
        device: Of what torch allocates; for the CPU the process counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM back
        except OSError:
            self._known = False

    def mebibytes(self) -> float | None:
        """None where the system does not say."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        if not self._known:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
