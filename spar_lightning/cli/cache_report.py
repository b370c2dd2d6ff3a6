"""Reports of `spar cache` before and after its work: images, windows, disk space, time."""

from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.image_table import Images, find
from spar_lightning.distillation import Distillation
from spar_lightning.feature_cache.cost import cost, windows_per_second
from spar_lightning.feature_cache.index import CacheIndex
from spar_lightning.formatting import bytes_text, hours_text, markdown

IMAGES: Final = (1_000, 25_000, 11_000_000)  # images, one row of the table each
PROCESSES: Final = (1, 8, 64)  # processes, one column of the table each


class CachePlan:
    """Estimate of the disk space and time that the missing features of a cache need.

    Args:
        model: Module with the teacher.
        datamodule: Data module with augmentation, seed and storage type of the features.
        images: Images without features.
        rate: Windows per second of one process; None measures the rate when it is first needed.
    """

    def __init__(self, model: Distillation, datamodule: SA1B, images: Images, rate: float | None = None) -> None:
        self.model, self.datamodule = model, datamodule
        self.given = rate
        windows = model.sliding_window(model.student)
        augmentation, channels = datamodule.augmentation, model.student.embed_dim
        self.cost = cost(images, augmentation, datamodule.seed, windows, channels, datamodule.cache_dtype)

    @cached_property
    def rate(self) -> float:
        """Windows per second of the teacher: as given, or measured on this process's device."""
        if self.given is not None:
            return self.given
        make = self.datamodule.teacher_features()
        return windows_per_second(make.features, make.teacher, make.device)

    def text(self, root: Path, done: int, free: int, processes: int) -> str:
        """Return the plan as a few lines of text. Measures the rate if images are left.

        Args:
            root: Folder of the cache.
            done: Number of images that have features.
            free: Free disk space in bytes.
            processes: Number of processes that share the work.
        """
        price = self.cost
        lines = [f"{root}: {price.images:,} images to do, {done:,} done"]
        if price.images:
            hours = price.windows / self.rate / 3600 / processes
            lines += [
                f"  windows  {self._windows()}, {price.windows / price.images:,.0f} per image",
                f"  disk     {bytes_text(price.bytes)}: features {bytes_text(price.feature_bytes)} "
                f"({self.datamodule.cache_dtype}), images about {bytes_text(price.image_bytes)}; "
                f"{bytes_text(free)} free",
                f"  rate     {self.rate:,.3g} windows/s per process, {self._origin()}",
                f"  time     {hours_text(hours)} with {processes} {'process' if processes == 1 else 'processes'}",
            ]
        return "\n".join(lines)

    def table(self) -> str:
        """Return a Markdown table of disk space and time for larger sets of such images on 1 to 64 processes."""
        head = ["images", "disk", *(f"{n} {'process' if n == 1 else 'processes'}" for n in PROCESSES)]
        rows = []
        for count in IMAGES:
            price = self.cost.of(count)
            hours = price.windows / self.rate / 3600
            rows.append([f"{count:,}", bytes_text(price.bytes), *(hours_text(hours / n) for n in PROCESSES)])
        return markdown([head, *rows])

    def _windows(self) -> str:
        """Return the work of the teacher, for display."""
        module, count = self.model, f"{self.cost.windows:,.0f}"
        if module.teacher == "single":
            return f"a single pass over the area of {count} windows"
        return f"{count} ({module.sliding_window(module.student).description()})"

    def _origin(self) -> str:
        """Return the origin of the rate, for display."""
        if self.given is not None:
            return "as given"
        device = self.datamodule.trainer.strategy.root_device  # type: ignore[union-attr]
        if device.type == "cuda":
            return f"measured on {torch.cuda.get_device_name(device)}"
        return f"measured on {device.type} with {torch.get_num_threads()} threads"


def summary(index: CacheIndex, images: Images) -> str:
    """Return how many of the images have features, and list the rejected images with the reason."""
    there = int((find(index.sources()[0], images.keys) >= 0).sum())
    wanted = set(images.keys.tolist()) if index.quarantined else set()
    rejected = {key: item for key, (item, _) in index.rejected().items() if key.encode() in wanted}
    lines = [f"{there:,} of {len(images):,} images have features, {len(rejected):,} cannot be used"]
    return "\n".join(lines + [f"  {key}: {item.reason}" for key, item in rejected.items()])
