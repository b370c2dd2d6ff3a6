"""The order of training samples, and a loader that resumes in the middle of an epoch.

The order is a pure function of (seed, epoch, number of ranks), and the position is one number that
is equal on all ranks: the samples that the epoch has consumed. Lightning stores rank 0's loader
state and gives it to everyone, so a state that differs between ranks would be lost.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from spar_lightning.errors import UserError


class ResumeError(UserError):
    """A checkpoint does not belong to this configuration."""


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
        self.content = ""  # says which samples these are, where that is known
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

    def identity(self) -> dict[str, Any]:
        """What the order within an epoch depends on."""
        return {
            "images": self.length,
            "content": self.content,
            "samples_per_step": self.samples_per_step,
            "seed": self.seed,
        }

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.samples_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        for step in range(self.start, len(self)):
            first = step * self.samples_per_step + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class StreamOrder(EpochOrder):
    """The order for shards that can be read from the front only.

    Whole shards are shuffled; the images inside keep their order. The sequence is cut into as many equal parts as
    there are loader processes on all ranks, and each moves forward through its own: a shard is opened twice where a
    cut falls into it, and once elsewhere. Every image is taken once per epoch, whatever the shards hold.

    Args:
        location: Number of each sample's shard, equal ones side by side.
        batch_size: Samples per step and rank.
        rank: This process.
        world_size: Number of processes.
        seed: Of the permutations.
        num_workers: Loader processes per rank; 0 counts as 1.
    """

    def __init__(
        self, location: "np.ndarray[Any, Any]", batch_size: int, rank: int, world_size: int, seed: int, num_workers: int
    ) -> None:
        super().__init__(len(location), batch_size, rank, world_size, seed)
        self.location, self.workers = location, max(num_workers, 1)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "workers": self.workers}

    def __iter__(self) -> Iterator[list[int]]:
        shards = np.split(np.arange(self.length), np.flatnonzero(np.diff(self.location)) + 1)
        shuffled = np.random.default_rng([self.seed, self.epoch]).permutation(len(shards))
        order = np.concatenate([shards[i] for i in shuffled])
        # A DataLoader deals batches to its workers in turn: batch k of a rank belongs to part k mod workers.
        batches = [len(range(worker, len(self), self.workers)) for worker in range(self.workers)]
        starts = np.cumsum([0, *batches[:-1]]) + self.rank * len(self)
        for step in range(self.start, len(self)):
            first = int(starts[step % self.workers] + step // self.workers) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose state is the epoch and the samples consumed by all ranks.

    Args:
        dataset: Samples by index.
        order: Which of them make up each batch.
        num_workers: Loader processes; they stay over the epochs.
        pin_memory: Whether batches are put where an accelerator fetches them without waiting.
        start_method: How loader processes start: fork, spawn or forkserver; None takes Python's default.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: EpochOrder,
        num_workers: int,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=list,
            persistent_workers=num_workers > 0,
            prefetch_factor=4 if num_workers else None,  # samples differ in size by ten times: a deeper queue evens out
            pin_memory=pin_memory,
            multiprocessing_context=start_method if num_workers else None,
        )
        self.order = order
        self._epoch = self._steps = 0
        self._resume: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Position of the run, the same on every rank."""
        consumed = self._steps * self.order.samples_per_step
        return {"epoch": self._epoch, "consumed": consumed, "order": self.order.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self._resume = state

    def _start(self) -> int:
        """The step at which this epoch begins.

        Raises:
            ResumeError: The position lies inside an epoch of another order.
        """
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != self.order.epoch:
            return 0  # the checkpoint was made at the end of an epoch
        found, ours = state["order"], self.order.identity()
        if found != ours:
            rows = [
                f"{name} {found.get(name)} instead of {ours.get(name)}"
                for name in {**found, **ours}
                if found.get(name) != ours.get(name)
            ]
            raise ResumeError(
                f"The checkpoint lies inside epoch {state['epoch']} of another order of the images: {', '.join(rows)}. "
                "Restore that, or resume from the end of an epoch: --resume RUN/checkpoints/epoch.ckpt."
            )
        return int(state["consumed"]) // self.order.samples_per_step

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing is drawn before the first next(), so Lightning's late set_epoch still counts.
        self._epoch = self.order.epoch
        self._steps = self.order.start = self._start()
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
