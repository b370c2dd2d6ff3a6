"""Conversion between encoded images (bytes) and tensors (3, H, W) uint8."""

import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Final, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.image.resize import at_most, bands_at_most

T = TypeVar("T")
log = logging.getLogger("spar_lightning")

LONGEST_WEBP: Final = 16383  # pixels
LONGEST_JPEG: Final = 65500
LARGEST: Final = 2**29  # pixels; Pillow's own limit is a third of this, but large images are expected here
BAND: Final = 2**22  # pixels that are converted at once
DARK: Final = 2**14  # 16-bit images with only smaller values were probably recorded with fewer bits

# Flips and transpositions of (3, H, W) that turn an image upright, by EXIF orientation: (axes to flip, transpose).
TURNS: Final[dict[int, tuple[tuple[int, ...], bool]]] = {
    **{1: ((), False), 2: ((2,), False), 3: ((1, 2), False), 4: ((1,), False)},
    **{5: ((), True), 6: ((1,), True), 7: ((1, 2), True), 8: ((2,), True)},
}
TEXTS: Final = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")  # chunks of a PNG that can contain the orientation
_opening = threading.Lock()  # held while Pillow's limit, which is global, is lifted


class ImageError(UserError):
    """Error raised if bytes cannot be decoded completely as an image and converted to RGB."""


def encode_image(image: Tensor) -> bytes:
    """Encode an image (3, H, W) uint8 without loss.

    The format is WebP: a fifth smaller than PNG, and faster to write and read (measured on photographs). WebP is
    limited to 16383 pixels per side; larger images are encoded as PNG.
    """
    buffer = io.BytesIO()
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    if max(pixels.size) <= LONGEST_WEBP:
        pixels.save(buffer, "webp", lossless=True, quality=0, method=0)
    else:
        pixels.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def encode_jpeg(image: Tensor) -> bytes:
    """Encode an image (3, H, W) uint8 as JPEG of quality 94 with full color resolution.

    Photographs take a third of their lossless size, with a peak signal-to-noise ratio of 42 dB (measured). JPEG is
    limited to 65500 pixels per side; larger images are encoded without loss.
    """
    if max(image.shape) > LONGEST_JPEG:
        return encode_image(image)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "jpeg", quality=94, subsampling=0)
    return buffer.getvalue()


def decode_image(
    content: bytes | IO[bytes], upright: bool = False, name: str | None = None, max_side: int | None = None
) -> Tensor:
    """Decode an image of any format that Pillow reads to a tensor (3, H, W) uint8.

    Gray, palette, CMYK and 16-bit images are converted to RGB; alpha is dropped.

    Args:
        content: Bytes of the image file, or the file opened for reading.
        upright: Whether to apply the EXIF orientation; the published code ignores it.
        name: Name of the image in a warning if content is lost: pages and frames after the first, or 16-bit values
            that use only the lowest bits. None disables the warning.
        max_side: Maximum long side in pixels: a larger image is shrunk (see `resize.at_most`) while it is converted,
            which takes less memory than shrinking it afterwards. None sets no limit.

    Raises:
        ImageError: The bytes are damaged, the range of the pixel values is unknown (32-bit, floating point), or the
            image is larger than `LARGEST`.
    """
    try:
        return _any_text(lambda content: _decoded(content, upright, name, max_side), content)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow raises different exception types for each format
        raise ImageError(str(error) or type(error).__name__) from error


def _decoded(content: bytes | IO[bytes], upright: bool, name: str | None, max_side: int | None) -> Tensor:
    with open_image(content) as image:
        sixteen = has_16_bits(image)
        pixels = from_pillow(image, upright, max_side)
        if name is not None:
            warn_of_pages(image, name)
            if sixteen:
                warn_if_dark(int(pixels.max()), name)
        return pixels


@contextmanager
def open_image(content: bytes | IO[bytes], limited: bool = True) -> Iterator[Image.Image]:
    """Open an image with Pillow.

    Args:
        content: Bytes of the image file, or the file opened for reading.
        limited: Whether an image with more pixels than `LARGEST` raises an error.

    Raises:
        ImageError: The bytes are empty or in no known format, or the image is too large.
    """
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    file.seek(0)
    if not file.read(1):
        raise ImageError("the file is empty (0 bytes)")
    try:
        image = _open(file)
    except UnidentifiedImageError as error:
        raise ImageError("not an image in a known format, or damaged") from error
    with image:
        if limited and image.width * image.height > LARGEST:
            raise ImageError(
                f"the image has {image.width} x {image.height} pixels, but at most {LARGEST:,} are allowed; shrink or "
                "divide it"
            )
        yield image


def _open(file: IO[bytes]) -> Image.Image:
    """Open an image without Pillow's limit on its size, which is replaced by `LARGEST`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about damaged EXIF data, without the name of the file
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(file)
        except Image.DecompressionBombError:
            pass
    with _without_limit():
        return Image.open(file)


@contextmanager
def _without_limit() -> Iterator[None]:
    """Lift Pillow's limit on the size of images."""
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def frames(image: Image.Image) -> int:
    """Return the number of pages or frames of an image."""
    with _without_limit():  # Pillow checks the size of each page
        return int(getattr(image, "n_frames", 1)) if getattr(image, "is_animated", False) else 1


def _any_text(decode: Callable[[bytes | IO[bytes]], T], content: bytes | IO[bytes]) -> T:
    """Decode an image; if its texts or its color profile are too large for Pillow, decode it without them."""
    try:
        return decode(content)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
    if not isinstance(content, bytes):
        content.seek(0)
        content = content.read()
    return decode(_without_texts(content))


