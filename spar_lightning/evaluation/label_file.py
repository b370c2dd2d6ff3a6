"""Reading of a label map: the values that the file stores, without the conversions of Pillow."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spar_lightning.image.codec import ImageError, exif_orientation, frames, open_image, orientation

# JPEG and others change values when they are written. So does Pillow for GIF: it sorts the palette.
FORMATS: Final = ("PNG", "TIFF", "BMP", "PPM")
# Compressions of TIFF that keep the values.
EXACT: Final = ("raw", "packbits", "group3", "group4", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "zstd", "lzma")
FACTORS: Final = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies gray values of 2 and 4 bits


def read_label_file(path: Path, colors: bool = False) -> NDArray[np.generic]:
    """Return the values of a label map (H, W); those of a palette image are its indices.

    Args:
        path: Path of the label map.
        colors: If true, return the colors of an RGB or palette image (H, W, 3) instead.

    Raises:
        ValueError: The format, compression or orientation of the file does not keep the values.
        ImageError: The file is damaged.
        OSError: The file cannot be read.
    """
    try:
        with path.open("rb") as file, open_image(file) as image:
            return _values(image, colors)
    except (MemoryError, OSError, ValueError):
        raise
    except Exception as error:  # Pillow raises different exception types for each format
        raise ImageError(str(error) or type(error).__name__) from error


def _values(image: Image.Image, colors: bool) -> NDArray[np.generic]:
    """Return the values of an opened label map; see `read_label_file` for errors."""
    raw, *more = _raw_mode(image)
    if image.format not in FORMATS:
        raise ValueError(f"is a {image.format} file. Label maps must be PNG, TIFF, BMP or PGM files")
    if image.format == "TIFF" and image.info["compression"] not in EXACT:
        raise ValueError(f"is compressed with {image.info['compression']}, which changes values. Save it as PNG")
    if (count := frames(image)) > 1:
        raise ValueError(f"has {count} pages or frames, but must have one")
    if orientation(image) != 1:
        raise ValueError(f"has the EXIF orientation {orientation(image)}. Turn its pixels and remove the entry")
    if "I" in raw.partition(";")[2] or getattr(image, "tag_v2", {}).get(262) == 0:  # also L;4IR, and TIFF of 16 bits
        raise ValueError("stores inverted values (0 is white). Save it as PNG")
    if image.format == "PPM" and more and more[0] not in (255, 65535):
        raise ValueError("has a maximum other than 255 and 65535. Save it as PNG")
    if colors:
        if image.mode not in ("RGB", "RGBA", "P"):
            raise ValueError(f"has pixels of type {image.mode}, but `colors` needs RGB. Use label_map for other values")
        if "16" in raw:
            raise ValueError("has 16 bits per color. Save it with 8 bits")
        return np.array(image.convert("RGB"))
    values = np.array(image)
    factor = FACTORS.get(raw.removesuffix("R"))  # R: the bits of each byte are in reverse order
    return values // factor if factor else values


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
        f"has shape {labels}, but its image {path} has size {image}. A label map must have the size of its image, "
        "and one channel unless `colors` in the YAML file says what its colors mean"
    )
