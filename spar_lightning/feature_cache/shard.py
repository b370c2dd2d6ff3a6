"""One HDF5 shard: up to 64 augmented images and the teacher's features of each.

A shard is immutable. It is written whole under a private name, synced, read back and verified, and
only then linked to its final name, so a name in `shards/` always means a complete shard. HDF5 writes
it into memory and plain file operations bring it to disk, because HDF5 loses write errors: on a full
disk it was seen to report success. Ragged maps lie one behind the other in one flat dataset; every
sample carries its own CRC, because HDF5's checksums do not cover chunks that were never written.
"""

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spar_lightning.datasets.augmentation import Record
from spar_lightning.datasets.image_source import digest_array, key_array
from spar_lightning.errors import UserError
from spar_lightning.files.atomic import ACCESS_ERRORS, link, private_path, write
from spar_lightning.image.codec import decode_image

FORMAT: Final = 2  # 1 had no quarantine
TOKENS_PER_CHUNK: Final = 256
BYTES_PER_CHUNK: Final = 1 << 18
HEADER: Final = ("key", "hw", "aug", "crc", "digest", "tok_off", "img_off", "quarantine")  # read when a shard is opened


class CacheError(UserError):
    """A cache is damaged, incomplete, or belongs to another configuration."""


class Entry(NamedTuple):
    """A finished sample: lossless bytes of the image that the teacher saw, features (h, w, d), and how it was made.

    `digest` is that of the source image, as `Source` has it. `content` may be empty, and `features` the tokens
    (1, T, D) of cached activations.
    """

    key: str
    digest: str
    content: bytes
    features: NDArray[Any]
    record: Record


class Rejected(NamedTuple):
    """An image that cannot be used, with the digest of its bytes and the reason."""

    key: str
    digest: str
    reason: str


def write_shard(path: Path, made: Sequence[Entry | Rejected], fingerprint: str, private: Path) -> bool:
    """Publish a shard under `path`, unless one is there already; whether this call made it.

    Args:
        path: Final name; its folder exists.
        made: The planned images in order: samples, and what was rejected.
        fingerprint: Identity of the cache, repeated in every shard.
        private: Folder on the same file system for the unfinished file.

    Raises:
        OSError: The disk is full, among others.
        CacheError: What was written reads back as something else.
    """
    unfinished = private_path(private, path)
    buffer = io.BytesIO()
    _write(buffer, made, fingerprint)
    write(unfinished, buffer.getbuffer())
    with FeatureShard(unfinished, fingerprint) as shard:
        for row in range(len(shard.keys)):
            shard.check(row)
    return link(unfinished, path)


def _write(buffer: io.BytesIO, made: Sequence[Entry | Rejected], fingerprint: str) -> None:
    entries = [item for item in made if isinstance(item, Entry)]
    rejected = [item for item in made if isinstance(item, Rejected)]
    tokens = [entry.features.reshape(-1, entry.features.shape[-1]) for entry in entries]
    images = [np.frombuffer(entry.content, np.uint8) for entry in entries]
    hw = np.array([entry.features.shape[:2] for entry in entries], np.int32).reshape(-1, 2)
    records = np.array([entry.record for entry in entries], np.int32).reshape(-1, len(Record._fields))
    digests = digest_array(entry.digest for entry in entries)
    # libver v110: a half-written file is refused at opening instead of read as if it were whole.
    with h5py.File(buffer, "w", libver="v110") as file:
        _flat(file, "tok", tokens, TOKENS_PER_CHUNK)
        _flat(file, "img", images, BYTES_PER_CHUNK)
        file["key"] = key_array(entry.key for entry in entries)
        file["hw"], file["aug"], file["digest"] = hw, records, digests
        samples = zip(entries, tokens, images, hw, records, digests, strict=True)
        file["crc"] = np.array([_crc(entry.key, *parts) for entry, *parts in samples], np.uint32)
        file["quarantine"] = np.frombuffer(json.dumps(rejected).encode(), np.uint8)
        # Of fixed length, so that it lies where HDF5 has a checksum: a flipped bit elsewhere was seen to hang it.
        file.attrs["fingerprint"] = np.bytes_(fingerprint)
        header = [file[name][:] for name in HEADER]
        file.attrs.update(format=FORMAT, n=len(entries), header_crc=_crc("", *header), complete=1)