def _without_texts(png: bytes) -> bytes:
    """Return a PNG without its texts and its color profile."""
    kept, place = [png[:8]], 8
    while place < len(png):
        size = int.from_bytes(png[place : place + 4], "big") + 12  # with length, type and checksum
        if png[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(png[place : place + size])
        place += size
    return b"".join(kept)


def from_pillow(image: Image.Image, upright: bool, max_side: int | None = None) -> Tensor:
    """Convert a PIL image to a tensor (3, H, W) uint8; see `decode_image` for arguments and errors."""
    if not image.width or not image.height:
        raise ImageError("the image has no pixels")
    image.load()
    turn = orientation(image) if upright else 1
    # The sides of a transposed image are shrunk in the other order, after it was turned.
    if max_side is not None and max(image.size) > max_side and not TURNS[turn][1]:
        return turned(bands_at_most(_bands(image), (image.height, image.width), max_side), turn)
    pixels = torch.empty(3, image.height, image.width, dtype=torch.uint8)
    top = 0
    for band in _bands(image):  # one copy of the whole image is enough
        pixels[:, top : top + band.shape[1]] = band
        top += band.shape[1]
    pixels = turned(pixels, turn)
    return pixels if max_side is None else at_most(pixels, max_side)


def _bands(image: Image.Image) -> Iterator[Tensor]:
    """Yield an image as bands of rows (3, n, W) uint8."""
    rows = max(1, BAND // image.width)
    inverted = image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0  # 0 is white (TIFF)
    for top in range(0, image.height, rows):
        part = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels = torch.from_numpy(_rgb(part, image.format)).permute(2, 0, 1)
        yield 255 - pixels if inverted else pixels  # Pillow inverts images of 8 bits only


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8."""
    # For a PNG without EXIF data before its pixels, image.getexif() would decode all of them.
    exif = image.getexif() if _has_late_texts(image) else Image.Image.getexif(image)
    found = exif.get(ExifTags.Base.Orientation, 1)
    return found if found in TURNS else 1


def _has_late_texts(image: Image.Image) -> bool:
    """Return whether an open PNG has texts or EXIF data behind its pixels; False for other images."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None:
        return False
    start, place, behind = file.tell(), 8, False
    try:
        while True:
            file.seek(place)
            head = file.read(8)
            if len(head) < 8 or (behind and head[4:] in TEXTS):
                return len(head) == 8
            behind |= head[4:] == b"IDAT"
            place += int.from_bytes(head[:4], "big") + 12  # with length, type and checksum
    finally:
        file.seek(start)


def exif_orientation(content: bytes | IO[bytes]) -> int:
    """Return the EXIF orientation of an encoded image, 1 to 8; 1 if it cannot be read."""
    try:
        with open_image(content) as image:
            return orientation(image)
    except Exception:  # see decode_image
        return 1


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Turn an image (3, H, W) with an EXIF orientation from 1 to 8 upright."""
    flipped, transposed = TURNS[orientation]
    pixels = pixels.flip(flipped) if flipped else pixels
    return pixels.transpose(1, 2).contiguous() if transposed else pixels


def image_size(content: bytes | IO[bytes], upright: bool = False) -> tuple[int, int]:
    """Return height and width in pixels from the image header; (0, 0) if it cannot be read.

    Args:
        content: Bytes of the image file, or the file opened for reading.
        upright: Whether to apply the EXIF orientation.
    """
    try:
        return _any_text(lambda content: _size(content, upright), content)
    except MemoryError:
        raise
    except Exception:  # see decode_image
        return 0, 0


def _size(content: bytes | IO[bytes], upright: bool) -> tuple[int, int]:
    with open_image(content, limited=False) as image:
        size = (image.height, image.width)
        # Pillow turns TIFF itself, also in the size.
        return size[::-1] if upright and image.format != "TIFF" and TURNS[orientation(image)][1] else size


def _rgb(image: Image.Image, file_format: str | None) -> np.ndarray:
    """Return pixels (H, W, 3) uint8."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PPM"):  # PGM is scaled to 16 bits
        high = (np.array(image).astype(np.uint16) >> 8).astype(np.uint8)  # convert() would clip values to 255
        return np.stack([high] * 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ImageError(f"the range of pixels in mode {image.mode} is unknown")
    return np.array(image.convert("RGB"))


def has_16_bits(image: Image.Image) -> bool:
    """Return whether the channels of an image that is not loaded yet have 16 bits; Pillow forgets it afterwards."""
    return ";16" in str(getattr(image, "tile", ""))


def warn_of_pages(image: Image.Image, name: str) -> None:
    """Log a warning if an image has further pages or frames, other than previews and layers."""
    if image.format not in ("MPO", "PSD") and (count := frames(image)) > 1:
        log.warning(
            "%s: only the first of %d %s is used.", name, count, "pages" if image.format == "TIFF" else "frames"
        )


def warn_if_dark(highest: int, name: str) -> None:
    """Log a warning if the largest value of a 16-bit image, divided by 256, is so small that it is nearly black."""
    if highest < DARK >> 8:
        bits = 8 + highest.bit_length()
        log.warning(
            "%s: its 16-bit values are all below %d, so the image is nearly black. If it was recorded with %d bits, "
            "multiply its values by %d.",
            *(name, 2**bits, bits, 2 ** (16 - bits)),
        )
