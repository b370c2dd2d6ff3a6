"""Shard plan of a feature cache (folder plan/): the assignment of images to shards, which can only be extended.

The plan consists of parts 00000.npz, 00001.npz, .. Like the shards, parts are published atomically and never replaced.
Two builders therefore cannot assign the same shard number to different images.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.image_table import Images, find, from_file, to_bytes
from spar_lightning.files.atomic import publish

SAMPLES_PER_SHARD: Final = 64


class ShardPlan:
    """Shard plan of one feature cache.

    Args:
        folder: Folder of the parts of the plan.
        private: Folder for unfinished files, on the same file system.
        weigh: Function that returns the part of a shard that each image fills; None fills shards with any 64 images.
    """

    def __init__(self, folder: Path, private: Path, weigh: Callable[[Images], NDArray[Any]] | None = None) -> None:
        self.folder, self.private, self.weigh = folder, private, weigh

    def read(self) -> tuple[NDArray[Any], NDArray[np.int32], int]:
        """Return rows of all planned images, their shard numbers (ascending), and the number of the next part."""
        parts = {int(path.stem): path for path in self.folder.iterdir() if re.fullmatch(r"\d+\.npz", path.name)}
        rows, numbers = [Images.empty().rows], [np.empty(0, np.int32)]
        for number in sorted(parts):
            images, columns = from_file(parts[number])
            rows.append(images.rows)
            numbers.append(columns["shard"])
        return np.concatenate(rows), np.concatenate(numbers), max(parts, default=-1) + 1

    def extend(self, todo: Images, published: NDArray[np.int32]) -> dict[str, Images]:
        """Return the shards to build for images without features, as a mapping from file name to images.

        A planned shard is used if all of its images are in `todo`. Images of other planned shards are planned again,
        because the rest of such a shard may never be needed.

        Args:
            todo: Images without features.
            published: Numbers of the published shards.
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
                # Use the rows of `todo`, not of the plan: a tar file may have moved since then.
                return {name: todo.take(rows) for name, rows in zip(names, np.split(chosen, cuts), strict=True)}
            first = int(np.concatenate([numbers, published]).max(initial=-1)) + 1
            column = first + self._groups(todo.take(rest))
            # If another builder publishes this part first, the name is taken and the loop reads the plan again.
            content = to_bytes(todo.take(rest), shard=column)
            publish(self.folder / f"{part:05d}.npz", content, self.private)

    def _groups(self, images: Images) -> NDArray[np.int32]:
        """Return the number of the shard of each image, from 0: up to 64 consecutive images that it has room for."""
        if self.weigh is None:
            return (np.arange(len(images)) // SAMPLES_PER_SHARD).astype(np.int32)
        numbers, number, count, filled = [], 0, 0, 0.0
        for weight in self.weigh(images).tolist():
            if count == SAMPLES_PER_SHARD or (count and filled + weight > 1):
                number, count, filled = number + 1, 0, 0.0
            numbers.append(number)
            count, filled = count + 1, filled + weight
        return np.array(numbers, np.int32)
