"""Resolution and aspect augmentation, once per image, seeded by the image's key.

RandomResize, then crop or whole image with sides floored to multiples of 16, then a flip (paper,
section 4.1 and supplement). What was drawn depends on the seed and the key alone, never on workers,
ranks or order, and is kept as a record beside the sample. The paper's text and its released
configuration give different sizes; its storage and times fit the released one alone, our default.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from torch import Tensor

from spar_lightning.errors import UserError, check_at_least, nearest
from spar_lightning.files.hashing import hash_bytes
from spar_lightning.image.resize import rescaled, resize_image

ALGORITHM: Final = 1  # raised by hand when the same settings, seed and key give other pixels
SMALLEST: Final = 8  # an image with a side below min_side / SMALLEST is not enlarged but rejected
LONGEST: Final = 16  # so is one that is so many times as long as wide: min_side pixels wide, it would fill the memory


class SizeError(ValueError):
    """An image is too small, or too long for its width."""


class Record(NamedTuple):
    """What was done to an image, in pixels: resized to (height, width), then cropped, then perhaps flipped."""

    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int
    flip: bool


Preset = Literal["released", "text", "extended", "none", "small"]


class Settings(NamedTuple):
    """Settings of an augmentation, all of them known; see `Augmentation`."""

    scale: tuple[int, int] | None = (2048, 1024)
    ratio_range: tuple[float, float] = (0.5, 1.0)
    min_side: int = 512
    multiple: int = 16
    crop_probability: float = 0.5
    crop_range: tuple[float, float] = (0.4, 1.0)
    flip_probability: float = 0.5


PRESETS: Final[dict[Preset, Settings]] = {
    "released": Settings(),
    "text": Settings(scale=(1 << 16, 2048), ratio_range=(0.25, 1.0)),  # short side 512 to 2048, long side free
    "extended": Settings(scale=(2560, 2560), ratio_range=(0.2, 1.0)),  # long side 512 to 2560
    "none": Settings(scale=None, crop_probability=0.0, flip_probability=0.0),  # sides floored to multiples
    "small": Settings((224, 192), (0.7, 1.0), min_side=64, multiple=8, crop_probability=0.25),  # rendered scenes
}


@dataclass(frozen=True)
class Augmentation:
    """Random size, crop and flip of one image.

    Args:
        preset: Values of all settings below that are null: `released` as the published configuration, `text` as the
            paper's text, `extended` as its extended variant, `none` keeps sizes, crops and flips nothing, `small` for
            images of a few hundred pixels.
        scale: Long and short bound of the resized image in pixels, before the ratio.
        ratio_range: The bounds are multiplied by a ratio drawn uniformly from this range.
        min_side: Smallest side of the result in pixels; images that come out smaller are enlarged.
        multiple: Both sides of the result are floored to multiples of this; the patch size must divide it.
        crop_probability: Probability of a crop instead of the whole image.
        crop_range: Side of a crop as a fraction of the image's side, drawn for each axis independently.
        flip_probability: Probability of a horizontal flip.

    Raises:
        UserError: The preset is unknown, or a number is outside its range.
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
                f"augmentation: there is no preset {self.preset!r}. {nearest(self.preset, PRESETS)}Allowed are "
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
                f"augmentation: min_side must be a multiple of multiple, but got {settings.min_side} and "
                f"{settings.multiple}."
            )

    @cached_property
    def settings(self) -> Settings:
        """The preset with the settings that are not null."""
        given = {name: value for name in Settings._fields if (value := getattr(self, name)) is not None}
        return PRESETS[self.preset]._replace(**given)

    def identity(self) -> dict[str, Any]:
        """Return what a cache records of the augmentation; the name of the preset is not part of it."""
        return {"name": "Augmentation", "algorithm": ALGORITHM, **self.settings._asdict()}

    def draw(self, height: int, width: int, seed: int, key: str) -> Record:
        """Decide what happens to the image `key` of height x width pixels.

        Raises:
            SizeError: A side is shorter than an eighth of `min_side`, or than a sixteenth of the other.
        """
        settings = self.settings
        least = max(-(-settings.min_side // SMALLEST), -(-max(height, width) // LONGEST))
        if min(height, width) < least:
            raise SizeError(f"{height} x {width} pixels; the shorter side must have at least {least}")
        digest = hash_bytes(f"{seed}/{key}".encode())
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        ratio = rng.uniform(*settings.ratio_range)
        if settings.scale is not None:
            height, width = rescaled(height, width, (int(settings.scale[0] * ratio), int(settings.scale[1] * ratio)))
        crop = rng.uniform() < settings.crop_probability
        shares = rng.uniform(size=4)  # drawn always, so that every image takes the same draws
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
        """Turn an image (3, H, W) uint8 into the recorded one, bilinear without antialias as the released code."""
        pixels = resize_image(image, (record.height, record.width))
        rows = slice(record.top, record.top + record.crop_height)
        columns = slice(record.left, record.left + record.crop_width)
        pixels = pixels[:, rows, columns]
        return pixels.flip(-1) if record.flip else pixels


def _integer(low: int, high: int, share: float) -> int:
    """Uniform integer in low..high, both included, from a uniform share in [0, 1)."""
    return low + int(share * (high - low + 1))