def _flat(file: h5py.File, name: str, parts: Sequence[NDArray[Any]], chunk: int) -> None:
    """Arrays (n_i, ..) one behind the other, with their offsets."""
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    file[f"{name}_off"] = offsets
    if not offsets[-1]:
        return
    shape = (int(offsets[-1]), *parts[0].shape[1:])
    chunks = (min(chunk, shape[0]), *shape[1:])
    dataset = file.create_dataset(name, shape, parts[0].dtype, chunks=chunks, fletcher32=True)
    for part, first in zip(parts, offsets.tolist(), strict=False):
        dataset[first : first + len(part)] = part


def _crc(key: str, *arrays: NDArray[Any]) -> int:
    """One checksum over everything that belongs to a sample."""
    value = zlib.crc32(key.encode())
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


class FeatureShard:
    """A published shard, open for reading.

    Args:
        path: The HDF5 file.
        fingerprint: Identity that the shard must carry.

    Raises:
        CacheError: The file is damaged or of another identity; the sentence names it.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        try:
            # No locking: published shards never change, and network file systems often cannot lock.
            self.file = h5py.File(path, "r", locking=False)
            attributes = dict(self.file.attrs)
            header = [self.file[name][:] for name in HEADER]
        except Exception as error:  # HDF5 finds a damaged file in many ways, with as many kinds of exception
            raise self._damaged(error) from error
        if attributes.get("fingerprint") != fingerprint.encode() or attributes.get("format") != FORMAT:
            raise CacheError(f"{path} belongs to another cache than the manifest beside it. {MEND}")
        if attributes.get("complete") != 1 or attributes.get("n") != len(header[0]):
            raise self._damaged("it is not complete")
        if attributes.get("header_crc") != _crc("", *header):
            raise self._damaged("the checksum of its header differs")
        keys, self.hw, self.records, self.crc, self.digests, self.tok_off, self.img_off, quarantine = header
        self.keys: list[str] = [key.decode() for key in keys]
        self.rejected = [Rejected(*item) for item in json.loads(quarantine.tobytes())]

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) uint8 and features (h, w, d) of one sample, checked against its CRC."""
        content, features = self.check(row)
        return decode_image(content), features

    def check(self, row: int) -> tuple[bytes, Tensor]:
        """Bytes of the image and features (h, w, d) of one sample, checked against its CRC."""
        features, content = self.features(row), self._part("img", self.img_off, row)
        facts = (self.hw[row], self.records[row], self.digests[row])
        if _crc(self.keys[row], features.numpy(), content, *facts) != self.crc[row]:
            raise self._damaged(f"sample {row}, {self.keys[row]}: its checksum differs")
        return content.tobytes(), features

    def features(self, row: int) -> Tensor:
        """Features (h, w, d) of one sample without its image, which the CRC covers too.

        HDF5's own checksums are compared: they cover all chunks but those never written, and before the shard was
        published it was read whole.
        """
        h, w = self.hw[row].tolist()
        features: Tensor = torch.from_numpy(self._part("tok", self.tok_off, row)).unflatten(0, (h, w))
        return features

    def record(self, row: int) -> Record:
        """How the image of one sample was augmented."""
        return Record(*self.records[row].tolist())

    def _part(self, name: str, offsets: NDArray[np.int64], row: int) -> NDArray[Any]:
        """What one sample has of a flat dataset; one that nothing was written to does not exist."""
        if offsets[row] == offsets[row + 1]:
            return np.empty(0, np.uint8)
        try:
            part: NDArray[Any] = self.file[name][offsets[row] : offsets[row + 1]]
        except Exception as error:  # as above
            raise self._damaged(error, f"sample {row}, {self.keys[row]}: ") from error
        return part

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> "FeatureShard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _damaged(self, what: object, where: str = "") -> CacheError:
        if isinstance(what, OSError) and what.errno in ACCESS_ERRORS:
            return CacheError(f"{self.path} cannot be read ({what.strerror}). Make it readable; it may be whole.")
        return CacheError(f"{self.path} is damaged: {where}{what}. {MEND}")


MEND: Final = "Delete that file; the next `spar cache` or `spar fit` builds it again."
