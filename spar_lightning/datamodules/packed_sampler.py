"""The order of an epoch in which a step is a pack: several images whose tokens fill one sequence.

Each epoch draws its packs anew, so that no two images always meet. Their number is the same in every epoch,
which is what the Trainer's length of an epoch asks for, and within a step all ranks have about the same
work: packs are filled evenly, and those with similar attention run side by side.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property
from heapq import heapreplace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datamodules.dataloader import EpochOrder
from spar_lightning.errors import UserError

JITTER: Final = 0.25  # images are dealt by size, largest first; so much of an octave is left to chance
DRAWS: Final = 5  # that must all succeed for a number of packs, so that one of some epoch will not fail for long


class PackOrder(EpochOrder):
    """Batch sampler of packs.

    Args:
        tokens: Of each image.
        limit: Most tokens in a pack; an image with more is a pack of its own.
        rank: This process.
        world_size: Number of processes; every image is taken once per epoch.
        seed: Of the packs.
    """

    def __init__(self, tokens: NDArray[np.int64], limit: int, rank: int, world_size: int, seed: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(len(tokens), 1, rank, world_size, seed)

    @property
    def samples_per_step(self) -> int:
        """Packs that all ranks together take in one step: the position within an epoch is counted in these."""
        return self.world_size

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "pack_tokens": self.limit}

    def __len__(self) -> int:
        return self._count // self.world_size

    @cached_property
    def _count(self) -> int:
        """Packs of an epoch, a multiple of the ranks: within half a percent the fewest that any draw fills."""
        ranks = self.world_size
        count = -(-int(self.tokens.clip(max=self.limit).sum()) // (self.limit * ranks)) * ranks
        while count <= self.length and not all(self._draw(count, [draw]) for draw in range(DRAWS)):
            count += max(1, count // 200 // ranks) * ranks
        if count > self.length:
            raise UserError(
                f"{self.length} images make no packs of at most {self.limit} tokens for {ranks} processes alike. Give "
                "fewer devices, more images, or a larger data.pack_tokens."
            )
        return count

    def _draw(self, count: int, seed: list[int]) -> list[list[int]] | None:
        """So many packs of all images, none above the limit that holds more than one; None where chance fails."""
        rng = np.random.default_rng([self.seed, *seed])
        sizes = self.tokens * 2.0 ** rng.uniform(-JITTER, JITTER, self.length)
        packs: list[list[int]] = [[] for _ in range(count)]
        least = [(0, i) for i in range(count)]  # tokens and number of each pack, as a heap
        for image in np.argsort(-sizes).tolist():
            filled, i = least[0]
            packs[i].append(image)
            heapreplace(least, (filled + int(self.tokens[image]), i))
        return packs if all(filled <= self.limit or len(packs[i]) == 1 for filled, i in least) else None

    def __iter__(self) -> Iterator[list[int]]:
        drawn = (self._draw(self._count, [self.epoch, draw]) for draw in itertools.count())
        packs = next(packs for packs in drawn if packs)
        # Attention costs the sum of squares: packs that are alike in it share a step.
        work = [int((self.tokens[pack] ** 2).sum()) for pack in packs]
        steps = np.argsort(work).reshape(-1, self.world_size)
        for step in np.random.default_rng([self.seed, self.epoch]).permutation(len(steps))[self.start :]:
            yield packs[steps[step, self.rank]]
