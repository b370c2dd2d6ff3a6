"""Synthetic images with exact labels, rendered from a seed.

A canvas is divided into regions of four textures. Shapes of eight kinds are drawn on it at any rotation, in sizes from
two patches of the `Tiny` backbone to more than its window. Colors are random, so a class is recognized only by its
form, and most forms need the context of several patches. Image `i` of seed `s` is a pure function of (s, i, canvas):
pretraining, distillation and validation use the same generator with different seeds and canvases. Shapes have the same
density and size on every canvas, so a small canvas looks like a crop of a large one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Form = Callable[[Array, Array, Array], NDArray[np.bool_]]

TEXTURES = ("plain", "grain", "waves", "checks")
SHAPES = ("disc", "square", "triangle", "ring", "cross", "striped disc", "diamond", "bar")
CLASSES = TEXTURES + SHAPES

REGION_AREA = 80.0**2  # px^2 of canvas per texture region
SHAPE_AREA = 60.0**2  # px^2 of canvas per shape
SHAPE_SIZE = (20.0, 80.0)  # px, log-uniform
MARGIN = 40  # px around the canvas in which shapes may be centered, so that borders cut shapes as crops do
NOISE = 0.03  # standard deviation, as a fraction of the full range
MIN_CONTRAST = 0.25  # RGB distance between a shape and the color under its center


@dataclass(frozen=True)
class Scene:
    """Synthetic image (H, W, 3) uint8 and its labels (H, W) uint8, indices into `CLASSES`."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def render(seed: int, index: int, height: int, width: int) -> Scene:
    """Render image `index` of a seed on a canvas of height x width pixels."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, height, width]))
    image, labels = _regions(rng, height, width)
    for _ in range(rng.poisson((height + 2 * MARGIN) * (width + 2 * MARGIN) / SHAPE_AREA)):
        _draw_shape(rng, image, labels)
    image += _shading(rng, height, width)
    image += NOISE * rng.standard_normal(image.shape, dtype=np.float32)
    return Scene((image.clip(0, 1) * 255).round().astype(np.uint8), labels)


def _grid(height: int, width: int) -> tuple[Array, Array]:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return y, x


def _regions(rng: np.random.Generator, height: int, width: int) -> tuple[Array, NDArray[np.uint8]]:
    """Draw textured cells around random sites, with borders bent by a slow wave."""
    count = 1 + rng.poisson(height * width / REGION_AREA)
    sites = rng.uniform((0, 0), (height, width), (count, 2)).astype(np.float32)
    y, x = _grid(height, width)
    bend, phase = rng.uniform(0, 8, 2), rng.uniform(0, 2 * np.pi, 2)
    y_bent = y + bend[0] * np.sin(x / 17 + phase[0])
    x_bent = x + bend[1] * np.sin(y / 17 + phase[1])
    distance = (y_bent[..., None] - sites[:, 0]) ** 2 + (x_bent[..., None] - sites[:, 1]) ** 2
    owner = distance.argmin(-1)  # (H, W)

    image = np.empty((height, width, 3), np.float32)
    labels = np.empty((height, width), np.uint8)
    for cell in range(count):
        inside = owner == cell
        label = int(rng.integers(len(TEXTURES)))
        image[inside] = _texture(rng, TEXTURES[label], y, x)[inside]
        labels[inside] = label
    return image, labels


def _texture(rng: np.random.Generator, name: str, y: Array, x: Array) -> Array:
    """Mix two random colors by a pattern in [0, 1]; `plain` is a gradient between them."""
    first, second = rng.uniform(0, 1, (2, 3)).astype(np.float32)
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wavelength = np.exp(rng.uniform(np.log(8), np.log(24)))
    match name:
        case "plain":
            mix = (u - u.min()) / max(float(np.ptp(u)), 1.0)
            second = (first + rng.uniform(-0.3, 0.3, 3)).astype(np.float32)
        case "grain":
            mix = rng.uniform(0, 1, x.shape)
        case "waves":
            mix = 0.5 + 0.5 * np.sin(2 * np.pi * u / wavelength + rng.uniform(0, 2 * np.pi))
        case _:  # checks
            shift = rng.uniform(0, wavelength, 2)
            mix = (np.floor((u + shift[0]) / wavelength * 2) + np.floor((v + shift[1]) / wavelength * 2)) % 2
    return np.asarray(first + mix[..., None] * (second - first), np.float32)


# Each function returns which points are inside a shape of radius 1 at the origin: coordinates u and v, distance r.
_FORMS: dict[str, Form] = {
    "disc": lambda u, v, r: r < 1,
    "square": lambda u, v, r: np.maximum(abs(u), abs(v)) < 0.9,
    "triangle": lambda u, v, r: (v > -0.6) & (v + 1.9 * abs(u) < 1),
    "ring": lambda u, v, r: (r < 1) & (r > 0.55),
    "cross": lambda u, v, r: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1),
    "striped disc": lambda u, v, r: r < 1,
    "diamond": lambda u, v, r: abs(u) / 0.6 + abs(v) < 1.1,
    "bar": lambda u, v, r: (abs(u) < 0.28) & (abs(v) < 1.1),
}


def _draw_shape(rng: np.random.Generator, image: Array, labels: NDArray[np.uint8]) -> None:
    """Draw one random shape in place, or the part of it that is on the canvas."""
    height, width = labels.shape
    kind = int(rng.integers(len(SHAPES)))
    radius = np.exp(rng.uniform(*np.log(SHAPE_SIZE))) / 2
    cy, cx = rng.uniform(-MARGIN, height + MARGIN), rng.uniform(-MARGIN, width + MARGIN)
    angle = rng.uniform(0, 2 * np.pi)
    reach = int(radius * 1.2) + 2
    rows = slice(max(0, int(cy) - reach), max(0, min(height, int(cy) + reach + 1)))
    columns = slice(max(0, int(cx) - reach), max(0, min(width, int(cx) + reach + 1)))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    y, x = _grid(rows.stop - rows.start, columns.stop - columns.start)
    y, x = (y + rows.start + 0.5 - cy) / radius, (x + columns.start + 0.5 - cx) / radius
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    inside = _FORMS[SHAPES[kind]](u, v, np.hypot(u, v))

    colour = _contrasting(rng, image[min(max(int(cy), 0), height - 1), min(max(int(cx), 0), width - 1)])
    paint = np.broadcast_to(colour, (*inside.shape, 3))
    if SHAPES[kind] == "striped disc":
        stripes = np.sin(np.pi * v * rng.uniform(2.5, 4)) > 0
        paint = np.where(stripes[..., None], colour, _contrasting(rng, colour))
    image[rows, columns][inside] = paint[inside]
    labels[rows, columns][inside] = len(TEXTURES) + kind


def _contrasting(rng: np.random.Generator, colour: Array) -> Array:
    """Return a random color with sufficient contrast to `colour`."""
    while True:
        other = rng.uniform(0, 1, 3).astype(np.float32)
        if np.linalg.norm(other - colour) > MIN_CONTRAST:
            return other


def _shading(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return a slow variation of brightness (H, W, 1), at most +-0.1."""
    y, x = _grid(height, width)
    fy, fx = rng.uniform(-1, 1, 2) / 60
    light = 0.1 * np.sin(y * fy + x * fx + rng.uniform(0, 2 * np.pi))
    return np.asarray(light[..., None], np.float32)
