"""Batch sampler for sequence packing: a step processes a pack, several images in one packed sequence.

Packs are drawn again in each epoch, so that images are combined differently. The number of packs is the same in every
epoch, because the Trainer needs a fixed epoch length. Within a step, all ranks have about the same work: packs are
filled evenly, and packs with similar attention cost run in the same step.
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

JITTER: Final = 0.25  # images are sorted by tokens times a random factor of up to 2 ** JITTER
DRAWS: Final = 5  # draws that must all succeed for a number of packs, so that every epoch finds its packs quickly


class PackOrder(EpochOrder):
    """Batch sampler of packs.

    Args:
        tokens: Number of tokens of each image (N,).
        limit: Maximum number of tokens in a pack; an image with more tokens is a pack on its own.
        rank: Rank of this process.
        world_size: Number of ranks; every image is used once per epoch.
        seed: Seed of the packs.

    Raises:
        UserError: If the images cannot be split evenly into packs for all ranks.
    """

    def __init__(self, tokens: NDArray[np.int64], limit: int, rank: int, world_size: int, seed: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(len(tokens), 1, rank, world_size, seed)

    @property
    def samples_per_step(self) -> int:
        """Number of packs that all ranks together consume in one step; the position in an epoch is counted in packs."""
        return self.world_size

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "pack_tokens": self.limit}

    def __len__(self) -> int:
        return self._count // self.world_size

    @cached_property
    def _count(self) -> int:
        """Number of packs per epoch: a multiple of the ranks, at most about 0.5 % above the smallest that works."""
        ranks = self.world_size
        count = -(-int(self.tokens.clip(max=self.limit).sum()) // (self.limit * ranks)) * ranks
        while count <= self.length and not all(self._draw(count, [draw]) for draw in range(DRAWS)):
            count += max(1, count // 200 // ranks) * ranks
        if count > self.length:
            raise UserError(
                f"{self.length} images cannot be split evenly into packs of at most {self.limit} tokens for {ranks} "
                "ranks. Use fewer devices, more images, or a larger data.pack_tokens."
            )
        return count

    def _draw(self, count: int, seed: list[int]) -> list[list[int]] | None:
        """Distribute all images over `count` packs; return None if a pack of several images exceeds the limit."""
        rng = np.random.default_rng([self.seed, *seed])
        sizes = self.tokens * 2.0 ** rng.uniform(-JITTER, JITTER, self.length)
        packs: list[list[int]] = [[] for _ in range(count)]
        least = [(0, i) for i in range(count)]  # heap of (tokens, index) of each pack
        for image in np.argsort(-sizes).tolist():
            filled, i = least[0]
            packs[i].append(image)
            heapreplace(least, (filled + int(self.tokens[image]), i))
        return packs if all(filled <= self.limit or len(packs[i]) == 1 for filled, i in least) else None

    def __iter__(self) -> Iterator[list[int]]:
        drawn = (self._draw(self._count, [self.epoch, draw]) for draw in itertools.count())
        packs = next(packs for packs in drawn if packs)
        # The cost of attention is the sum of squared lengths: packs of similar cost run in the same step.
        work = [int((self.tokens[pack] ** 2).sum()) for pack in packs]
        steps = np.argsort(work).reshape(-1, self.world_size)
        for step in np.random.default_rng([self.seed, self.epoch]).permutation(len(steps))[self.start :]:
            yield packs[steps[step, self.rank]]
