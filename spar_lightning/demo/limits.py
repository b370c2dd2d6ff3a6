"""Limits on what visitors of the page send: files and words. All violations are a `UserError` without a server path."""

import io
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from PIL import Image
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.image.codec import ImageError, decode_image
from spar_lightning.segmentation.prompts import parse_classes

MOST_BYTES: Final = 20 * 2**20  # of an image file
MOST_PIXELS: Final = 40_000_000
MOST_NAMES: Final = 100
LONGEST_NAME: Final = 100  # characters
SHOWN: Final = 1024  # px, long side of the pictures and of the segmentation maps
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # without those for which Pillow starts other programs


def read_upload(path: object, folder: Path) -> Tensor:
    """Return an uploaded image (3, H, W) uint8 with a long side of at most `SHOWN`.

    Args:
        path: Path of the file, as the visitor's browser or program sent it.
        folder: Folder of the uploads; files elsewhere are not read.
    """
    if path is None:
        raise UserError("The image is missing. Drop a file, or choose an example.")
    content = None
    try:
        file = os.path.realpath(path) if isinstance(path, str) else os.sep
        if Path(file).is_relative_to(os.path.realpath(folder)) and stat.S_ISREG(os.stat(file).st_mode):
            with open(file, "rb") as opened:
                content = opened.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # deleted after an hour; a null character
        raise UserError("The file is not on the server anymore. Drop it again.") from error
    if content is None:
        raise UserError("The file was not uploaded to this page. Drop it again.")
    if len(content) > MOST_BYTES:
        raise UserError(f"The file is too large. At most {MOST_BYTES // 2**20} MiB are allowed.")
    try:
        with warnings.catch_warnings(action="ignore"):
            width, height = Image.open(io.BytesIO(content), formats=FORMATS).size
        if width * height > MOST_PIXELS:
            raise Image.DecompressionBombError
        return decode_image(content, upright=True, max_side=SHOWN)
    except Image.DecompressionBombError as error:
        raise UserError(
            f"The image has too many pixels. At most {MOST_PIXELS // 10**6} million are allowed."
        ) from error
    except (ImageError, OSError, SyntaxError, ValueError) as error:  # Pillow raises several types
        reason = f": {error}" if isinstance(error, ImageError) else f". Allowed: {', '.join(FORMATS)}"
        raise UserError(f"The file cannot be read as an image{reason}.") from error


def read_classes(text: object) -> Mapping[str, tuple[str, ...]]:
    """Return the names of each class by its label."""
    if not isinstance(text, str) or len(text) > 2 * MOST_NAMES * LONGEST_NAME:
        raise UserError("The class names are too long.")
    classes = parse_classes(text)
    names = [*classes, *(name for found in classes.values() for name in found)]
    if sum(map(len, classes.values())) > MOST_NAMES:
        raise UserError(f"There are more than {MOST_NAMES} class names. Use fewer.")
    if max(map(len, names)) > LONGEST_NAME:
        raise UserError(f"A class name has more than {LONGEST_NAME} characters. Use a shorter one.")
    return classes
