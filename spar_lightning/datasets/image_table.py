"""Table of training images, stored by column: eleven million images take about 1 GB instead of 10 GB.

Rows are in the order of the shards. The index of a shard and the plan of a cache use the same columns. On disk, the
table is an npz file, which contains a checksum of each column.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.image_source import Source, digest_array, key_array
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.files.atomic import ACCESS_ERRORS

FIELDS = [
    ("location", "<i4"),  # index into `Images.locations`
    ("offset", "<i8"),
    ("size", "<i8"),  # bytes
    ("height", "<i4"),  # pixels, from the image header; 0 if it cannot be read
    ("width", "<i4"),
    ("digest", "<u8", (2,)),
]


@dataclass(frozen=True)
class Images:
    """Ordered table of images.

    Args:
        locations: Shards and image folders.
        rows: Structured array with one row per image: key, name and `FIELDS`.
    """

    locations: tuple[str, ...]
    rows: NDArray[Any]

    @classmethod
    def collect(cls, sources: Sequence[Source], sizes: Sequence[tuple[int, int]]) -> "Images":
        """Build a table from sources and the (height, width) of their images."""
        locations = {location: i for i, location in enumerate(dict.fromkeys(s.location for s in sources))}
        keys, names = key_array(s.key for s in sources), key_array(s.name for s in sources)
        rows = np.empty(len(sources), [("key", keys.dtype), ("name", names.dtype), *FIELDS])
        rows["key"], rows["name"] = keys, names
        rows["location"] = [locations[s.location] for s in sources]
        rows["offset"], rows["size"] = [s.offset for s in sources], [s.size for s in sources]
        rows["height"], rows["width"] = np.array(sizes, np.int32).reshape(-1, 2).T
        rows["digest"] = digest_array(s.digest for s in sources)
        return cls(tuple(locations), rows)

    @classmethod
    def empty(cls) -> "Images":
        """Return a table without images."""
        return cls((), np.empty(0, [("key", "S1"), ("name", "S1"), *FIELDS]))

    @classmethod
    def concatenate(cls, parts: Sequence["Images"]) -> "Images":
        """Concatenate tables; an image that occurs several times is kept at its first position.

        Raises:
            ShardError: If two different images have the same key.
        """
        locations = {name: i for i, name in enumerate(dict.fromkeys(name for part in parts for name in part.locations))}
        moved = []
        for part in parts:
            rows = part.rows.copy()
            rows["location"] = np.array([locations[name] for name in part.locations], np.int32)[rows["location"]]
            moved.append(rows)
        together = cls(tuple(locations), np.concatenate(moved))
        keys, first, number = np.unique(together.rows["key"], return_index=True, return_inverse=True)
        if len(keys) == len(together):
            return together
        other = (together.rows["digest"] != together.rows["digest"][first[number]]).any(axis=1)
        if other.any():
            i = int(other.argmax())
            a, b = together[int(first[number[i]])], together[i]
            raise ShardError(
                f"The key {b.key} is used by two different images, in {a.location} and in {b.location}. "
                "Keys are file names without suffix (in a tar also without folder). Rename one of the two images."
            )
        return together.take(np.sort(first))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Source:
        row = self.rows[index]
        return Source(
            key=row["key"].decode(),
            location=self.locations[row["location"]],
            name=row["name"].decode(),
            offset=int(row["offset"]),
            size=int(row["size"]),
            digest=row["digest"].tobytes().hex(),
        )

    @property
    def keys(self) -> NDArray[np.bytes_]:
        """Keys of the images, in the order of the rows."""
        keys: NDArray[np.bytes_] = self.rows["key"]
        return keys

    def take(self, indices: NDArray[Any] | slice) -> "Images":
        """Return the images at these indices, in this order."""
        return Images(self.locations, self.rows[indices])


def to_bytes(images: Images, **columns: NDArray[Any]) -> bytes:
    """Serialize a table and additional columns as an npz archive."""
    buffer = io.BytesIO()
    locations = np.frombuffer(json.dumps(images.locations).encode(), np.uint8)
    np.savez(buffer, allow_pickle=False, rows=images.rows, locations=locations, **columns)
    return buffer.getvalue()


def from_file(path: Path) -> tuple[Images, dict[str, NDArray[Any]]]:
    """Load a table and its additional columns from an npz archive and verify their checksums.

    Raises:
        ShardError: If the file is damaged or cannot be read.
    """
    try:
        with np.load(path) as archive:
            columns = {name: archive[name] for name in archive.files}
        locations = tuple(json.loads(columns.pop("locations").tobytes()))
        return Images(locations, columns.pop("rows")), columns
    except Exception as error:  # a damaged archive fails in many ways
        if isinstance(error, OSError) and error.errno in ACCESS_ERRORS:
            raise ShardError(
                f"{path} cannot be read ({error.strerror}). Make it readable; it may be intact."
            ) from error
        raise ShardError(f"{path} is damaged ({error}). Delete that file; the next start recreates it.") from error


def find(ordered: NDArray[np.bytes_], wanted: NDArray[np.bytes_]) -> NDArray[np.intp]:
    """Return the index of each wanted key in an ascending array, -1 if it is not found."""
    if not len(ordered):
        return np.full(len(wanted), -1, np.intp)
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[place] == wanted, place, -1)
