"""Reading of a label map: the values that the file stores, without the conversions of Pillow."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spar_lightning.image.codec import exif_orientation, open_image, orientation

# JPEG and others change values when they are written. So does Pillow for GIF: it sorts the palette.
FORMATS: Final = ("PNG", "TIFF", "BMP", "PPM")
# Compressions of TIFF that keep the values.
EXACT: Final = ("raw", "packbits", "group3", "group4", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "zstd", "lzma")
FACTORS: Final = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies gray values of 2 and 4 bits


def read_label_file(path: Path) -> NDArray[np.generic]:
    """Return the values of a label map (H, W); those of a palette image are its indices.

    Raises:
        ValueError: The format, compression or orientation of the file does not keep the values.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file, open_image(file) as image:
        raw, *more = _raw_mode(image)
        if image.format not in FORMATS:
            raise ValueError(f"is a {image.format} file. Label maps must be PNG, TIFF, BMP or PGM files")
        if image.format == "TIFF" and image.info["compression"] not in EXACT:
            raise ValueError(f"is compressed with {image.info['compression']}, which changes values. Save it as PNG")
        if getattr(image, "is_animated", False):
            raise ValueError(f"has {getattr(image, 'n_frames', 'several')} pages or frames, but must have one")
        if orientation(image) != 1:
            raise ValueError(f"has the EXIF orientation {orientation(image)}. Turn its pixels and remove the entry")
        if raw.endswith("I") and raw != "I":
            raise ValueError("stores inverted values (0 is white). Save it as PNG")
        if image.format == "PPM" and more and more[0] not in (255, 65535):
            raise ValueError("has a maximum other than 255 and 65535. Save it as PNG")
        values = np.array(image)
        return values // FACTORS[raw] if raw in FACTORS else values


def _raw_mode(image: Image.Image) -> tuple[Any, ...]:
    """Return Pillow's name of the pixels in the file, such as L;4 for gray values of 4 bits, and format settings.

    They are not available after loading.
    """
    args = next((tile.args for tile in getattr(image, "tile", ())), "")
    return args if isinstance(args, tuple) else (args,)


def check_size(labels: tuple[int, ...], image: tuple[int, ...], path: Path) -> None:
    """Check the shape of a label map against the height and width of its image, which was turned upright.

    Raises:
        ValueError: The shapes differ.
    """
    if labels == image:
        return
    with path.open("rb") as file:
        turn = exif_orientation(file)
    if labels == image[::-1] and turn != 1:
        raise ValueError(
            f"has the size of {path} before that is turned upright (EXIF orientation {turn}). Label maps must be "
            "upright: turn the label map, or remove the orientation from the image"
        )
    raise ValueError(
        f"has shape {labels}, but its image {path} has size {image}. A label map must have one channel and the size of "
        "its image"
    )
