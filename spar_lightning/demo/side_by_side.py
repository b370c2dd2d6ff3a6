"""Segmentation of one image in several modes: single pass, windowed attention, sliding window, student.

Everything that a visitor of the page sends is checked here: the file, the class names, the modes and the size.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError
from spar_lightning.image.codec import ImageError, decode_image, image_size
from spar_lightning.refinement.anyup import BILINEAR
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.prompts import parse_classes
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import TextClassifiers
from spar_lightning.student import Student
from spar_lightning.visualization.overlay import overlay
from spar_lightning.visualization.palette import palette
from spar_lightning.visualization.pca import Basis

MOST_BYTES: Final = 20 * 2**20  # of an image file
MOST_PIXELS: Final = 40_000_000
MOST_NAMES: Final = 100
SHOWN: Final = 1024  # px, long side of the pictures and of the segmentation maps

STUDENT, SLIDING = "student", "sliding window (teacher)"
FULL, WINDOWED = "single pass, full attention", "single pass, windowed attention"


@dataclass(frozen=True)
class Panel:
    """Result of one mode.

    Attributes:
        title: Name of the mode.
        seconds: Time of network and segmentation map, without that of the text encoder.
        picture: Image in the colors of its classes, with a legend.
        colors: Features as colors, on the PCA basis of the first mode.
        rows: Label, area (fraction) and mean score of each class; the score is NaN for a class without pixels.
    """

    title: str
    seconds: float
    picture: Image.Image
    colors: Image.Image
    rows: list[tuple[str, float, float]]


class SideBySide:
    """Modes of one network.

    Args:
        student: Trained network, or a backbone without further training, which has no mode `student`.
    """

    def __init__(self, student: Student) -> None:
        base = student.base() if student.weights is not None else student.backbone
        plain = replace(student.config, refine=None, upsampler=BILINEAR, inference="single", attention="full")
        self._modes: dict[str, tuple[Backbone, InferenceConfig]] = {
            FULL: (base, plain),
            WINDOWED: (base, replace(plain, attention="windowed")),
            SLIDING: (base, replace(plain, inference="sliding")),
        }
        if student.weights is not None:
            self._modes[STUDENT] = (student.backbone, replace(student.config, inference="single"))
        self._classifiers = TextClassifiers(base, student.config.templates)
        self.window = base.window

    @property
    def modes(self) -> list[str]:
        """Names of the modes."""
        return list(self._modes)

    def __call__(self, file: str | Path | None, classes: str, modes: Sequence[str], side: int) -> list[Panel]:
        """Segment an image file in several modes.

        Args:
            file: Image file.
            classes: Class names, as for `spar predict --classes`.
            modes: Names of modes.
            side: Maximum long side of the network's input in pixels.

        Raises:
            UserError: The file cannot be read or is too large, or the classes are malformed or too many.
        """
        if file is None:
            raise UserError("The image is missing. Drop a file, or choose an example.")
        if not modes:
            raise UserError("No mode is selected. Select at least one.")
        wanted = parse_classes(classes)
        if sum(map(len, wanted.values())) > MOST_NAMES:
            raise UserError(f"There are more than {MOST_NAMES} class names. Use fewer.")
        pixels = _read(Path(file))
        classifier = self._classifiers(wanted)
        panels: list[Panel] = []
        basis: Basis | None = None
        for mode in modes:
            backbone, config = self._modes[mode]
            segmenter = Segmenter(backbone, classifier, config, max_side=side)
            start = time.perf_counter()
            labels, scores = segmenter(pixels, scores=True)
            seconds = time.perf_counter() - start
            features = segmenter.features(pixels)
            basis = basis or Basis.of(features)
            colors = Image.fromarray((255 * basis.colours(features)).astype(np.uint8))
            size = (pixels.shape[-1], pixels.shape[-2])
            panels.append(
                Panel(
                    mode,
                    seconds,
                    overlay(_rows(pixels), labels.numpy(), list(wanted), palette(len(wanted))),
                    colors.resize(size, Image.Resampling.NEAREST),
                    [(label, *_found(labels, scores, i)) for i, label in enumerate(wanted)],
                )
            )
        return panels


def _read(file: Path) -> Tensor:
    """Return the image (3, H, W) uint8, shrunk to the size of the pictures.

    Raises:
        UserError: The file is too large, or cannot be read as an image.
    """
    if (size := file.stat().st_size) > MOST_BYTES:
        raise UserError(f"The file has {size / 2**20:.0f} MiB. At most {MOST_BYTES // 2**20} MiB are allowed.")
    content = file.read_bytes()
    height, width = image_size(content)
    if height * width > MOST_PIXELS:
        raise UserError(f"The image has {width} x {height} pixels. At most {MOST_PIXELS // 10**6} million are allowed.")
    try:
        return decode_image(content, upright=True, max_side=SHOWN)
    except ImageError as error:
        raise UserError(f"The file cannot be read as an image: {error}.") from error


def _rows(pixels: Tensor) -> NDArray[np.uint8]:
    """Return pixels (H, W, 3)."""
    found: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    return found


def _found(labels: Tensor, scores: Tensor, index: int) -> tuple[float, float]:
    """Return the fraction of the pixels of a class, and its mean score on them."""
    mask = labels == index
    return mask.float().mean().item(), scores[index][mask].mean().item()
