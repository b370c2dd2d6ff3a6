"""Order of the training samples: a pure function of seed and epoch, split among ranks, whose number may change.

A leg is a part of an epoch that is trained with one world: the number of ranks, the batch size and everything else that
determines the batches. The first leg deals all samples of the epoch to its steps and ranks. If the run resumes with
another world, a new leg deals the samples that are left. The batches are a pure function of (seed, epoch, legs), so the
position consists of a few numbers, which are the same on all ranks.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from spar_lightning.errors import UserError
from spar_lightning.files.hashing import sha256

Leg = dict[str, int]  # a world, and the number of steps trained with it
CHANGES: Final = "Only the number of ranks, data.batch_size, data.num_workers and data.pack_tokens may change."
Batches = NDArray[np.int64] | list[list[list[int]]]  # sample indices by step and rank


class ResumeError(UserError):
    """Error for a checkpoint that does not match the configuration."""


class Position(NamedTuple):
    """Position within an epoch.

    Attributes:
        epoch: Number of the epoch.
        legs: Finished legs.
        start: Finished steps of the current leg.
        batches: Batches of the current leg; None if it is the first, whose batches are dealt when they are needed.
        left: Number of samples that the current leg deals.
    """

    epoch: int
    legs: list[Leg]
    start: int
    batches: Batches | None
    left: int

    @property
    def done(self) -> int:
        """Number of steps of the finished legs."""
        return sum(leg["steps"] for leg in self.legs)


def _check(epoch: int, found: dict[str, Any], ours: dict[str, Any], allowed: str) -> None:
    """Raise ResumeError if values of a checkpoint differ from those of this run."""
    rows = [
        f"{name} {found[name]} instead of {ours[name]}" for name in found if found[name] != ours.get(name, found[name])
    ]
    if rows:
        raise ResumeError(
            f"Cannot resume in the middle of epoch {epoch}: the image order has changed ({', '.join(rows)}). {allowed} "
            "Restore the previous settings, or resume from the end of an epoch: --resume RUN/checkpoints/epoch.ckpt."
        )


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

    kind: ClassVar[str] = "shuffled"

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.length, self.batch_size = length, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0
        self.content = ""  # hash of the samples' keys, if known
        self.sampler: Any = self  # Lightning calls set_epoch on loader.batch_sampler.sampler
        self._resumed: Position | None = None
        if not len(self):
            raise UserError(
                f"{length} training images are too few for one step of {world_size} ranks with "
                f"data.batch_size {batch_size}. Use more images, a smaller batch size or fewer devices."
            )

    def world(self) -> dict[str, int]:
        """Return the values that may change within an epoch; they determine the split into steps and ranks."""
        return {"ranks": self.world_size, "batch_size": self.batch_size}

    def identity(self) -> dict[str, Any]:
        """Return the values that must not change within an epoch."""
        return {"kind": self.kind, "images": self.length, "content": self.content, "seed": self.seed}

    def sequence(self) -> NDArray[np.int64]:
        """Return all samples (length,) in the order of the epoch."""
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.length)

    def deal(self, samples: NDArray[np.int64], world: dict[str, int], leg: int) -> Batches:
        """Deal samples to the steps and ranks of a world; fewer than one step's samples are left out.

        Args:
            samples: Samples (n,), in the order of the epoch.
            world: World as returned by `world`.
            leg: Number of finished legs of the epoch.
        """
        steps = len(samples) // (world["ranks"] * world["batch_size"])
        shape = steps, world["ranks"], world["batch_size"]
        return samples[: np.prod(shape, dtype=int)].reshape(shape)

    @cached_property
    def steps(self) -> int:
        """Number of steps of a whole epoch."""
        return self.length // (self.world_size * self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Select an epoch."""
        self.epoch = epoch

    @property
    def position(self) -> Position:
        """Position at which an iteration starts."""
        if self._resumed is not None and self._resumed.epoch == self.epoch:
            return self._resumed
        return Position(self.epoch, [], 0, None, self.length)

    @property
    def finished(self) -> int:
        """Number of finished steps of the epoch."""
        return self.position.done + self.position.start

    def restart(self) -> None:
        """Start at the beginning of the epoch."""
        self._resumed = None

    def resume(self, state: dict[str, Any]) -> None:
        """Select the epoch of a saved state of `ResumableLoader`, and continue it.

        If the world has not changed, the last leg continues with its next step. Otherwise a new leg starts.

        Raises:
            ResumeError: If the order has changed.
        """
        self.epoch = state["epoch"]
        legs = self._legs(state)
        same = legs and {**legs[-1], **self.world()} == legs[-1]
        start = legs.pop()["steps"] if same else 0
        if not legs:
            self._resumed = Position(self.epoch, legs, start, None, self.length)
            return
        left = self.sequence()
        for number, leg in enumerate(legs):
            seen = np.zeros(self.length, bool)
            dealt = self.deal(left, leg, number)[: leg["steps"]]
            seen[np.fromiter(chain.from_iterable(chain.from_iterable(dealt)), np.int64)] = True
            left = left[~seen[left]]
        batches = self.deal(left, self.world(), len(legs))
        self._resumed = Position(self.epoch, legs, start, batches, len(left))

    def _legs(self, state: dict[str, Any]) -> list[Leg]:
        """Return the legs of a saved state."""
        epoch, found, ours = state["epoch"], state["order"], self.identity()
        if "legs" in state:
            _check(epoch, found, ours, CHANGES)
            return [leg for leg in state["legs"] if leg["steps"]]
        # Version 0.1 saved the number of samples per step, and the number of samples or packs consumed by all ranks.
        kind = "packed" if "pack_tokens" in found else "streamed" if "workers" in found else "shuffled"
        _check(epoch, {**found, "kind": kind}, ours, CHANGES)
        steps = state["consumed"] // found["samples_per_step"]
        world = {**self.world(), "samples_per_step": self.world_size * self.batch_size}
        if kind == "shuffled" and found["samples_per_step"] != world["samples_per_step"]:
            return [{"ranks": 1, "batch_size": found["samples_per_step"], "steps": steps}]  # equal for any split
        _check(epoch, found, world, "A checkpoint of version 0.1 needs the same values.")
        return [{**self.world(), "steps": steps}]

    def count(self, limit: int | float | None = None) -> int:
        """Return the number of batches per rank in this epoch, including those of finished legs.

        Args:
            limit: Maximum number of batches (int), or fraction of the samples (float), as in the Trainer's
                limit_train_batches.
        """
        now = self.position
        steps = self.steps if now.batches is None else len(now.batches)
        if limit is None or isinstance(limit, int):
            total = now.done + steps
            return total if limit is None else max(min(total, limit), now.done + now.start)
        if not now.legs:
            return max(int(steps * limit), now.start)
        wanted = limit * self.length - (self.length - now.left)  # samples of the current leg
        return now.done + max(int(steps * wanted / now.left) if now.left else 0, now.start)

    def __len__(self) -> int:
        return self.count()

    def __iter__(self) -> Iterator[list[int]]:
        now = self.position
        batches = self.deal(self.sequence(), self.world(), 0) if now.batches is None else now.batches
        for step in range(now.start, len(batches)):
            yield [int(sample) for sample in batches[step][self.rank]]


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

    kind = "streamed"

    def __init__(
        self, location: "np.ndarray[Any, Any]", batch_size: int, rank: int, world_size: int, seed: int, num_workers: int
    ) -> None:
        self.location, self.workers = location, max(num_workers, 1)
        super().__init__(len(location), batch_size, rank, world_size, seed)

    def world(self) -> dict[str, int]:
        return {**super().world(), "workers": self.workers}

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "shards": sha256(self._firsts().tobytes(), 16)}

    def _firsts(self) -> NDArray[np.int64]:
        """Return the first sample of each shard except the first one."""
        return np.flatnonzero(np.diff(self.location)) + 1

    def sequence(self) -> NDArray[np.int64]:
        shards = np.split(np.arange(self.length), self._firsts())
        shuffled = np.random.default_rng([self.seed, self.epoch]).permutation(len(shards))
        return np.concatenate([shards[i] for i in shuffled])

    def deal(self, samples: NDArray[np.int64], world: dict[str, int], leg: int) -> Batches:
        ranks, size, workers = world["ranks"], world["batch_size"], world["workers"]
        steps = len(samples) // (ranks * size)
        # A DataLoader assigns batches to its workers round-robin: batch k of a rank belongs to part k mod workers.
        parts = np.cumsum([0] + [len(range(worker, steps, workers)) for worker in range(workers - 1)])
        step = np.arange(steps)
        batches = samples[: steps * ranks * size].reshape(ranks, steps, size)
        return batches[:, parts[step % workers] + step // workers].swapaxes(0, 1)


class RankSlice(Sampler[int]):
    """Validation sampler of the indices rank, rank + world_size, ...; no index is repeated to even out the ranks."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
