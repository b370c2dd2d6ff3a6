"""Image file with known pixels."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RGB = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """Content of an image file and the pixels that it shows.

    Attributes:
        content: Bytes of the file.
        pixels: Pixels (H, W, 3); None if their range is not known, so that only an error is right.
        most: Largest difference per value that the encoding justifies.
        mean: Largest mean difference; 0 does not limit it.
        lost: Whether the file holds more than one image, or is so dark that a message is due.
    """

    content: bytes
    pixels: RGB | None
    most: int = 0
    mean: float = 0.0
    lost: bool = False


Writer = Callable[[RGB], Picture]


def scene(height: int, width: int, seed: int = 0) -> RGB:
    """Return smooth pixels (H, W, 3) with all kinds of values."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def stacked(channel: NDArray[Any]) -> RGB:
    """Return a gray image (H, W) as (H, W, 3)."""
    return np.repeat(channel.astype(np.uint8)[..., None], 3, axis=-1)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return a file written by Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, name: str, picture: Picture) -> Path:
    """Write the content of a picture into a file and return its path."""
    path = folder / name
    path.write_bytes(picture.content)
    return path
