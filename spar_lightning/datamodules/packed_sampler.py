"""Batch sampler for sequence packing: a step processes a pack, several images in one packed sequence.

Packs are drawn again in each epoch, so that images are combined differently. The number of packs is the same in every
whole epoch, because the Trainer needs a fixed epoch length. Within a step, all ranks have about the same work: packs
are filled evenly, and packs with similar attention cost run in the same step.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property
from heapq import heapreplace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datamodules.samplers import Batches, EpochOrder
from spar_lightning.errors import UserError
from spar_lightning.files.hashing import sha256

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

    kind = "packed"

    def __init__(self, tokens: NDArray[np.int64], limit: int, rank: int, world_size: int, seed: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(len(tokens), 1, rank, world_size, seed)

    def world(self) -> dict[str, int]:
        return {"ranks": self.world_size, "pack_tokens": self.limit}

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "tokens": self._hash}

    @cached_property
    def _hash(self) -> str:
        return sha256(self.tokens.astype(np.int64).tobytes(), 16)

    @cached_property
    def steps(self) -> int:
        """Number of steps of a whole epoch."""
        return self._count(self.world_size, self.limit) // self.world_size

    def _count(self, ranks: int, limit: int) -> int:
        """Return the number of packs per epoch: a multiple of `ranks`, about 0.5 % above the smallest at most."""
        for count in self._counts(self.tokens, ranks, limit):
            if all(self._draw(self.sequence(), limit, count, [draw]) for draw in range(DRAWS)):
                return count
        raise UserError(
            f"{self.length} images cannot be split evenly into packs of at most {limit} tokens for {ranks} ranks. Use "
            "fewer devices, more images, or a larger data.pack_tokens."
        )

    @staticmethod
    def _counts(tokens: NDArray[np.int64], ranks: int, limit: int) -> Iterator[int]:
        """Yield numbers of packs for images with these numbers of tokens, in ascending order."""
        count = -(-int(tokens.clip(max=limit).sum()) // (limit * ranks)) * ranks
        while count <= len(tokens):
            yield count
            count += max(1, count // 200 // ranks) * ranks

    def _draw(self, images: NDArray[np.int64], limit: int, count: int, seed: list[int]) -> list[list[int]] | None:
        """Distribute images over `count` packs; return None if a pack of several images exceeds the limit."""
        rng = np.random.default_rng([self.seed, *seed])
        sizes = self.tokens[images] * 2.0 ** rng.uniform(-JITTER, JITTER, len(images))
        images = images[np.argsort(-sizes)]
        packs: list[list[int]] = [[] for _ in range(count)]
        least = [(0, i) for i in range(count)]  # heap of (tokens, index) of each pack
        for image, tokens in zip(images.tolist(), self.tokens[images].tolist(), strict=True):
            filled, i = least[0]
            packs[i].append(image)
            heapreplace(least, (filled + tokens, i))
        return packs if all(filled <= limit or len(packs[i]) == 1 for filled, i in least) else None

    def sequence(self) -> NDArray[np.int64]:
        return np.arange(self.length)

    def deal(self, samples: NDArray[np.int64], world: dict[str, int], leg: int) -> Batches:
        """Deal packs to the steps and ranks of a world; up to ranks - 1 samples are left out if it is unavoidable."""
        ranks, limit = world["ranks"], world["pack_tokens"]
        packs = self._redraw(samples, ranks, limit, leg) if leg else self._packs(ranks, limit)
        # The cost of attention is the sum of squared lengths: packs of similar cost run in the same step.
        work = [int((self.tokens[pack] ** 2).sum()) for pack in packs]
        steps = np.argsort(work).reshape(-1, ranks)
        order = self._random(leg).permutation(len(steps))
        return [[packs[pack] for pack in steps[step]] for step in order]

    def _packs(self, ranks: int, limit: int) -> list[list[int]]:
        """Return the packs of a whole epoch."""
        ours = (ranks, limit) == (self.world_size, self.limit)
        count = self.steps * ranks if ours else self._count(ranks, limit)
        drawn = (self._draw(self.sequence(), limit, count, [self.epoch, draw]) for draw in itertools.count())
        return next(packs for packs in drawn if packs)

    def _redraw(self, images: NDArray[np.int64], ranks: int, limit: int, leg: int) -> list[list[int]]:
        """Return the packs of a leg with the images that earlier legs have left."""
        most = len(images) // ranks * ranks
        for count in [*self._counts(self.tokens[images], ranks, limit), most] if most else ():
            if packs := self._draw(images, limit, count, [self.epoch, 0, leg]):
                return packs
        # The images cannot be split evenly: one pack per image, without up to ranks - 1 images.
        return [[image] for image in self._random(leg).permutation(images)[:most].tolist()]

    def _random(self, leg: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *([0, leg] if leg else [])])
