"""Settings shared by all measurements of `spar speed`: network, device, precision and number of repeats."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spar_lightning.backbones.base import Backbone
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.distillation import Distillation
from spar_lightning.speed.comparison import Comparison, Way
from spar_lightning.speed.peak import native_bf16, peak_rate

Precision = Literal["32-true", "bf16-mixed"]

PHOTO: Final = (1500, 2250)  # height and width of most images of SA-1B


class Bench:
    """Settings of the measurements.

    Args:
        module: Module whose student is measured; it is moved to the device.
        device: Device on which the networks run.
        repeats: Number of timed runs of each implementation.
        augmentation: Augmentation that draws the sizes of training images.
        size: Height and width in pixels of the image that is segmented.
        precision: Precision of our networks. None selects bf16-mixed if the device multiplies bf16 in hardware,
            otherwise 32-true. The published procedure runs in fp32 and, for bf16-mixed, also in bf16.
    """

    def __init__(
        self,
        module: Distillation,
        device: torch.device,
        repeats: int,
        augmentation: Augmentation,
        size: tuple[int, int] = (1024, 2048),
        precision: Precision | None = None,
    ) -> None:
        self.module = module.to(device)
        self.device, self.repeats = device, repeats
        self.augmentation, self.size = augmentation, size
        self.native_bf16 = native_bf16(device)
        self.precision: Precision = precision or ("bf16-mixed" if self.native_bf16 else "32-true")

    @property
    def mixed(self) -> bool:
        """Return whether our networks run in bf16."""
        return self.precision == "bf16-mixed"

    def context(self) -> AbstractContextManager[Any]:
        """Return the autocast context of our networks."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext()

    @cached_property
    def peaks(self) -> dict[str, float]:
        """Operations per second of a large matrix product, for each precision that the device supports natively."""
        peaks = {"32-true": peak_rate(self.device, torch.float32)}
        if self.native_bf16:  # emulated bf16 is not representative and takes a minute
            peaks["bf16-mixed"] = peak_rate(self.device, torch.bfloat16)
        return peaks

    def way(self, run: Callable[[], object], operations: float = 0.0, fp32: bool = False) -> Way:
        """Return an implementation that runs in our precision, or in fp32.

        Args:
            run: Function that does the work once.
            operations: Floating point operations of the network per run; 0 if not counted.
            fp32: Run in fp32 instead of our precision.
        """

        def inside() -> None:
            with nullcontext() if fp32 else self.context():
                run()

        return Way(inside, operations, self.peaks.get("32-true" if fp32 else self.precision, 0.0))

    def published(self, run: Callable[[], object], operations: float) -> dict[str, Way]:
        """Return the published implementation in fp32 and, if our networks run in bf16, also in bf16."""
        ways = {"published, fp32": self.way(run, operations, fp32=True)}
        return {**ways, "published, bf16": self.way(run, operations)} if self.mixed else ways

    def compare(
        self, title: str, unit: str, count: float, ways: dict[str, Way], overhead: tuple[str, str] | None = None
    ) -> Comparison:
        """Measure implementations of the same work; see `Comparison` for the arguments."""
        return Comparison(title, unit, count, ways, overhead).measure(self.repeats, self.device)

    def noise(self, height: int, width: int) -> Tensor:
        """Return a random image (3, H, W), uint8, on the device; speed does not depend on its content."""
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, device=self.device)

    def student(self) -> Backbone:
        """Return an uncompiled copy of the student with the same trainable parts."""
        return copy.deepcopy(self.module.student)


def operations(network: Backbone, work: Callable[[Backbone, torch.device], object]) -> float:
    """Count the floating point operations of matrix products and attention without running them.

    Args:
        network: Network that is copied to the meta device.
        work: Function whose operations are counted. It gets the copy and the device for its inputs.
    """
    meta = torch.device("meta")
    with FlopCounterMode(display=False) as counter:
        work(copy.deepcopy(network).to(meta), meta)
    return float(counter.get_total_flops())
