"""Settings that all measurements of `spar speed` share: network, device, precision and number of repeats."""

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
    """Where and how things are measured.

    Args:
        module: The `Distillation`; its student is moved to the device.
        device: Where the networks run.
        repeats: Timed runs of each implementation.
        augmentation: Decides the sizes of training images.
        size: Height and width of the image that is segmented.
        precision: Of our networks; None takes bf16 where the device multiplies it in hardware. What was published
            runs in fp32, and in this too.
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
        """Whether our networks run in bf16."""
        return self.precision == "bf16-mixed"

    def context(self) -> AbstractContextManager[Any]:
        """Of our networks' arithmetic."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext()

    @cached_property
    def peaks(self) -> dict[str, float]:
        """Operations per second of a large matrix product by precision, in those that the device has."""
        peaks = {"32-true": peak_rate(self.device, torch.float32)}
        if self.native_bf16:  # emulated it is no measure, and takes a minute
            peaks["bf16-mixed"] = peak_rate(self.device, torch.bfloat16)
        return peaks

    def way(self, run: Callable[[], object], operations: float = 0.0, fp32: bool = False) -> Way:
        """A way in our precision, or in fp32."""

        def inside() -> None:
            with nullcontext() if fp32 else self.context():
                run()

        return Way(inside, operations, self.peaks.get("32-true" if fp32 else self.precision, 0.0))

    def published(self, run: Callable[[], object], operations: float) -> dict[str, Way]:
        """What was published: in fp32, which comes first, and where ours is another precision in that too."""
        ways = {"published, fp32": self.way(run, operations, fp32=True)}
        return {**ways, "published, bf16": self.way(run, operations)} if self.mixed else ways

    def compare(
        self, title: str, unit: str, count: float, ways: dict[str, Way], overhead: tuple[str, str] | None = None
    ) -> Comparison:
        """Measure."""
        return Comparison(title, unit, count, ways, overhead).measure(self.repeats, self.device)

    def noise(self, height: int, width: int) -> Tensor:
        """An image (3, H, W) uint8 on the device: no speed depends on what it shows."""
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, device=self.device)

    def student(self) -> Backbone:
        """A copy of the student with the same parts trainable, not compiled, free to be changed."""
        return copy.deepcopy(self.module.student)


def operations(network: Backbone, work: Callable[[Backbone, torch.device], object]) -> float:
    """Floating point operations of matrix products and attention, counted without doing them.

    Args:
        network: Copied without its weights.
        work: What is counted: called with the copy and the device on which its inputs must lie.
    """
    meta = torch.device("meta")
    with FlopCounterMode(display=False) as counter:
        work(copy.deepcopy(network).to(meta), meta)
    return float(counter.get_total_flops())
