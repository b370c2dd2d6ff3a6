"""Selection of training images by a list of keys and by a fraction."""

from pathlib import Path
from typing import Any

import numpy as np

from spar_lightning.datasets.image_source import key_array
from spar_lightning.datasets.image_table import Images, find
from spar_lightning.errors import UserError
from spar_lightning.files.hashing import hash_bytes


def select(images: Images, keys: str | list[str] | None, fraction: float | None) -> Images:
    """Select images by their keys, then a fraction of these.

    Args:
        images: Images to select from; their order is kept.
        keys: Keys, or the path of a text file with one key per line; None selects all images.
        fraction: Fraction above 0 and at most 1, chosen by a hash of the keys; None selects all images.

    Raises:
        UserError: If a key is not among the images, or the file of keys cannot be read.
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
        # utf-8-sig: some Windows editors write a byte order mark before the first key
        return [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.keys: {path} cannot be read ({error}). Set it to a text file with one key per line, or to a list."
        ) from error


def _places(images: Images, keys: list[str]) -> "np.ndarray[Any, Any]":
    """Return the indices of the keys, in the order of the images."""
    order = np.argsort(images.keys)
    wanted = key_array(dict.fromkeys(keys))
    if not len(wanted):
        raise UserError("data.keys is empty. Set it to keys such as sa_1, or omit it to use all images.")
    place = find(images.keys[order], wanted)
    if (place < 0).any():
        raise UserError(
            f"data.keys: {int((place < 0).sum())} of {len(wanted)} keys are not in data.shards "
            f"(first: {wanted[place < 0][0].decode()}). A key is a file name without suffix, such as sa_1."
        )
    return np.sort(order[place])
