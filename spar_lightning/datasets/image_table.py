"""A list of training images as columns: eleven million of them take a gigabyte, not ten.

Rows are in the order of the shards. The same columns are what a scan of one shard gives and what the
plan of a cache consists of; on disk they are an npz file, whose archive carries a checksum of each.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.image_source import ShardError, Source, digest_array, key_array
from spar_lightning.files.atomic import ACCESS_ERRORS

FIELDS = [
    ("location", "<i4"),  # number of the shard or folder
    ("offset", "<i8"),
    ("size", "<i8"),  # bytes
    ("height", "<i4"),  # pixels, by the image's header; 0 where that cannot be read
    ("width", "<i4"),
    ("digest", "<u8", (2,)),
]


@dataclass(frozen=True)
class Images:
    """Images in order.

    Args:
        locations: Shards and folders.
        rows: One row per image: key, name and `FIELDS`.
    """

    locations: tuple[str, ...]
    rows: NDArray[Any]

    @classmethod
    def collect(cls, sources: Sequence[Source], sizes: Sequence[tuple[int, int]]) -> "Images":
        """Columns of sources with the heights and widths of their images."""
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
        """No images."""
        return cls((), np.empty(0, [("key", "S1"), ("name", "S1"), *FIELDS]))

    @classmethod
    def concatenate(cls, parts: Sequence["Images"]) -> "Images":
        """Several lists behind one another; an image that comes twice stays at its first place.

        Raises:
            ShardError: A key stands for two different images.
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
                f"The key {b.key} stands for two different images, in {a.location} and in {b.location}. "
                "Keys are file names without suffix, inside a tar without folder; rename one of the two."
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
        """Keys in order."""
        keys: NDArray[np.bytes_] = self.rows["key"]
        return keys

    def take(self, indices: NDArray[Any] | slice) -> "Images":
        """The images at these places, in this order."""
        return Images(self.locations, self.rows[indices])


def to_bytes(images: Images, **columns: NDArray[Any]) -> bytes:
    """An npz archive of the list, and of further columns."""
    buffer = io.BytesIO()
    locations = np.frombuffer(json.dumps(images.locations).encode(), np.uint8)
    np.savez(buffer, allow_pickle=False, rows=images.rows, locations=locations, **columns)
    return buffer.getvalue()


def from_file(path: Path) -> tuple[Images, dict[str, NDArray[Any]]]:
    """The list and the further columns of an archive, checked against their checksums.

    Raises:
        ShardError: The file is damaged.
    """
    try:
        with np.load(path) as archive:
            columns = {name: archive[name] for name in archive.files}
        locations = tuple(json.loads(columns.pop("locations").tobytes()))
        return Images(locations, columns.pop("rows")), columns
    except Exception as error:  # a damaged archive fails in many ways
        if isinstance(error, OSError) and error.errno in ACCESS_ERRORS:
            raise ShardError(f"{path} cannot be read ({error.strerror}). Make it readable; it may be whole.") from error
        raise ShardError(f"{path} is damaged ({error}). Delete that file; the next start makes it again.") from error


def find(ordered: NDArray[np.bytes_], wanted: NDArray[np.bytes_]) -> NDArray[np.intp]:
    """Place of every wanted key among ascending keys, -1 where it is not there."""
    if not len(ordered):
        return np.full(len(wanted), -1, np.intp)
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[place] == wanted, place, -1)
