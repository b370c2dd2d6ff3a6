"""Resolution and aspect augmentation, once per image, seeded by the image's key.

RandomResize, then crop or whole image with sides floored to multiples of 16, then a flip (paper,
section 4.1 and supplement). What was drawn depends on the seed and the key alone, never on workers,
ranks or order, and is kept as a record beside the sample. The paper's text and its released
configuration give different sizes; its storage and times fit the released one alone, our default.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from torch import Tensor

from spar_lightning.errors import UserError, check_at_least
from spar_lightning.geometry import rescaled, resize_image

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


@dataclass(frozen=True)
class Augmentation:
    """Random size, crop and flip of one image.

    Args:
        scale: Long and short bound of the resized image in pixels, before the ratio; null keeps the image's own size.
        ratio_range: The bounds are multiplied by a ratio drawn uniformly from this range.
        min_side: Smallest side of the result in pixels; images that come out smaller are enlarged.
        multiple: Both sides of the result are floored to multiples of this; the patch size must divide it.
        crop_probability: How often a crop is taken instead of the whole image.
        crop_range: Side of a crop as a share of the image's side, drawn for each axis on its own.
        flip_probability: How often the image is mirrored left to right.
    """

    scale: tuple[int, int] | None = (2048, 1024)
    ratio_range: tuple[float, float] = (0.5, 1.0)
    min_side: int = 512
    multiple: int = 16
    crop_probability: float = 0.5
    crop_range: tuple[float, float] = (0.4, 1.0)
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        check_at_least(1, multiple=self.multiple, min_side=self.min_side, scale=min(self.scale or (1,)))
        for name, highest in (("ratio_range", math.inf), ("crop_range", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= highest:
                raise UserError(
                    f"augmentation: {name} must be two numbers above 0, the smaller first"
                    f"{', and at most 1' if highest == 1 else ''}, but got {low} and {high}."
                )
        if self.min_side % self.multiple:
            raise UserError(
                f"augmentation: min_side must be a multiple of multiple, but got {self.min_side} and {self.multiple}."
            )

    def identity(self) -> dict[str, Any]:
        """What a cache records of it."""
        return {"name": type(self).__name__, "algorithm": ALGORITHM, **asdict(self)}

    def draw(self, height: int, width: int, seed: int, key: str) -> Record:
        """Decide what happens to the image `key` of height x width pixels.

        Raises:
            SizeError: A side is shorter than an eighth of `min_side`, or than a sixteenth of the other.
        """
        least = max(-(-self.min_side // SMALLEST), -(-max(height, width) // LONGEST))
        if min(height, width) < least:
            raise SizeError(f"{height} x {width} pixels; the shorter side must have at least {least}")
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        ratio = rng.uniform(*self.ratio_range)
        if self.scale is not None:
            height, width = rescaled(height, width, (int(self.scale[0] * ratio), int(self.scale[1] * ratio)))
        crop = rng.uniform() < self.crop_probability
        shares = rng.uniform(size=4)  # drawn always, so that every image takes the same draws
        flip = bool(rng.uniform() < self.flip_probability)

        if min(height, width) < self.min_side:
            short = min(height, width)
            height, width = (self._floor(int(side * self.min_side / short)) for side in (height, width))
            crop = False
        if not crop:
            height, width = self._floor(height), self._floor(width)
            return Record(height, width, 0, 0, height, width, flip)
        crop_height, crop_width = (
            self._floor(int(_integer(int(self.crop_range[0] * side), int(self.crop_range[1] * side), share)))
            for side, share in ((height, shares[0]), (width, shares[1]))
        )
        top, left = _integer(0, height - crop_height, shares[2]), _integer(0, width - crop_width, shares[3])
        return Record(height, width, top, left, crop_height, crop_width, flip)

    def _floor(self, side: int) -> int:
        return max(side, self.min_side) // self.multiple * self.multiple

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


Preset = Literal["released", "text", "extended", "none", "small"]
PRESETS: Final[Mapping[Preset, Augmentation]] = {
    "released": Augmentation(),
    "text": Augmentation(scale=(1 << 16, 2048), ratio_range=(0.25, 1.0)),  # short side 512 to 2048, long side free
    "extended": Augmentation(scale=(2560, 2560), ratio_range=(0.2, 1.0)),  # long side 512 to 2560
    "none": Augmentation(scale=None, crop_probability=0.0, flip_probability=0.0),  # sides floored to multiples
    "small": Augmentation((224, 192), (0.7, 1.0), min_side=64, multiple=8, crop_probability=0.25),  # rendered scenes
}
