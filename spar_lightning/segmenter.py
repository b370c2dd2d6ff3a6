"""Segmenter: an image and class names in, a label map out.

Single pass and sliding window are two objects with one interface, images -> dense features; all
that follows is the same for both.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError
from spar_lightning.geometry import Geometry, aligned
from spar_lightning.sliding_window import SlidingWindow
from spar_lightning.zero_shot import TEMPLATES, Classes, TextClassifier

Inference = Literal["single", "sliding"]


class Segmenter:
    """Open-vocabulary segmentation of one image at a time.

    Args:
        backbone: Gives dense features and text embeddings.
        classes: Class names, a mapping from label to several names, or a ready `TextClassifier`.
        inference: `single` sees the whole image in one pass; `sliding` stitches windows, the teacher's way.
        stride: Step between windows in pixels, for `sliding`.
        batch_size: Windows per forward pass, for `sliding`.
        templates: Prompt templates, averaged; `{}` stands for the name.
        geometry: Images whose sides the patch does not divide: `aligned` resizes them to the nearest multiples,
            `paper` does what the published code does for the family of the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Classes | TextClassifier,
        inference: Inference = "single",
        stride: int = 24,
        batch_size: int = 60,
        templates: Sequence[str] = TEMPLATES,
        geometry: Geometry = "aligned",
    ) -> None:
        self.backbone = backbone
        if not isinstance(classes, TextClassifier):
            classes = TextClassifier.from_classes(backbone.encode_text, classes, templates)
        self.classifier = classes
        if inference not in get_args(Inference):
            raise UserError(f"inference is 'single' or 'sliding', but got {inference!r}.")
        if geometry not in get_args(Geometry):
            raise UserError(f"geometry is 'aligned' or 'paper', but got {geometry!r}.")
        self.rule = aligned if geometry == "aligned" else backbone.paper_geometry
        self.dense = backbone if inference == "single" else SlidingWindow(backbone, stride, batch_size=batch_size)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Class of every pixel (H, W) int64 of an image (3, H, W) uint8 of any size, on the image's device."""
        return self.classifier.label_map(self.features(image), (image.shape[-2], image.shape[-1]))

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Dense features (h, w, d), not normalised.

        Sides that are not multiples of the patch are treated as `geometry` says.
        """
        pixels = self.rule(self.backbone.normalize(image[None]), self.backbone.patch_size)
        features: Tensor = self.dense(pixels)[0]
        return features
