"""Evaluator: benchmarks over any number of processes, resumable, with the same counts as one process.

Every process takes a share of the images that nobody has counted yet. Its counts go to disk every
half minute, so that an evaluation that ends in between loses no more than that.
"""

import time
from typing import Any, Final

import numpy as np
import torch
import torch.distributed
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from spar_lightning.datamodules.benchmark import Benchmark
from spar_lightning.evaluation.counts import Counts, CountsFolder
from spar_lightning.evaluation.loop import count
from spar_lightning.evaluation.score import Score
from spar_lightning.segmenter import Segmenter

SAVE_EVERY: Final = 30.0  # seconds


class Evaluator:
    """The loop over benchmarks on this process's device.

    Args:
        fabric: Launched: device, precision, and the other processes.
        num_workers: Loader processes.
    """

    def __init__(self, fabric: Fabric, num_workers: int) -> None:
        self.fabric = fabric
        self.num_workers = num_workers

    def evaluate(self, segmenter: Segmenter, benchmark: Benchmark, folder: CountsFolder) -> Counts:
        """The counts of all images of a benchmark, on every process. Collective."""
        # What the first process finds: the others may see another disk, or this one late.
        found = folder.gather() if self.fabric.global_rank == 0 else Counts.none(folder.classes)
        before: Counts = self.fabric.broadcast(found)
        left = np.setdiff1d(np.arange(len(benchmark)), before.images)
        mine = left[self.fabric.global_rank :: self.fabric.world_size]
        title = benchmark.name + (f" ({len(before.images)} counted before)" if len(before.images) else "")
        share = _Share(Score(len(benchmark.classes), self.fabric.device))
        images = (image for batch in self._loader(benchmark, mine.tolist()) for image in batch)
        times = count(segmenter, images, share.score, self.fabric.device, self.fabric.autocast)
        bar = tqdm(times, title, len(mine), unit="image", disable=self.fabric.global_rank != 0)
        saved = time.monotonic()
        for i, ms in zip(mine, bar, strict=True):
            share.add(int(i), ms)
            # Here alone, between two images: what ends the loop may find the score and the list at odds.
            if time.monotonic() - saved > SAVE_EVERY or len(share.images) == len(mine):
                folder.write(share.counts(), self.fabric.global_rank)
                saved = time.monotonic()
        total = sum(self._all(share.counts()), start=before)
        assert len(np.unique(total.images)) == len(total.images) == len(benchmark)
        if self.fabric.global_rank == 0:
            folder.write(total)
            folder.drop_parts()
        self.fabric.barrier()  # nobody begins with the next before this one is on disk
        return total

    def _loader(self, benchmark: Benchmark, indices: list[int]) -> DataLoader[Any]:
        return DataLoader(Subset(benchmark, indices), collate_fn=list, num_workers=self.num_workers)

    def _all(self, counts: Counts) -> list[Counts]:
        """Those of all processes."""
        if self.fabric.world_size == 1:
            return [counts]
        gathered: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(gathered, counts)
        return gathered


class _Share:
    """What one process has counted since it started."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.images: list[int] = []
        self._ms: list[float] = []

    def add(self, image: int, ms: float) -> None:
        """Note an image that the score holds."""
        self.images.append(image)
        self._ms.append(ms)

    def counts(self) -> Counts:
        return Counts(self.score.matrix.cpu().numpy(), np.array(self.images, np.int64), np.array(self._ms))
