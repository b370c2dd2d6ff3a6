"""Order of the training samples, and a data loader that can resume in the middle of an epoch.

The order is a pure function of (seed, epoch, number of ranks). The position is one number that is the same on all
ranks: the number of samples consumed in the epoch. Lightning saves the loader state of rank 0 and restores it on all
ranks, so a state that differs between ranks would be lost.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from spar_lightning.errors import UserError


class ResumeError(UserError):
    """Error for a checkpoint that does not match the configuration."""


class EpochOrder(Sampler[list[int]]):
    """Batch sampler that splits one permutation per epoch among the ranks; all ranks take the same number of steps.

    Args:
        length: Number of samples.
        batch_size: Samples per step and rank.
        rank: Rank of this process.
        world_size: Number of ranks; up to world_size * batch_size - 1 samples of an epoch are dropped.
        seed: Seed of the permutations.

    Raises:
        UserError: If there are fewer samples than one step needs.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.length, self.batch_size = length, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = self.start = 0
        self.content = ""  # hash of the samples' keys, if known
        self.sampler = self  # Lightning calls set_epoch on loader.batch_sampler.sampler
        if not len(self):
            raise UserError(
                f"{length} training images are too few for one step of {world_size} ranks with "
                f"data.batch_size {batch_size}. Use more images, a smaller batch size or fewer devices."
            )

    @property
    def samples_per_step(self) -> int:
        """Number of samples that all ranks together consume in one step."""
        return self.batch_size * self.world_size

    def identity(self) -> dict[str, Any]:
        """Return the values that determine the order within an epoch."""
        return {
            "images": self.length,
            "content": self.content,
            "samples_per_step": self.samples_per_step,
            "seed": self.seed,
        }

    def set_epoch(self, epoch: int) -> None:
        """Select the permutation of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.samples_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        for step in range(self.start, len(self)):
            first = step * self.samples_per_step + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class StreamOrder(EpochOrder):
    """Batch sampler for shards that can only be read from the front.

    The shards are shuffled; the images within a shard keep their order. The sequence is split into equal parts, one per
    loader process of all ranks, and each process reads forward through its part. A shard is opened twice if a split
    falls into it, and once otherwise. Every image is used once per epoch, however the images are distributed.

    Args:
        location: Shard index of each sample (N,); samples of the same shard are contiguous.
        batch_size: Samples per step and rank.
        rank: Rank of this process.
        world_size: Number of ranks.
        seed: Seed of the permutations.
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
        # A DataLoader assigns batches to its workers round-robin: batch k of a rank belongs to part k mod workers.
        batches = [len(range(worker, len(self), self.workers)) for worker in range(self.workers)]
        starts = np.cumsum([0, *batches[:-1]]) + self.rank * len(self)
        for step in range(self.start, len(self)):
            first = int(starts[step % self.workers] + step // self.workers) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class ResumableLoader(DataLoader[Any]):
    """DataLoader that saves and restores its position: the epoch and the samples consumed by all ranks.

    Args:
        dataset: Map-style dataset of the samples.
        order: Batch sampler.
        num_workers: Number of loader processes; they are kept between epochs.
        pin_memory: Copy batches to pinned memory, for faster transfer to a GPU.
        start_method: Start method of the loader processes: fork, spawn or forkserver; None uses Python's default.
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
            prefetch_factor=4 if num_workers else None,  # sizes differ by up to 10x: a deeper queue evens out
            pin_memory=pin_memory,
            multiprocessing_context=start_method if num_workers else None,
        )
        self.order = order
        self._epoch = self._steps = 0
        self._resume: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position within the epoch, which is the same on every rank."""
        consumed = self._steps * self.order.samples_per_step
        return {"epoch": self._epoch, "consumed": consumed, "order": self.order.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position when the next epoch starts."""
        self._resume = state

    def _start(self) -> int:
        """Return the first step of this epoch.

        Raises:
            ResumeError: If the saved position is in the middle of an epoch and the order has changed.
        """
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != self.order.epoch:
            return 0  # the checkpoint was saved at the end of an epoch
        found, ours = state["order"], self.order.identity()
        if found != ours:
            rows = [
                f"{name} {found.get(name)} instead of {ours.get(name)}"
                for name in {**found, **ours}
                if found.get(name) != ours.get(name)
            ]
            raise ResumeError(
                f"Cannot resume in the middle of epoch {state['epoch']}: the image order has changed "
                f"({', '.join(rows)}). Restore the previous settings, or resume from the end of an epoch: "
                "--resume RUN/checkpoints/epoch.ckpt."
            )
        return int(state["consumed"]) // self.order.samples_per_step

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # As a generator, this draws nothing before the first next(), so a later set_epoch by Lightning takes effect.
        self._epoch = self.order.epoch
        self._steps = self.order.start = self._start()
        for batch in super().__iter__():
            self._steps += 1  # before the yield: no code runs after the last one
            yield batch


class RankSlice(Sampler[int]):
    """Validation sampler of the indices rank, rank + world_size, ...; no index is repeated to even out the ranks."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
