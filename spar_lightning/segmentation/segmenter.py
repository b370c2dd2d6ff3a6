"""Segmenter: an image and class names in, a label map out.

Single pass and sliding window are two objects with one interface, a normalised image -> cosines of the
names; all that follows is the same for both. The label map has the size of the image, whatever size the
network saw.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.image.inputs import ImageLike, as_pixels
from spar_lightning.image.resize import Resize, aligned, at_most, of_area, rescaled, resize_image
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.label_map import SimilarityMaps, Thresholds, label_map, score_map, stored_maps
from spar_lightning.segmentation.prompts import Classes, TextClassifier
from spar_lightning.segmentation.similarity import PatchSimilarities, WindowSimilarities, refined_similarities
from spar_lightning.segmentation.text_embeddings import text_classifier
from spar_lightning.sliding_window import SlidingWindow


class Segmenter:
    """Open-vocabulary segmentation of one image at a time. Once made, it may be called from several threads.

    Args:
        backbone: Gives dense features and text embeddings.
        classes: Class names, a mapping from label to several names, or a ready `TextClassifier`; one without classes
            gives features only.
        config: Settings of inference.
        resize: Bounds of the long and of the short side that the network's image gets, in pixels, aspect kept; or the
            side of the square whose area it gets (paper, Figure 3); None keeps the size.
        max_side: Most pixels of the long side that the network's image gets: larger ones are shrunk; None: any.
        thresholds: When a pixel becomes class 0, for classes of which the first is the background; None: never.

    Raises:
        UserError: The classes are malformed, or thresholds are combined with a refinement, whose scores have another
            scale.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Classes | TextClassifier,
        config: InferenceConfig = InferenceConfig(),
        *,
        resize: Resize = None,
        max_side: int | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        self.backbone, self.config = backbone, config
        if not isinstance(classes, TextClassifier):
            classes = text_classifier(backbone, classes, config.templates)
        self.classifier = classes
        self.patch_fit = aligned if config.patch_fit == "aligned" else backbone.paper_patch_fit
        check_at_least(1, max_side=max_side)
        self.resize, self.max_side = resize, max_side
        self.thresholds = thresholds or Thresholds()
        if config.refine is not None and (self.thresholds.probability or self.thresholds.area is not None):
            raise UserError(
                "thresholds belong to cosine similarities, but refined scores have another scale. Set either refine or "
                "thresholds."
            )
        windows = SlidingWindow(backbone, config.stride, batch_size=config.window_batch)  # also checks the stride
        self.windows = windows if config.inference == "sliding" else None
        self.upsampler = config.build_upsampler()
        self.similarities: Callable[[Tensor, Tensor], SimilarityMaps]
        if config.refine is not None or self.upsampler is not None:
            encoder = self.windows or backbone
            self.similarities = partial(refined_similarities, encoder, backbone, config.refine, self.upsampler)
        elif self.windows is not None:
            self.similarities = partial(WindowSimilarities, self.windows)
        else:
            self.similarities = partial(PatchSimilarities, backbone)

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
        maps = self.similarities(self.pixels(pixels.to(self.device)), classifier.embeddings)
        if not scores:
            return label_map(maps, owner, size, self.thresholds).to(pixels.device)
        maps = stored_maps(maps, torch.arange(len(owner), device=owner.device))  # windows are seen once
        labels, of_classes = label_map(maps, owner, size, self.thresholds), score_map(maps, owner, size)
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
        return self.patch_fit(self.backbone.normalize(image[None]), patch)[0]

    @torch.no_grad()
    def run_network(self, pixels: Tensor) -> None:
        """The forward passes that an image (3, H', W') of `pixels` needs and nothing else, for taking the time."""
        if self.windows is None:
            self.backbone(pixels[None])
        else:
            for _ in self.windows.maps(pixels):
                pass
