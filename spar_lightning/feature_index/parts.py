"""Parts of large images: consecutive rows of patches, each computed and stored on its own.

The features of a large image do not fit into memory. With `block_size` they are computed from top to bottom, and every
part is an entry of the index: NAME#FIRST-LAST:ROWS:DIGEST, in rows of patches, with the start of the digest of the
image. No image has such a name, because names in an index end with the suffix of an image.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from torch import Tensor

from spar_lightning.datasets.image_source import key_array
from spar_lightning.datasets.image_table import Images

PART: Final = 2**27  # bytes of stored features, per part and per shard


class Part(NamedTuple):
    """Rows of patches `first` to `last - 1` of the image `name` with this digest, whose grid has `rows` rows."""

    name: str
    first: int
    last: int
    rows: int
    digest: str


def part_of(key: str) -> Part | None:
    """Return the part with this key, or None if the key is the name of a whole image."""
    found = re.fullmatch(r"(.*)#(\d+)-(\d+):(\d+):([0-9a-f]{8})", key, re.DOTALL)
    return Part(found[1], int(found[2]), int(found[3]), int(found[4]), found[5]) if found else None


def image_of(key: str) -> str:
    """Return the name of the image that a key belongs to."""
    part = part_of(key)
    return key if part is None else part.name


def divided(images: Images, large: Mapping[int, tuple[int, int]]) -> Images:
    """Replace large images by their parts.

    Args:
        images: Images of an index.
        large: For the index of each large image: rows of patches, and maximum number of rows per part.
    """
    keys: list[str] = []
    taken: list[int] = []
    for i, key in enumerate(images.keys.tolist()):
        if i not in large:
            keys.append(key.decode())
            taken.append(i)
            continue
        rows, most = large[i]
        bounds = np.linspace(0, rows, -(-rows // most) + 1).round().astype(int).tolist()
        end = f"{rows}:{images[i].digest[:8]}"
        keys += [f"{key.decode()}#{first}-{last}:{end}" for first, last in pairwise(bounds)]
        taken += [i] * (len(bounds) - 1)
    table, column = images.rows[taken], key_array(keys)
    types = [("key", column.dtype), *(item for item in table.dtype.descr if item[0] != "key")]
    rows_of_parts = np.empty(len(table), types)
    for name in table.dtype.names or ():
        rows_of_parts[name] = column if name == "key" else table[name]
    return Images(images.locations, rows_of_parts)


def complete(keys: Sequence[str]) -> dict[str, list[int]]:
    """Return the indices of the keys of each image of which all parts are there, from top to bottom."""
    found: dict[tuple[str, int, str], list[tuple[int, int, int]]] = {}
    for i, key in enumerate(keys):
        part = part_of(key) or Part(key, 0, 1, 1, "")
        found.setdefault((part.name, part.rows, part.digest), []).append((part.first, part.last, i))
    whole = {}
    for (name, rows, _), parts in found.items():
        parts.sort()
        ends = [0, *(last for _, last, _ in parts)]
        if ends[:-1] == [first for first, _, _ in parts] and ends[-1] == rows:
            whole[name] = [i for _, _, i in parts]
    return whole


class PartialFeatures:
    """Features of one image from top to bottom. If parts are read in order, each row of blocks is computed only once.

    Args:
        compute: Function from the first row of patches to an iterator over rows of features (n, w, d) from there.
    """

    def __init__(self, compute: Callable[[int], Iterator[Tensor]]) -> None:
        self._compute = compute
        self._rows: Iterator[Tensor] = iter(())
        self._next: int | None = None  # row of patches that `_rows` yields next, after `_rest`
        self._rest: list[Tensor] = []

    def read(self, first: int, last: int) -> Tensor:
        """Return the rows `first` to `last - 1` (n, w, d)."""
        if first != self._next:
            self._rows, self._rest = self._compute(first), []
        self._next = None  # after an error, start again
        features: Tensor | None = None
        done = 0
        while done < last - first:
            rows = self._rest.pop() if self._rest else next(self._rows)
            if features is None:
                features = rows.new_empty(last - first, *rows.shape[1:])
            count = min(len(rows), last - first - done)
            features[done : done + count] = rows[:count]
            if count < len(rows):
                self._rest = [rows[count:]]
            done += count
        assert features is not None
        self._next = last
        return features
