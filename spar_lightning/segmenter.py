"""Segmenter: an image and class names in, a label map out.

Single pass and sliding window are two objects with one interface, a normalised image -> cosines of the
names; all that follows is the same for both. The label map has the size of the image, whatever size the
network saw.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.cosine_maps import PatchCosines, WindowCosines, refined_maps
from spar_lightning.errors import UserError
from spar_lightning.geometry import Geometry, Resize, aligned, of_area, rescaled, resize_image
from spar_lightning.label_map import CosineMaps, Thresholds, label_map
from spar_lightning.refine import LPOSS, AnyUp
from spar_lightning.sliding_window import SlidingWindow
from spar_lightning.text_embeddings import text_classifier
from spar_lightning.zero_shot import Classes, Templates, TextClassifier

Inference = Literal["single", "sliding"]


class Segmenter:
    """Open-vocabulary segmentation of one image at a time.

    Args:
        backbone: Gives dense features and text embeddings.
        classes: Class names, a mapping from label to several names, or a ready `TextClassifier`.
        inference: `single` sees the whole image in one pass; `sliding` averages the cosines of windows, pixel by
            pixel, the teacher's way.
        stride: Step between windows in pixels, for `sliding`.
        batch_size: Windows per forward pass, for `sliding`; null chooses by the device.
        templates: Prompt templates, averaged: openai_imagenet, or a list with `{}` for the name.
        geometry: Images whose sides the patch does not divide: `aligned` resizes them to the nearest multiples,
            `paper` does what the published code does for the family of the backbone.
        resize: Bounds of the long and of the short side that the network's image gets, in pixels, with its aspect
            kept; or the side of the square whose area it gets (paper, Figure 3); null keeps the size.
        thresholds: When a pixel becomes class 0, for classes of which the first is the background; null: never.
        refine: Spreads the cosines over similar patches; null leaves them.
        upsampler: Brings them from the patch grid to the pixels of the network's image; null: bilinear.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Classes | TextClassifier,
        inference: Inference = "single",
        stride: int = 24,
        batch_size: int | None = None,
        templates: Templates = "openai_imagenet",
        geometry: Geometry = "aligned",
        resize: Resize = None,
        thresholds: Thresholds | None = None,
        refine: LPOSS | None = None,
        upsampler: AnyUp | None = None,
    ) -> None:
        if inference not in get_args(Inference):
            raise UserError(f"inference is 'single' or 'sliding', but got {inference!r}.")
        if geometry not in get_args(Geometry):
            raise UserError(f"geometry is 'aligned' or 'paper', but got {geometry!r}.")
        self.backbone = backbone
        if not isinstance(classes, TextClassifier):
            classes = text_classifier(backbone, classes, templates)
        self.classifier = classes
        self.rule = aligned if geometry == "aligned" else backbone.paper_geometry
        self.resize = resize
        self.thresholds = thresholds or Thresholds()
        if refine is not None and (self.thresholds.probability or self.thresholds.area is not None):
            raise UserError(
                "thresholds are those of cosines, but scores after LPOSS have another scale: give refine or thresholds."
            )
        self.upsampler = upsampler
        windows = SlidingWindow(backbone, stride, batch_size=batch_size) if inference == "sliding" else None
        self.windows = windows
        self.cosines: Callable[[Tensor, Tensor], CosineMaps]
        if refine is not None or upsampler is not None:
            self.cosines = partial(refined_maps, windows or backbone, backbone, refine, upsampler)
        else:
            self.cosines = partial(WindowCosines, windows) if windows else partial(PatchCosines, backbone)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Class of every pixel (H, W) int64 of an image (3, H, W) uint8 of any size, on the image's device."""
        if self.classifier.owner.device != image.device:
            self.classifier = self.classifier.to(image.device)  # once, not for every image
        if self.upsampler is not None:
            self.upsampler.to(image.device)
        cosines = self.cosines(self.pixels(image), self.classifier.embeddings)
        return label_map(cosines, self.classifier.owner, (image.shape[-2], image.shape[-1]), self.thresholds)

    def pixels(self, image: Tensor) -> Tensor:
        """What the network sees (3, H', W'): resized, normalised, with sides that the patch divides."""
        height, width, patch = image.shape[-2], image.shape[-1], self.backbone.patch_size
        if isinstance(self.resize, int):
            image = resize_image(image, of_area(height, width, self.resize, patch))
        elif self.resize is not None:
            image = resize_image(image, rescaled(height, width, self.resize))
        return self.rule(self.backbone.normalize(image[None]), patch)[0]

    @torch.no_grad()
    def run_network(self, pixels: Tensor) -> None:
        """The forward passes that an image (3, H', W') of `pixels` needs and nothing else, for taking the time."""
        if self.windows is None:
            self.backbone(pixels[None])
        else:
            for _ in self.windows.maps(pixels):
                pass
