"""The order of training samples, and a loader that resumes in the middle of an epoch.

The order is a pure function of (seed, epoch, number of ranks), and the position is one number that
is equal on all ranks: the samples that the epoch has consumed. Lightning stores rank 0's loader
state and gives it to everyone, so a state that differs between ranks would be lost.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from spar_lightning.datamodules.sample import Sample
from spar_lightning.errors import UserError


class EpochOrder(Sampler[list[int]]):
    """Batch sampler: a permutation per epoch, dealt to the ranks; all ranks take the same number of steps.

    Args:
        length: Number of samples.
        batch_size: Samples per step and rank.
        rank: This process.
        world_size: Number of processes; up to world_size * batch_size - 1 samples of an epoch are dropped.
        seed: Of the permutations.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.length, self.batch_size = length, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = self.start = 0
        self.sampler = self  # Lightning calls set_epoch on loader.batch_sampler.sampler
        if not len(self):
            raise UserError(
                f"{length} training images are fewer than one step takes: {world_size} processes with "
                f"data.batch_size {batch_size}. Give more images, or lower the batch size or the number of devices."
            )

    @property
    def samples_per_step(self) -> int:
        """Samples that all ranks together take in one step."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.samples_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length).tolist()
        for step in range(self.start, len(self)):
            first = step * self.samples_per_step + self.rank * self.batch_size
            yield order[first : first + self.batch_size]


class ResumableLoader(DataLoader[Sample]):
    """A DataLoader over `EpochOrder` whose state is the epoch and the samples consumed by all ranks."""

    def __init__(self, dataset: Dataset[Sample], order: EpochOrder, num_workers: int) -> None:
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=list,
            persistent_workers=num_workers > 0,
        )
        self.order = order
        self._epoch = self._steps = 0
        self._resume: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, int]:
        """Position of the run, the same on every rank."""
        return {"epoch": self._epoch, "consumed": self._steps * self.order.samples_per_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position."""
        self._resume = (state["epoch"], state["consumed"] // self.order.samples_per_step)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing is drawn before the first next(), so Lightning's late set_epoch still counts.
        order = self.order
        self._epoch = order.epoch
        order.start = self._resume[1] if self._resume and self._resume[0] == order.epoch else 0
        self._resume = None
        self._steps = order.start
        for batch in super().__iter__():
            self._steps += 1  # before the yield: nothing runs after the last one
            yield batch


class RankSlice(Sampler[int]):
    """Validation sampler: indices rank, rank + world_size, ..; nothing is repeated to even out the ranks."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
