"""A part of the images: by a list of keys, and by a share that the keys alone decide."""

from pathlib import Path
from typing import Any

import numpy as np

from spar_lightning.datasets.image_source import key_array
from spar_lightning.datasets.image_table import Images, find
from spar_lightning.errors import UserError
from spar_lightning.files.hashing import hash_bytes


def select(images: Images, keys: str | list[str] | None, fraction: float | None) -> Images:
    """The images with these keys, and of those a share that their keys alone decide.

    Raises:
        UserError: A key is not among the images, or the file of keys cannot be read.
    """
    if keys is not None:
        images = images.take(_places(images, _read_keys(keys) if isinstance(keys, str) else keys))
    if fraction is not None:
        draws = [hash_bytes(key, 8) for key in images.keys.tolist()]
        count = max(1, round(fraction * len(images)))
        images = images.take(np.sort(np.argsort(np.frombuffer(b"".join(draws), "<u8"), kind="stable")[:count]))
    return images


def _read_keys(path: str) -> list[str]:
    try:
        # utf-8-sig: editors on Windows put a mark before the first key
        return [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.keys: {path} cannot be read ({error}). Give a text file with a key in each line, or a list."
        ) from error


def _places(images: Images, keys: list[str]) -> "np.ndarray[Any, Any]":
    """Places of the keys, in the order of the images."""
    order = np.argsort(images.keys)
    wanted = key_array(dict.fromkeys(keys))
    if not len(wanted):
        raise UserError("data.keys is empty. Give keys such as sa_1, or leave it out to take all images.")
    place = find(images.keys[order], wanted)
    if (place < 0).any():
        raise UserError(
            f"data.keys names {len(wanted)} images, of which {int((place < 0).sum())} are not in data.shards, the "
            f"first of them {wanted[place < 0][0].decode()}. A key is a file name without suffix, such as sa_1."
        )
    return np.sort(order[place])
