"""Selection of training images by a list of keys and by a fraction."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    place[place < 0] = _same_text(images.keys[order], wanted[place < 0])
    if (place < 0).any():
        first = wanted[place < 0][0].decode(errors="backslashreplace")
        raise UserError(
            f"data.keys: {int((place < 0).sum())} of {len(wanted)} keys are not in data.shards (first: {first}). "
            "A key is a file name without suffix, such as sa_1."
        )
    return np.unique(order[place])  # two keys may be the same text


def _same_text(keys: NDArray[np.bytes_], wanted: NDArray[np.bytes_]) -> list[int]:
    """Return the index of the only key that is the same text as each wanted key, -1 if it is not found.

    macOS stores letters with accents as two characters in file names; editors write them as one.

    Raises:
        UserError: Two keys are the same text as a wanted one, and neither consists of the same bytes.
    """
    texts = [unicodedata.normalize("NFC", key.decode(errors="surrogateescape")) for key in wanted.tolist()]
    places: dict[str, list[int]] = {text: [] for text in texts if not text.isascii()}
    if places:
        width = keys.dtype.itemsize
        others = (np.ascontiguousarray(keys).view(np.uint8).reshape(-1, width) > 127).any(axis=1)  # not ASCII
        for i in np.flatnonzero(others).tolist():
            text = unicodedata.normalize("NFC", keys[i].decode())
            if text in places:
                places[text].append(i)
    for text, found in places.items():
        if len(found) > 1:
            raise UserError(
                f"data.keys: {text!r} is the same text as {len(found)} keys in different Unicode forms "
                f"({', '.join(ascii(keys[i].decode()) for i in found)}). Write the key in the form of the file name."
            )
    return [(places.get(text) or [-1])[0] for text in texts]
