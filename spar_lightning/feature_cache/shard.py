"""Shard of a feature cache: one HDF5 file with up to 64 augmented images and the teacher's features of each.

Shards are immutable. A shard is written under a temporary name, synced, read back and verified, and then linked to its
final name. Every file in `shards/` is therefore complete. HDF5 writes to memory, and ordinary file operations write
the result to disk, because HDF5 can lose write errors (it reported success on a full disk). Feature maps of different
sizes are concatenated in one flat dataset. Every sample has its own CRC, because the checksums of HDF5 do not cover
chunks that were never written.
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
from spar_lightning.feature_cache.int8 import restored
from spar_lightning.files.atomic import ACCESS_ERRORS, publish
from spar_lightning.image.codec import decode_image

FORMAT: Final = 2  # version 1 did not list unusable images
TOKENS_PER_CHUNK: Final = 256
BYTES_PER_CHUNK: Final = 1 << 18
HEADER: Final = ("key", "hw", "aug", "crc", "digest", "tok_off", "img_off", "quarantine")  # read on opening


class CacheError(UserError):
    """Error raised if a cache is damaged, incomplete, or belongs to another configuration."""


class Entry(NamedTuple):
    """Finished sample of a shard.

    Attributes:
        key: Key of the image.
        digest: Digest of the source image, as in `Source`.
        content: Encoded image, exactly as the teacher processed it; empty for cached activations.
        features: Features (h, w, d) of the image; for cached activations, tokens (1, T, D).
        record: Augmentation of the image.
        ranges: For int8: smallest value and step of each channel (2, d), of which `features` has the codes.
    """

    key: str
    digest: str
    content: bytes
    features: NDArray[Any]
    record: Record
    ranges: NDArray[np.float32] | None = None


class Rejected(NamedTuple):
    """Unusable image, with the digest of its bytes and the reason."""

    key: str
    digest: str
    reason: str


def write_shard(path: Path, made: Sequence[Entry | Rejected], fingerprint: str, private: Path) -> bool:
    """Write a shard to `path` and return True; return False if `path` already exists.

    Args:
        path: Final path, in an existing folder.
        made: Samples and unusable images, in the order of the plan.
        fingerprint: Fingerprint of the cache, repeated in every shard.
        private: Folder for the unfinished file, on the same file system; created if necessary.

    Raises:
        OSError: The shard cannot be written, for example because the disk is full.
        CacheError: The verification of the written shard failed.
    """

    def verify(unfinished: Path) -> None:
        with FeatureShard(unfinished, fingerprint) as shard:
            for row in range(len(shard.keys)):
                shard.check(row)

    buffer = io.BytesIO()
    _write(buffer, made, fingerprint)
    return publish(path, buffer.getbuffer(), private, verify)


def _write(buffer: io.BytesIO, made: Sequence[Entry | Rejected], fingerprint: str) -> None:
    entries = [item for item in made if isinstance(item, Entry)]
    rejected = [item for item in made if isinstance(item, Rejected)]
    tokens = [entry.features.reshape(-1, entry.features.shape[-1]) for entry in entries]
    images = [np.frombuffer(entry.content, np.uint8) for entry in entries]
    hw = np.array([entry.features.shape[:2] for entry in entries], np.int32).reshape(-1, 2)
    records = np.array([entry.record for entry in entries], np.int32).reshape(-1, len(Record._fields))
    digests = digest_array(entry.digest for entry in entries)
    # With libver v110, opening a partially written file fails; older formats read it as if it were complete.
    with h5py.File(buffer, "w", libver="v110") as file:
        _flat(file, "tok", tokens, TOKENS_PER_CHUNK)
        _flat(file, "img", images, BYTES_PER_CHUNK)
        file["key"] = key_array(entry.key for entry in entries)
        file["hw"], file["aug"], file["digest"] = hw, records, digests
        parts: list[Any] = [tokens, images, hw, records, digests]
        if ranges := [entry.ranges for entry in entries if entry.ranges is not None]:
            stacked = np.stack(ranges)  # (n, 2, d)
            file.create_dataset("range", data=stacked, chunks=stacked.shape, fletcher32=True)
            parts.append(ranges)
        samples = zip(entries, *parts, strict=True)
        file["crc"] = np.array([_crc(entry.key, *parts) for entry, *parts in samples], np.uint32)
        file["quarantine"] = np.frombuffer(json.dumps(rejected).encode(), np.uint8)
        # A fixed-length string is stored where HDF5 has a checksum; a flipped bit elsewhere made HDF5 hang.
        file.attrs["fingerprint"] = np.bytes_(fingerprint)
        header = [file[name][:] for name in HEADER]
        file.attrs.update(format=FORMAT, n=len(entries), header_crc=_crc("", *header), complete=1)


def _flat(file: h5py.File, name: str, parts: Sequence[NDArray[Any]], chunk: int) -> None:
    """Write arrays (n_i, ..) concatenated, with their offsets."""
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
    """Return one checksum over all data of a sample."""
    value = zlib.crc32(key.encode())
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


class FeatureShard:
    """Published shard, open for reading.

    Args:
        path: Path of the HDF5 file.
        fingerprint: Fingerprint of the cache, which the shard must contain.

    Raises:
        CacheError: The file is damaged, unreadable, or belongs to another cache.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        try:
            # Published shards never change, and network file systems often do not support locks.
            self.file = h5py.File(path, "r", locking=False)
            attributes = dict(self.file.attrs)
            header = [self.file[name][:] for name in HEADER]
            self.ranges = self.file["range"][:] if "range" in self.file else None  # (n, 2, d) for int8
        except Exception as error:  # HDF5 raises many exception types for damaged files
            raise self._damaged(error) from error
        if attributes.get("fingerprint") != fingerprint.encode() or attributes.get("format") != FORMAT:
            raise CacheError(f"{path} belongs to a different cache than its manifest.json. {MEND}")
        if attributes.get("complete") != 1 or attributes.get("n") != len(header[0]):
            raise self._damaged("the shard is incomplete")
        if attributes.get("header_crc") != _crc("", *header):
            raise self._damaged("the header does not match its checksum")
        keys, self.hw, self.records, self.crc, self.digests, self.tok_off, self.img_off, quarantine = header
        self.keys: list[str] = [key.decode() for key in keys]
        self.rejected = [Rejected(*item) for item in json.loads(quarantine.tobytes())]

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return image (3, H, W) uint8 and features (h, w, d) of one sample, checked against its CRC."""
        content, features = self.check(row)
        return decode_image(content), features

    def check(self, row: int) -> tuple[bytes, Tensor]:
        """Return encoded image and features (h, w, d) of one sample, checked against its CRC."""
        stored, content = self._part("tok", self.tok_off, row), self._part("img", self.img_off, row)
        facts = (self.hw[row], self.records[row], self.digests[row])
        facts += () if self.ranges is None else (self.ranges[row],)
        if _crc(self.keys[row], stored, content, *facts) != self.crc[row]:
            raise self._damaged(f"sample {row}, {self.keys[row]}: the data does not match its checksum")
        return content.tobytes(), self._restored(stored, row)

    def image(self, row: int) -> Tensor:
        """Return the image (3, H, W) uint8 of one sample without reading its features; see `features`."""
        return decode_image(self._part("img", self.img_off, row).tobytes())

    def features(self, row: int) -> Tensor:
        """Return the features (h, w, d) of one sample without reading its image.

        The CRC covers the image too and is not checked here. The checksums of HDF5 are checked instead: they cover all
        chunks except chunks that were never written, and the whole shard was verified before it was published.
        """
        return self._restored(self._part("tok", self.tok_off, row), row)

    def _restored(self, stored: NDArray[Any], row: int) -> Tensor:
        """Return the features (h, w, d) of one sample from the stored values (h * w, d)."""
        h, w = self.hw[row].tolist()
        features: Tensor = torch.from_numpy(stored).unflatten(0, (h, w))
        return features if self.ranges is None else restored(features, torch.from_numpy(self.ranges[row]))

    def record(self, row: int) -> Record:
        """Return the augmentation of the image of one sample."""
        return Record(*self.records[row].tolist())

    def _part(self, name: str, offsets: NDArray[np.int64], row: int) -> NDArray[Any]:
        """Return the part of a flat dataset for one sample; the dataset does not exist if all parts are empty."""
        if offsets[row] == offsets[row + 1]:
            return np.empty(0, np.uint8)
        try:
            part: NDArray[Any] = self.file[name][offsets[row] : offsets[row + 1]]
        except Exception as error:  # many types, see __init__
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
            return CacheError(f"{self.path} cannot be read ({what.strerror}). Make it readable; it may be intact.")
        return CacheError(f"{self.path} is damaged: {where}{what}. {MEND}")


MEND: Final = "Delete this file; the command that built it (`spar cache`, `spar fit`, `spar index`) builds it again."
