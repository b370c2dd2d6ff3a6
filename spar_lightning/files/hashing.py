"""Content hashes. The formats must not change: caches, checkpoints and results on disk are identified by them."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def hash_bytes(content: bytes, size: int = 16) -> bytes:
    """Return the BLAKE2b hash of some bytes, `size` bytes long."""
    return hashlib.blake2b(content, digest_size=size).digest()


def hash_stream(file: IO[bytes]) -> bytes:
    """Return the BLAKE2b hash of the rest of an open file, like `hash_bytes`, without reading it as a whole."""
    digest = hashlib.blake2b(digest_size=16)
    while content := file.read(1 << 20):
        digest.update(content)
    return digest.digest()


def sha256(content: bytes, digits: int = 64) -> str:
    """Return the first hexadecimal digits of the SHA-256 hash of some bytes."""
    return hashlib.sha256(content).hexdigest()[:digits]


def hash_json(content: Any, digits: int = 64) -> str:
    """Return the first hexadecimal digits of the SHA-256 hash of data as JSON with sorted keys."""
    return sha256(json.dumps(content, sort_keys=True).encode(), digits)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 hash of the names, dtypes, shapes and values of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 hash of a file; cached in the process by path, size and modification time."""
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns)


@cache
def _hash_file(path: Path, size: int, time: int) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
