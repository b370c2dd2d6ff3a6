"""plan/: which images belong to which shard of a cache, only ever added to.

00000.npz, 00001.npz, .. are published whole, as the shards are, so two builders cannot give one number to
different shards without either noticing.
"""

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.image_table import Images, find, from_file, to_bytes
from spar_lightning.files.atomic import publish

SAMPLES_PER_SHARD: Final = 64


class ShardPlan:
    """The plan of one cache.

    Args:
        folder: Where its parts lie.
        private: Folder on the same file system for unfinished files.
    """

    def __init__(self, folder: Path, private: Path) -> None:
        self.folder, self.private = folder, private

    def read(self) -> tuple[NDArray[Any], NDArray[np.int32], int]:
        """Rows of all planned images, the number of the shard of each, ascending, and the number of the next part."""
        parts = {int(path.stem): path for path in self.folder.iterdir() if re.fullmatch(r"\d+\.npz", path.name)}
        rows, numbers = [Images.empty().rows], [np.empty(0, np.int32)]
        for number in sorted(parts):
            images, columns = from_file(parts[number])
            rows.append(images.rows)
            numbers.append(columns["shard"])
        return np.concatenate(rows), np.concatenate(numbers), max(parts, default=-1) + 1

    def extend(self, todo: Images, published: NDArray[np.int32]) -> dict[str, Images]:
        """Shards to make, by file name, for images that have no features.

        Planned shards are taken up where all of their images are asked for; images of others are planned anew,
        because nobody may ask for the rest of those ever again.

        Args:
            todo: The images.
            published: Numbers of the shards that are there.
        """
        while True:
            plan, numbers, part = self.read()
            order = np.argsort(todo.keys)
            place = find(todo.keys[order], plan["key"])
            asked = place >= 0
            asked[asked] = (todo.rows["digest"][order][place[asked]] == plan["digest"][asked]).all(axis=1)
            usable = asked & ~np.isin(numbers, np.concatenate([numbers[~asked], published]))
            chosen, numbers_chosen = order[place[usable]], numbers[usable]
            rest = np.setdiff1d(np.arange(len(todo)), chosen)
            if not len(rest):
                cuts = np.flatnonzero(np.diff(numbers_chosen)) + 1
                names = [f"{int(number):05d}.h5" for number in numbers_chosen[np.append(0, cuts)]]
                # The rows of `todo`, not of the plan: a tar may have moved since it was planned.
                return {name: todo.take(rows) for name, rows in zip(names, np.split(chosen, cuts), strict=True)}
            first = int(np.concatenate([numbers, published]).max(initial=-1)) + 1
            column = (first + np.arange(len(rest)) // SAMPLES_PER_SHARD).astype(np.int32)
            # The number follows those that were read: whoever is second finds it taken, and reads the plan again.
            content = to_bytes(todo.take(rest), shard=column)
            publish(self.folder / f"{part:05d}.npz", content, self.private)
