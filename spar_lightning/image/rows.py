"""Images that are read in bands of rows, so that an image of any size takes little memory.

libvips decodes large files row by row (extra `large`). Pillow decodes the whole image first. It is used for small
files, without libvips, and for the few kinds of pixels that libvips converts differently, such as CMYK.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from spar_lightning.files.home import expand_home
from spar_lightning.formatting import bytes_text
from spar_lightning.image.codec import (
    TURNS,
    ImageError,
    has_16_bits,
    open_image,
    orientation,
    warn_if_dark,
    warn_of_pages,
)
from spar_lightning.image.inputs import ImageLike, as_pixels
from spar_lightning.image.resize import BAND, bands_at_most

LARGE: Final = 2**25  # pixels; files with fewer are decoded by Pillow
FORMATS: Final = ("JPEG", "PNG", "TIFF", "WEBP")
EXTRA_SAMPLES: Final = 338  # TIFF tag
MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B", "I;16L")

log = logging.getLogger("spar_lightning")


@dataclass(frozen=True)
class ImageRows:
    """Image that is read from top to bottom, as often as needed.

    Attributes:
        size: Height H and width W in pixels.
        bands: Function that returns an iterator over consecutive rows (3, n, W) uint8.
    """

    size: tuple[int, int]
    bands: Callable[[], Iterator[Tensor]]

    @classmethod
    def of(cls, pixels: Tensor) -> "ImageRows":
        """Return an image (3, H, W) uint8 in memory as rows."""
        height, width = pixels.shape[-2:]
        return cls((height, width), lambda: (band.cpu() for band in pixels.split(max(1, BAND // width), dim=1)))

    def whole(self) -> Tensor:
        """Return the whole image (3, H, W)."""
        return torch.cat(list(self.bands()), dim=1)

    def at_most(self, side: int) -> Tensor:
        """Return the whole image (3, h, w), shrunk to a long side of at most `side` pixels."""
        return bands_at_most(self.bands(), self.size, side) if max(self.size) > side else self.whole()


def as_rows(image: ImageLike | ImageRows) -> ImageRows:
    """Return an image of any kind as rows; a large file is not decoded before its rows are read.

    Args:
        image: Path, PIL image, array or tensor (see `as_pixels`), or rows.

    Raises:
        ImageError: As for `as_pixels`; for a large file also while its rows are read.
    """
    if isinstance(image, ImageRows):
        return image
    path = Path(expand_home(image)) if isinstance(image, str | Path) else None
    streamed = _streamed(path) if path is not None and os.path.isfile(path) else None
    return streamed or ImageRows.of(as_pixels(image))


def _streamed(path: Path) -> ImageRows | None:
    """Return the rows of a large file, or None if Pillow has to decode it."""
    try:
        with path.open("rb") as file, open_image(file, limited=False) as image:
            width, height = image.size
            if width * height < LARGE or image.format not in FORMATS or image.mode not in MODES:
                return None
            if 1 in getattr(image, "tag_v2", {}).get(EXTRA_SAMPLES, ()):  # colors that are multiplied by alpha
                return None
            sixteen, turn = has_16_bits(image), orientation(image)
            if image.format != "TIFF" and TURNS[turn][1]:  # Pillow turns TIFF itself, also in the size
                width, height = height, width
            try:
                next(_decoded(path, (height, width), turn, sixteen))
            except (ImageError, ImportError, OSError) as error:  # such as an unknown compression
                advice = 'To decode it row by row, install libvips: pip install "spar-lightning[large]".'
                log.warning(
                    "%s is decoded as a whole, which takes %s. %s",
                    *(path, bytes_text(7 * width * height)),  # 4 bytes per pixel in Pillow, 3 in the tensor
                    error if isinstance(error, ImageError) else advice,
                )
                return None
            warn_of_pages(image, str(path))
    except MemoryError:
        raise
    except Exception:  # Pillow raises many types; as_pixels explains the error
        return None
    return ImageRows((height, width), lambda: _decoded(path, (height, width), turn, sixteen))


_warn_if_dark_once = cache(warn_if_dark)


def _decoded(path: Path, size: tuple[int, int], turn: int, sixteen: bool) -> Iterator[Tensor]:
    """Decode a file with libvips and yield bands of rows (3, n, W) uint8.

    Args:
        path: Path of the file.
        size: Expected height H and width W, after turning.
        turn: EXIF orientation.
        sixteen: Whether channels have 16 bits.
    """
    import pyvips

    logging.getLogger("pyvips").setLevel(logging.ERROR)  # one line for each damaged tile
    pyvips.cache_set_max(0)  # it would keep pixels of files that have changed, and temporary files
    try:
        # An image that has to be turned cannot be decoded in order: libvips then decodes it to a temporary file.
        access = "sequential" if turn == 1 else "random"
        image = pyvips.Image.new_from_file(str(path), access=access, fail_on="error")
        if turn != 1:
            image = image.copy()
            image.set_type(pyvips.GValue.gint_type, "orientation", turn)  # Pillow also finds it in XMP
            image = image.autorot()
        # Gray becomes RGB, and of 16 bits the higher ones remain. The first three bands are those without alpha.
        image = image.colourspace("srgb").extract_band(0, n=3)
        if (image.height, image.width) != size:
            raise ImageError(f"{path} cannot be read as an image: its size is damaged.")
        region, rows, highest = pyvips.Region.new(image), max(1, BAND // image.width), 0
        for top in range(0, image.height, rows):
            count = min(rows, image.height - top)
            values = np.frombuffer(bytearray(region.fetch(0, top, image.width, count)), np.uint8)
            band = torch.from_numpy(values).view(count, image.width, 3).permute(2, 0, 1)
            highest = max(highest, int(band.max())) if sixteen else highest
            yield band
    except pyvips.Error as error:
        reason = " ".join(str(error).split())
        raise ImageError(f"{path} cannot be read as an image: {reason}.") from error
    if sixteen:
        _warn_if_dark_once(highest, str(path))
