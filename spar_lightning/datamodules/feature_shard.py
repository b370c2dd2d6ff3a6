"""One HDF5 shard: 64 augmented images and the teacher's features of each.

A shard is immutable. It is written whole under a private name, synced, read back and verified, and
only then linked to its final name, so a name in `shards/` always means a complete shard. Ragged
maps lie one behind the other in one flat dataset; every sample carries its own CRC, because HDF5's
checksums do not cover chunks that were never written.
"""

import os
import socket
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spar_lightning.datamodules.augmentation import Record
from spar_lightning.datamodules.image import decode_image
from spar_lightning.errors import UserError

FORMAT = 1
TOKENS_PER_CHUNK = 256
BYTES_PER_CHUNK = 1 << 18


class CacheError(UserError):
    """A cache is damaged, incomplete, or belongs to another configuration."""


class Entry(NamedTuple):
    """A finished sample: PNG bytes of the image that the teacher saw, features (h, w, d), and how it was made."""

    key: str
    png: bytes
    features: NDArray[Any]
    record: Record


def write_shard(path: Path, entries: Sequence[Entry], fingerprint: str, private: Path) -> None:
    """Publish a shard under `path`, unless one is there already.

    Args:
        path: Final name; its folder exists.
        entries: The samples, in the order of the plan.
        fingerprint: Identity of the cache, repeated in every shard.
        private: Folder on the same file system for the unfinished file.
    """
    unfinished = private / f"{path.stem}.{socket.gethostname()}.{os.getpid()}.h5"
    unfinished.unlink(missing_ok=True)
    _write(unfinished, entries, fingerprint)
    _sync(unfinished)
    with FeatureShard(unfinished, fingerprint) as shard:
        for row in range(len(shard.keys)):
            shard.read(row)
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass  # another process published the same shard first: the same bytes by construction
    except OSError:  # no hard links here (some network file systems)
        os.replace(unfinished, path)
    unfinished.unlink(missing_ok=True)
    _sync(path.parent)


def _write(path: Path, entries: Sequence[Entry], fingerprint: str) -> None:
    tokens = [entry.features.reshape(-1, entry.features.shape[-1]) for entry in entries]
    images = [np.frombuffer(entry.png, np.uint8) for entry in entries]
    flat_tokens, flat_images = np.concatenate(tokens), np.concatenate(images)
    hw = np.array([entry.features.shape[:2] for entry in entries], np.int32)
    records = np.array([entry.record for entry in entries], np.int32)
    # libver v110: a half-written file is refused at opening instead of read as if it were whole.
    with h5py.File(path, "x", libver="v110") as file:
        token_chunk = (min(TOKENS_PER_CHUNK, len(flat_tokens)), flat_tokens.shape[1])
        file.create_dataset("tok", data=flat_tokens, chunks=token_chunk, fletcher32=True)
        image_chunk = (min(BYTES_PER_CHUNK, len(flat_images)),)
        file.create_dataset("img", data=flat_images, chunks=image_chunk, fletcher32=True)
        file["tok_off"] = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        file["img_off"] = np.cumsum([0, *map(len, images)], dtype=np.int64)
        file["key"] = np.array([entry.key.encode() for entry in entries])
        file["hw"], file["aug"] = hw, records
        file["crc"] = np.array(
            [_crc(e.key, *parts) for e, *parts in zip(entries, tokens, images, hw, records, strict=True)], np.uint32
        )
        file.attrs.update(format=FORMAT, fingerprint=fingerprint, n=len(entries), complete=1)


def _crc(key: str, *arrays: NDArray[Any]) -> int:
    """One checksum over everything that belongs to a sample."""
    value = zlib.crc32(key.encode())
    for array in arrays:
        value = zlib.crc32(array.tobytes(), value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
            self.keys = [key.decode() for key in self.file["key"][:]]
            self.hw, self.records, self.crc = (self.file[name][:] for name in ("hw", "aug", "crc"))
            self.tok_off, self.img_off = self.file["tok_off"][:], self.file["img_off"][:]
        except Exception as error:  # HDF5 finds a damaged file in many ways, with as many kinds of exception
            raise self._damaged(str(error)) from error
        if attributes.get("fingerprint") != fingerprint or attributes.get("format") != FORMAT:
            raise CacheError(f"{path} belongs to another cache than the manifest beside it. {_MEND}")
        if attributes.get("complete") != 1 or attributes.get("n") != len(self.keys):
            raise self._damaged("it is not complete")

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) uint8 and features (h, w, d) of one sample, checked against its CRC."""
        try:
            tokens = self.file["tok"][self.tok_off[row] : self.tok_off[row + 1]]
            png = self.file["img"][self.img_off[row] : self.img_off[row + 1]]
        except Exception as error:  # as above
            raise self._damaged(f"sample {row}, {self.keys[row]}: {error}") from error
        if _crc(self.keys[row], tokens, png, self.hw[row], self.records[row]) != self.crc[row]:
            raise self._damaged(f"sample {row}, {self.keys[row]}: its checksum differs")
        h, w = self.hw[row].tolist()
        return decode_image(png.tobytes()), torch.from_numpy(tokens).unflatten(0, (h, w))

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> "FeatureShard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _damaged(self, what: str) -> CacheError:
        return CacheError(f"{self.path} is damaged: {what}. {_MEND}")


_MEND = "Delete that file; the next `spar fit` builds it again."
