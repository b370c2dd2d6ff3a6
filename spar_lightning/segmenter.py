"""Segmenter: an image and class names in, a label map out.

Single pass and sliding window are two objects with one interface, a normalised image -> cosines of the
names; all that follows is the same for both. The label map has the size of the image, whatever size the
network saw.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.cosine_maps import PatchCosines, WindowCosines, refined_maps
from spar_lightning.errors import UserError
from spar_lightning.geometry import Geometry, Resize, aligned, at_most, of_area, rescaled, resize_image
from spar_lightning.label_map import CosineMaps, Thresholds, kept, label_map, score_map
from spar_lightning.pixels import ImageLike, as_pixels
from spar_lightning.refine import LPOSS, AnyUp
from spar_lightning.sliding_window import SlidingWindow
from spar_lightning.text_embeddings import text_classifier
from spar_lightning.zero_shot import Classes, Templates, TextClassifier

Inference = Literal["single", "sliding"]


class Segmenter:
    """Open-vocabulary segmentation of one image at a time. Once made, it may be called from several threads.

    Args:
        backbone: Gives dense features and text embeddings.
        classes: Class names, a mapping from label to several names, or a ready `TextClassifier`; one without classes
            gives features alone.
        inference: `single` sees the whole image in one pass; `sliding` averages the cosines of windows, pixel by
            pixel, the teacher's way.
        stride: Step between windows in pixels, for `sliding`.
        batch_size: Windows per forward pass, for `sliding`; null chooses by the device.
        templates: Prompt templates, averaged: openai_imagenet, or a list with `{}` for the name.
        geometry: Images whose sides the patch does not divide: `aligned` resizes them to the nearest multiples,
            `paper` does what the published code does for the family of the backbone.
        resize: Bounds of the long and of the short side that the network's image gets, in pixels, with its aspect
            kept; or the side of the square whose area it gets (paper, Figure 3); null keeps the size.
        max_side: Most pixels of the long side that the network's image gets: larger ones are shrunk; null: any.
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
        max_side: int | None = None,
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
        self.resize, self.max_side = resize, max_side
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

    @overload
    def __call__(self, image: ImageLike, scores: Literal[False] = False) -> Tensor: ...

    @overload
    def __call__(self, image: ImageLike, scores: Literal[True]) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def __call__(self, image: ImageLike, scores: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Class of every pixel (H, W) int64 of an image of any size, on the device of a tensor, otherwise on the CPU.

        Args:
            image: What `as_pixels` takes: a path, a PIL image, an array or a tensor.
            scores: Return the scores of the classes (C, H, W) fp32, too: the largest cosine of each one's names.
        """
        pixels, classifier = as_pixels(image), self._classifier()
        if not classifier.labels:
            raise UserError("There are no classes to choose from. Give classes=[..] to spar_lightning.load.")
        size, owner = (pixels.shape[-2], pixels.shape[-1]), classifier.owner
        cosines = self.cosines(self.pixels(pixels.to(self.device)), classifier.embeddings)
        if not scores:
            return label_map(cosines, owner, size, self.thresholds).to(pixels.device)
        cosines = kept(cosines, torch.arange(len(owner), device=owner.device))  # windows are seen once
        labels, of_classes = label_map(cosines, owner, size, self.thresholds), score_map(cosines, owner, size)
        return labels.to(pixels.device), of_classes.to(pixels.device)

    @torch.no_grad()
    def features(self, image: ImageLike) -> Tensor:
        """Dense features (h, w, d) of an image, not normalised: of one pass, or stitched from windows.

        The grid is that of the network's image, whose sides are multiples of the patch: `pixels` gives it.
        """
        given = as_pixels(image)
        network = self.windows or self.backbone
        features: Tensor = network(self.pixels(given.to(self.device))[None])[0]
        return features.to(given.device)

    @property
    def device(self) -> torch.device:
        """Where the backbone lies."""
        return next(self.backbone.parameters()).device

    def _classifier(self) -> TextClassifier:
        """The text side on the backbone's device, which may have moved."""
        if self.classifier.owner.device != self.device:
            self.classifier = self.classifier.to(self.device)  # once, not for every image
        if self.upsampler is not None and self.upsampler.rope.freqs.device != self.device:
            self.upsampler.to(self.device)
        return self.classifier

    def pixels(self, image: Tensor) -> Tensor:
        """What the network sees (3, H', W'): resized, normalised, with sides that the patch divides."""
        if self.max_side is not None:
            image = at_most(image, self.max_side)
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
