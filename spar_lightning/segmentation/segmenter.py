"""Segmenter: segmentation map of an image for given class names.

Single-pass and sliding-window inference implement one interface, from a normalized image to the similarities of the
names. All later steps are shared. The segmentation map has the size of the given image, even if the network processed
another size.
"""

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
from spar_lightning.segmentation.similarity import (
    GuidedMaps,
    WindowSimilarities,
    patch_similarities,
    refined_similarities,
)
from spar_lightning.segmentation.text_embeddings import text_classifier
from spar_lightning.sliding_window import SlidingWindow


class Segmenter:
    """Open-vocabulary segmentation of one image at a time.

    After construction, an instance can be called from several threads.

    Args:
        backbone: Network that computes dense features and text embeddings.
        classes: Class names, a mapping from label to several names, or a `TextClassifier`. A classifier without
            classes supports `features` only.
        config: Inference settings; its attention replaces that of the backbone.
        resize: Size of the network's input: bounds of the long and the short side in pixels (aspect ratio preserved),
            or the side of a square of the same area (paper, Figure 3). None keeps the size of the image.
        max_side: Maximum long side of the network's input in pixels; larger images are downscaled. None sets no limit.
        thresholds: Thresholds below which a pixel becomes class 0; the first class must be the background. None
            disables them.

    Raises:
        UserError: If the classes are malformed, or if thresholds are combined with a refinement: refined scores have
            a different scale.
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
        full, backbone = backbone.with_attention(None), backbone.with_attention(config.windowed)
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
                "thresholds apply to cosine similarities, but refined scores have a different scale. Set either refine "
                "or thresholds."
            )
        # Windows have the native size, at which attention is always full. This also checks the stride.
        windows = SlidingWindow(full, config.stride, batch_size=config.window_batch, blend=config.blend)
        self.windows = windows if config.inference == "sliding" else None
        self.upsampler = config.build_upsampler()

    @overload
    def __call__(
        self,
        image: ImageLike,
        scores: Literal[False] = False,
        *,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.long,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        image: ImageLike,
        scores: Literal[True],
        *,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.long,
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike,
        scores: bool = False,
        *,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.long,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the class index of each pixel (H, W).

        The result is on the device of the image if the image is a tensor, otherwise on the CPU.

        Args:
            image: Path, PIL image, array or tensor of any size (see `as_pixels`).
            scores: If True, also return the class scores (C, H, W) in fp32: the largest similarity of each class's
                names.
            size: Height H and width W of the result; None uses those of the image.
            dtype: Integer type of the class indices; uint8 takes an eighth of the memory of int64, and is enough for
                256 classes.

        Raises:
            UserError: If the segmenter has no classes.
        """
        pixels, classifier = as_pixels(image), self._classifier()
        if not classifier.labels:
            raise UserError("This segmenter has no classes. Pass classes=[...] to spar_lightning.load.")
        size, owner = size or (pixels.shape[-2], pixels.shape[-1]), classifier.owner
        maps = self.similarities(self.pixels(pixels), classifier.embeddings)
        if not scores:
            return label_map(maps, owner, size, self.thresholds, dtype).to(pixels.device)
        maps = stored_maps(maps, torch.arange(len(owner), device=owner.device))  # windows are computed only once
        labels, of_classes = label_map(maps, owner, size, self.thresholds, dtype), score_map(maps, owner, size)
        return labels.to(pixels.device), of_classes.to(pixels.device)

    @torch.no_grad()
    def features(self, image: ImageLike) -> Tensor:
        """Return the dense features (h, w, d) of an image, not normalized.

        They come from a single pass or are stitched from windows, as `config.inference` selects. The grid is that of
        the network's input (see `pixels`).
        """
        given = as_pixels(image)
        return self._features(self.pixels(given)).to(given.device)

    def _features(self, pixels: Tensor) -> Tensor:
        """Return the features (h, w, d) of a network's input (3, H', W')."""
        features: Tensor = (self.windows or self.backbone)(pixels[None])[0]
        return features

    def similarities(self, pixels: Tensor, embeddings: Tensor) -> SimilarityMaps:
        """Return the similarities of a network's input (3, H', W') and names (Q, d)."""
        refine, upsampler = self.config.refine, self.upsampler
        if self.windows is not None and refine is None and upsampler is None:
            return WindowSimilarities(self.windows, pixels, embeddings)
        if upsampler is None:
            return patch_similarities(self._features(pixels), embeddings, refine, self.backbone.patch_size)
        maps = refined_similarities(self._features(pixels), embeddings, refine, self.backbone.patch_size)
        return GuidedMaps(upsampler, upsampler.normalize(self.backbone.denormalize(pixels)), maps)

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return next(self.backbone.parameters()).device

    def _classifier(self) -> TextClassifier:
        """Return the text classifier on the device of the backbone, which may have changed."""
        if self.classifier.owner.device != self.device:
            self.classifier = self.classifier.to(self.device)  # once, not for each image
        if self.upsampler is not None and self.upsampler.rope.freqs.device != self.device:
            self.upsampler.to(self.device)
        return self.classifier

    def pixels(self, image: Tensor) -> Tensor:
        """Return the network's input (3, H', W') for an image (3, H, W).

        The image is resized and normalized; its sides become multiples of the patch size.
        """
        if self.max_side is not None:
            image = at_most(image, self.max_side)
        image = image.to(self.device)
        height, width, patch = image.shape[-2], image.shape[-1], self.backbone.patch_size
        if isinstance(self.resize, int):
            image = resize_image(image, of_area(height, width, self.resize, patch))
        elif self.resize is not None:
            image = resize_image(image, rescaled(height, width, self.resize))
        return self.patch_fit(self.backbone.normalize(image[None]), patch)[0]

    @torch.no_grad()
    def run_network(self, pixels: Tensor) -> None:
        """Run only the forward passes for a result of `pixels` (3, H', W'), to measure their time."""
        if self.windows is None:
            self.backbone(pixels[None])
        else:
            for _ in self.windows.maps(pixels):
                pass
