"""Segmentation of one image in several modes: single pass, windowed attention, sliding window, student."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError
from spar_lightning.refinement.anyup import BILINEAR
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import text_classifier
from spar_lightning.student import Student
from spar_lightning.visualization.overlay import overlay
from spar_lightning.visualization.palette import palette
from spar_lightning.visualization.pca import Basis

STUDENT, SLIDING = "student", "sliding window (teacher)"
FULL, WINDOWED = "single pass, full attention", "single pass, windowed attention"
LARGEST: Final = 8  # windows, long side of the network's input


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
        self._base, self._templates = base, student.config.templates
        self.window = base.window

    @property
    def modes(self) -> list[str]:
        """Names of the modes."""
        return list(self._modes)

    def __call__(
        self, pixels: Tensor, classes: Mapping[str, tuple[str, ...]], modes: Sequence[str], side: int
    ) -> list[Panel]:
        """Segment an image (3, H, W) uint8 in several modes.

        Args:
            pixels: Image.
            classes: Class names by label.
            modes: Names of modes.
            side: Maximum long side of the network's input in pixels.

        Raises:
            UserError: The modes or the side are not among those that the page offers, or the text encoder does not
                know a name.
        """
        if not modes:
            raise UserError("No mode is selected. Select at least one.")
        if unknown := [mode for mode in modes if mode not in self._modes]:
            raise UserError(f"{str(unknown[0])[:100]!r} is not a mode. Allowed: {', '.join(self._modes)}.")
        if not 1 <= side <= LARGEST * self.window:
            raise UserError(f"The longest side must be from 1 to {LARGEST * self.window} pixels.")
        classifier = text_classifier(self._base, classes, self._templates)
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
            picture = overlay(pixels.permute(1, 2, 0).numpy(), labels.numpy(), list(classes), palette(len(classes)))
            rows = [(label, *_found(labels, scores, i)) for i, label in enumerate(classes)]
            panels.append(Panel(mode, seconds, picture, colors.resize(size, Image.Resampling.NEAREST), rows))
        return panels


def _found(labels: Tensor, scores: Tensor, index: int) -> tuple[float, float]:
    """Return the fraction of the pixels of a class, and its mean score on them."""
    mask = labels == index
    return mask.float().mean().item(), scores[index][mask].mean().item()
