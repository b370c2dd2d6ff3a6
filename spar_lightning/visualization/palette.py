"""Class colors. Each color is as far as possible from all previous ones, so adding classes does not change a color.

Distances are measured in OKLab (Ottosson, 2020), where equal steps look equally large. Colors near black, white and
gray are avoided, because these three are used for pixels without a class. Saturated colors are avoided, too: muted ones
are easier on the eye, and by CIEDE2000 the first 150 are even further apart.
"""

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

LEVELS: Final = 24  # per RGB channel
RESERVED: Final = ((0, 0, 0), (128, 128, 128), (255, 255, 255))
DARKEST: Final = 0.4  # lightness in OKLab; darker colors look alike
LIGHTEST: Final = 0.95
STRONGEST: Final = 0.12  # chroma in OKLab
LIGHTNESS: Final = 0.7  # weight of lightness in a distance; an overlay also shows the lightness of the image


def palette(classes: int) -> NDArray[np.uint8]:
    """Return RGB colors (classes + 1, 3) as uint8; the last one is black, for ignored pixels."""
    return np.concatenate([_colours(classes), np.zeros((1, 3), np.uint8)])


@cache
def _colours(count: int) -> NDArray[np.uint8]:
    """Return the first `count` colors (count, 3); colors repeat if there are more classes than colors."""
    levels = np.linspace(0, 255, LEVELS).round()
    choices = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    places = _oklab(choices)
    muted = np.hypot(places[:, 1], places[:, 2]) <= STRONGEST
    choices = choices[(places[:, 0] >= DARKEST) & (places[:, 0] <= LIGHTEST) & muted]
    places, taken = (_oklab(colours) * (LIGHTNESS, 1, 1) for colours in (choices, np.array(RESERVED, float)))
    nearest = np.square(places[:, None] - taken).sum(-1).min(1)  # squared distance to the colors already taken
    order = []
    for _ in range(min(count, len(choices))):
        order.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.square(places - places[order[-1]]).sum(-1))
    return np.resize(choices[order].astype(np.uint8), (count, 3))


def _oklab(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert sRGB colors (n, 3) from 0 to 255 to OKLab."""
    srgb = colours / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(linear @ _TO_CONES.T)
    return np.asarray(cones @ _TO_LAB.T)


_TO_CONES: Final = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB: Final = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
