"""Images as bytes and as tensors (3, H, W) uint8."""

import io
import warnings
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from spar_lightning.errors import UserError

LONGEST_WEBP: Final = 16383  # pixels


class ImageError(UserError):
    """The bytes are no image that can be read whole and shown in RGB."""


def encode_image(image: Tensor) -> bytes:
    """Lossless bytes of an image (3, H, W) uint8.

    WebP: a fifth smaller than PNG, and written and read in less time, measured on photographs. It ends at
    16383 pixels; longer images become PNG.
    """
    buffer = io.BytesIO()
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    if max(pixels.size) <= LONGEST_WEBP:
        pixels.save(buffer, "webp", lossless=True, quality=0, method=0)
    else:
        pixels.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def decode_image(content: bytes, upright: bool = False) -> Tensor:
    """Image (3, H, W) uint8 from the bytes of any format that Pillow reads.

    Grey, palette, CMYK and 16-bit images become RGB; alpha is dropped.

    Args:
        content: The file.
        upright: Turn the image as its EXIF orientation says; the published code ignores that.

    Raises:
        ImageError: The bytes are damaged, or their mode has no known range (32 bits, floating point).
    """
    if not content:
        raise ImageError("0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large images are what we are for
            with Image.open(io.BytesIO(content)) as image:
                return from_pillow(image, upright)
    except UnidentifiedImageError as error:
        raise ImageError("no image of a known format") from error
    except MemoryError:
        raise
    except Exception as error:  # every format has its own ways to fail
        raise ImageError(str(error) or type(error).__name__) from error


def from_pillow(image: Image.Image, upright: bool) -> Tensor:
    """Image (3, H, W) uint8 of one that Pillow has opened; arguments and errors as for `decode_image`."""
    if upright:
        image = ImageOps.exif_transpose(image)
    return torch.from_numpy(_rgb(image)).permute(2, 0, 1).contiguous()


def image_size(content: bytes) -> tuple[int, int]:
    """Height and width in pixels from the header alone, (0, 0) where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                return image.height, image.width
    except MemoryError:
        raise
    except Exception:  # as above
        return 0, 0


def _rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) uint8."""
    if image.mode.startswith("I;16"):  # Pillow would clip these to 255
        high = (np.array(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.stack([high] * 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ImageError(f"pixels of mode {image.mode} have no known range")
    return np.array(image.convert("RGB"))
