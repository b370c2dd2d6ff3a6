"""Overlay of a segmentation map on its image, with a legend of the classes that occur in it."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from spar_lightning.image.resize import at_most

LONGEST: Final = 2048  # maximum long side of the picture in pixels; larger images are downscaled
SHORTEST: Final = 256  # images with a smaller long side are enlarged by an integer factor
ENTRIES: Final = 40  # maximum number of classes in the legend, largest first
OPACITY: Final = 0.55
LINE: Final = 22  # height of a legend line in pixels
GAP: Final = 8


def overlay(
    image: NDArray[np.uint8], labels: NDArray[np.integer], classes: Sequence[str], colours: NDArray[np.uint8]
) -> Image.Image:
    """Draw the classes of an image in color, with a legend below.

    `image` (h, w, 3) is RGB, `labels` (H, W) are class indices, which may have a higher resolution, and `classes` (C)
    are names. Row c of `colours` (C or more, 3) is the RGB color of class c.
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    small = at_most(pixels, LONGEST).permute(1, 2, 0).numpy()  # first, because mixing takes floating-point numbers
    height, width = small.shape[:2]
    rows, columns = (_centers(given, shown) for given, shown in zip(labels.shape, (height, width), strict=True))
    tint = OPACITY * colours.astype(np.float32)
    mixed = np.float32(1 - OPACITY) * small + tint[labels[rows[:, None], columns]]
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    if max(width, height) < SHORTEST:
        factor = SHORTEST // max(width, height)
        picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    counts = sum(np.bincount(row, minlength=len(classes)) for row in labels)  # row by row: bincount makes int64 copies
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    entries = [(f"{number} {_printable(classes[number])}", colours[number]) for number in order[:ENTRIES].tolist()]
    if len(order) > ENTRIES:
        entries.append((f"and {len(order) - ENTRIES} more", np.full(3, 255, np.uint8)))
    return _with_legend(picture, entries)


def _centers(given: int, shown: int) -> NDArray[np.intp]:
    """Return the row or column of the image at the center of each row or column of a smaller picture (shown)."""
    return ((np.arange(shown) + 0.5) * given / shown).astype(np.intp)


def _printable(name: str) -> str:
    """Return a name without line breaks and other characters that have no glyph."""
    return "".join(character if character.isprintable() else " " for character in name)


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, NDArray[np.uint8]]]) -> Image.Image:
    """Add a legend below the picture: a swatch and a name for each entry, in as many columns as fit."""
    font = _font()
    cell = max(int(font.getlength(name)) for name, _ in entries) + LINE + 2 * GAP
    width = max(picture.width, cell + GAP)
    columns = max(1, (width - GAP) // cell)
    lines = -(-len(entries) // columns)
    sheet = Image.new("RGB", (width, picture.height + lines * LINE + 2 * GAP), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (name, colour) in enumerate(entries):
        x, y = GAP + i % columns * cell, picture.height + GAP + i // columns * LINE
        draw.rectangle((x, y + 3, x + LINE - 6, y + LINE - 5), fill=tuple(colour.tolist()))
        draw.text((x + LINE, y + 2), name, fill="black", font=font)
    return sheet


def _font() -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib includes: Latin, Greek, Cyrillic and more; other characters are boxes."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), 14)
