"""Random resize, crop and flip of an image, drawn once from the seed and the image's key.

The steps are RandomResize, then a crop or the whole image with sides rounded down to multiples of 16, then a
horizontal flip (paper, section 4.1 and supplement). The draw depends only on the seed and the image, never on workers,
ranks or order, and is stored next to the sample as a `Record`. The paper's text and its released configuration use
different sizes. The default is the released configuration, because the paper's storage and times match only that one.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spar_lightning.errors import UserError, check_at_least, nearest
from spar_lightning.files.hashing import hash_bytes
from spar_lightning.image.resize import rescaled, resize_image

ALGORITHM: Final = 1  # to be increased when the same settings, seed and key give different pixels
SMALLEST: Final = 8  # an image with a side below min_side / SMALLEST is rejected instead of enlarged
LARGE: Final = 2**26  # pixels; larger images are resized channel by channel: a float copy takes 12 bytes per pixel
LONGEST: Final = 16  # an image with a larger aspect ratio is rejected: enlarged to min_side, it could exhaust memory


class SizeError(ValueError):
    """Error for an image that is too small or has an extreme aspect ratio."""


class Record(NamedTuple):
    """Augmentation that was drawn for an image: resize to (height, width), crop, optional flip; all in pixels."""

    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int
    flip: bool


Preset = Literal["released", "text", "extended", "none", "small"]


class Settings(NamedTuple):
    """Settings of an augmentation without null values; see `Augmentation` for their meaning."""

    scale: tuple[int, int] | None = (2048, 1024)
    ratio_range: tuple[float, float] = (0.5, 1.0)
    min_side: int = 512
    multiple: int = 16
    crop_probability: float = 0.5
    crop_range: tuple[float, float] = (0.4, 1.0)
    flip_probability: float = 0.5


PRESETS: Final[dict[Preset, Settings]] = {
    "released": Settings(),
    "text": Settings(scale=(1 << 16, 2048), ratio_range=(0.25, 1.0)),  # short side 512 to 2048, long side unlimited
    "extended": Settings(scale=(2560, 2560), ratio_range=(0.2, 1.0)),  # long side 512 to 2560
    "none": Settings(scale=None, crop_probability=0.0, flip_probability=0.0),  # sides rounded down to multiples
    "small": Settings((224, 192), (0.7, 1.0), min_side=64, multiple=8, crop_probability=0.25),  # synthetic images
}


@dataclass(frozen=True)
class Augmentation:
    """Random resize, crop and flip of one image.

    Args:
        preset: Defaults of all augmentation options that are null: `released` (published configuration of the paper),
            `text` (text of the paper), `extended` (its extended variant), `none` (keep the size, no crop, no flip),
            `small` (for images of a few hundred pixels).
        scale: Maximum long side and short side of the resized image in pixels, before both are multiplied by the ratio;
            null uses the preset.
        ratio_range: Smallest and largest ratio by which `scale` is multiplied, drawn uniformly; null uses the preset.
        min_side: Minimum side of the result in pixels; smaller results are enlarged. null uses the preset, rounded up
            to a multiple of `multiple`.
        multiple: Sides of the result are rounded down to multiples of this number of pixels, which must be a multiple
            of the patch size; null uses the preset, or the patch size if the preset's number is not a multiple of it.
        crop_probability: Probability of a random crop instead of the whole image; null uses the preset.
        crop_range: Smallest and largest side of a crop as a fraction of the image's side, drawn independently for
            height and width; null uses the preset.
        flip_probability: Probability of a horizontal flip; null uses the preset.

    Raises:
        UserError: If the preset is unknown or a number is outside its range.
    """

    preset: Preset = "released"
    scale: tuple[int, int] | None = None
    ratio_range: tuple[float, float] | None = None
    min_side: int | None = None
    multiple: int | None = None
    crop_probability: float | None = None
    crop_range: tuple[float, float] | None = None
    flip_probability: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(
                f"augmentation: unknown preset {self.preset!r}. {nearest(self.preset, PRESETS)}Allowed: "
                f"{', '.join(PRESETS)}."
            )
        settings = self.settings
        check_at_least(1, multiple=settings.multiple, min_side=settings.min_side, scale=min(settings.scale or (1,)))
        for name, highest in (("ratio_range", math.inf), ("crop_range", 1.0)):
            low, high = getattr(settings, name)
            if not 0 < low <= high <= highest:
                raise UserError(
                    f"augmentation: {name} must be two numbers above 0, the smaller first"
                    f"{', and at most 1' if highest == 1 else ''}, but got {low} and {high}."
                )
        if settings.min_side % settings.multiple:
            raise UserError(
                f"augmentation: min_side must be divisible by multiple, but got min_side {settings.min_side} and "
                f"multiple {settings.multiple}."
            )

    @cached_property
    def settings(self) -> Settings:
        """Settings of the preset, overridden by the options that are not null."""
        given = {name: value for name in Settings._fields if (value := getattr(self, name)) is not None}
        settings = PRESETS[self.preset]._replace(**given)
        if self.min_side is None and settings.multiple > 0:
            settings = settings._replace(min_side=-(-settings.min_side // settings.multiple) * settings.multiple)
        return settings

    def for_patch(self, patch: int) -> "Augmentation":
        """Return an augmentation whose sides are multiples of a patch size.

        Raises:
            UserError: If `multiple` is given and is not a multiple of the patch size.
        """
        if self.settings.multiple % patch == 0:
            return self
        if self.multiple is not None:
            raise UserError(
                f"data.augmentation.multiple is {self.multiple}, but the backbone has patches of {patch} pixels. Set "
                f"it to a multiple of {patch}, or leave it out."
            )
        return replace(self, multiple=patch)

    def identity(self) -> dict[str, Any]:
        """Return the augmentation's part of the cache key: its settings, without the name of the preset."""
        return {"name": "Augmentation", "algorithm": ALGORITHM, **self.settings._asdict()}

    def draw(self, height: int, width: int, seed: int, key: str) -> Record:
        """Draw the augmentation of the image `key` of height x width pixels.

        Raises:
            SizeError: If the short side is below an eighth of `min_side` or a sixteenth of the long side.
        """
        settings = self.settings
        least = max(-(-settings.min_side // SMALLEST), -(-max(height, width) // LONGEST))
        if min(height, width) < least:
            raise SizeError(f"{height} x {width} pixels; the shorter side must have at least {least} pixels")
        digest = hash_bytes(f"{seed}/{key}".encode())
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        ratio = rng.uniform(*settings.ratio_range)
        if settings.scale is not None:
            height, width = rescaled(height, width, (int(settings.scale[0] * ratio), int(settings.scale[1] * ratio)))
        crop = rng.uniform() < settings.crop_probability
        shares = rng.uniform(size=4)  # always drawn, so that every image uses the same number of random values
        flip = bool(rng.uniform() < settings.flip_probability)

        if min(height, width) < settings.min_side:
            short = min(height, width)
            height, width = (self._floor(int(side * settings.min_side / short)) for side in (height, width))
            crop = False
        if not crop:
            height, width = self._floor(height), self._floor(width)
            return Record(height, width, 0, 0, height, width, flip)
        crop_height, crop_width = (
            self._floor(int(_integer(int(settings.crop_range[0] * side), int(settings.crop_range[1] * side), share)))
            for side, share in ((height, shares[0]), (width, shares[1]))
        )
        top, left = _integer(0, height - crop_height, shares[2]), _integer(0, width - crop_width, shares[3])
        return Record(height, width, top, left, crop_height, crop_width, flip)

    def _floor(self, side: int) -> int:
        return max(side, self.settings.min_side) // self.settings.multiple * self.settings.multiple

    def apply(self, image: Tensor, record: Record) -> Tensor:
        """Apply a drawn augmentation to an image (3, H, W) uint8.

        The image is resized bilinearly without antialiasing, as in the released code.
        """
        # Not for all images: on one thread, PyTorch rounds a single channel differently than three.
        channels = image.split(1) if image[0].numel() > LARGE else [image]
        pixels = torch.cat([resize_image(channel, (record.height, record.width)) for channel in channels])
        rows = slice(record.top, record.top + record.crop_height)
        columns = slice(record.left, record.left + record.crop_width)
        pixels = pixels[:, rows, columns]
        return pixels.flip(-1) if record.flip else pixels


def _integer(low: int, high: int, share: float) -> int:
    """Return a uniform integer from low to high (inclusive), computed from a uniform `share` in [0, 1)."""
    return low + int(share * (high - low + 1))
