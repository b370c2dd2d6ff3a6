"""Synthetic images with exact labels, rendered from a seed.

A canvas is divided into regions of four textures with objects on it, which are three to eight patches of the `Tiny`
backbone wide. Form and color of an object are random: its class is the color of the dot in its middle. So most patches
of an object are recognized only by what is around them. Image `i` of seed `s` is a pure function of (s, i, canvas):
pretraining, distillation and validation use the same generator with different seeds and canvases. Objects have the same
density and size on every canvas, so a small canvas looks like a crop of a large one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

TEXTURES = ("plain", "grain", "waves", "checks")
DOTS = {  # RGB in [0, 1]
    "red dot": (0.9, 0.1, 0.1),
    "green dot": (0.1, 0.75, 0.15),
    "blue dot": (0.15, 0.2, 0.95),
    "yellow dot": (0.95, 0.9, 0.1),
    "white dot": (1.0, 1.0, 1.0),
    "black dot": (0.0, 0.0, 0.0),
}
OBJECTS = tuple(DOTS)
CLASSES = TEXTURES + OBJECTS

REGION_AREA = 80.0**2  # px^2 of canvas per texture region
OBJECT_AREA = 48.0**2  # px^2 of canvas per object, before those that would overlap are left out
OBJECT_SIZE = (24.0, 60.0)  # px, log-uniform
DOT_SIZE = 0.36  # radius of a dot / radius of its object
MIN_DOT = 4.5  # px, smallest radius of a dot
MARGIN = 40  # px around the canvas in which objects may be centered, so that borders cut objects as crops do
NOISE = 0.03  # standard deviation, as a fraction of the full range
MIN_CONTRAST = 0.25  # RGB distance between an object and the color under its center
DOT_CONTRAST = 0.5  # RGB distance between an object and its dot
DOT_JITTER = 0.08  # largest change of a dot's color, per channel


@dataclass(frozen=True)
class Scene:
    """Synthetic image (H, W, 3) uint8 and its labels (H, W) uint8, indices into `CLASSES`."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def render(seed: int, index: int, height: int, width: int) -> Scene:
    """Render image `index` of a seed on a canvas of height x width pixels."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, height, width]))
    image, labels = _regions(rng, height, width)
    drawn: list[tuple[float, float, float]] = []  # circle of each object: center y, center x, radius, in pixels
    for _ in range(rng.poisson((height + 2 * MARGIN) * (width + 2 * MARGIN) / OBJECT_AREA)):
        _draw_object(rng, image, labels, drawn)
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


def _draw_object(
    rng: np.random.Generator, image: Array, labels: NDArray[np.uint8], drawn: list[tuple[float, float, float]]
) -> None:
    """Draw one random object in place, or its part on the canvas, unless its circle overlaps that of another."""
    height, width = labels.shape
    kind = int(rng.integers(len(OBJECTS)))
    radius = float(np.exp(rng.uniform(*np.log(OBJECT_SIZE))) / 2)
    cy, cx = rng.uniform(-MARGIN, height + MARGIN), rng.uniform(-MARGIN, width + MARGIN)
    angle = rng.uniform(0, 2 * np.pi)
    if any(np.hypot(cy - y, cx - x) < radius + r for y, x, r in drawn):
        return
    drawn.append((cy, cx, radius))
    reach = int(radius * 1.3) + 2
    rows = slice(max(0, int(cy) - reach), max(0, min(height, int(cy) + reach + 1)))
    columns = slice(max(0, int(cx) - reach), max(0, min(width, int(cx) + reach + 1)))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    y, x = _grid(rows.stop - rows.start, columns.stop - columns.start)
    y, x = (y + rows.start + 0.5 - cy) / radius, (x + columns.start + 0.5 - cx) / radius
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    match rng.integers(3):  # radius 1, at the origin
        case 0:  # disc
            inside = np.hypot(u, v) < 1
        case 1:  # square
            inside = np.maximum(abs(u), abs(v)) < 0.9
        case _:  # diamond
            inside = abs(u) / 0.6 + abs(v) < 1.1
    below = image[min(max(int(cy), 0), height - 1), min(max(int(cx), 0), width - 1)]
    dot = np.asarray(DOTS[OBJECTS[kind]], np.float32)
    body = _contrasting(rng, below, dot)
    color = dot + rng.uniform(-DOT_JITTER, DOT_JITTER, 3).astype(np.float32)
    in_dot = np.hypot(u, v) < max(DOT_SIZE, MIN_DOT / radius)
    image[rows, columns][inside] = np.where(in_dot[..., None], color, body)[inside]
    labels[rows, columns][inside] = len(TEXTURES) + kind


def _contrasting(rng: np.random.Generator, below: Array, dot: Array) -> Array:
    """Return a random color of an object that stands out from what is below, and its dot from it."""
    while True:
        color = rng.uniform(0, 1, 3).astype(np.float32)
        if np.linalg.norm(color - below) > MIN_CONTRAST and np.linalg.norm(color - dot) > DOT_CONTRAST:
            return color


def _shading(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return a slow variation of brightness (H, W, 1), at most +-0.1."""
    y, x = _grid(height, width)
    fy, fx = rng.uniform(-1, 1, 2) / 60
    light = 0.1 * np.sin(y * fy + x * fx + rng.uniform(0, 2 * np.pi))
    return np.asarray(light[..., None], np.float32)
