"""Segmenter: segmentation map of an image for given class names.

Single-pass and sliding-window inference implement one interface, from a normalized image to the similarities of the
names. All later steps are shared. The segmentation map has the size of the given image, even if the network processed
another size. With `block_size`, the image is read row by row, so that memory does not grow with its height (except
with `resize`, which needs the whole image).
"""

import logging
from collections.abc import Iterator
from typing import Final, Literal, overload

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.image.inputs import ImageLike, as_pixels
from spar_lightning.image.resize import Resize, aligned, aligned_size, at_most, of_area, rescaled, resize_image
from spar_lightning.image.rows import ImageRows, as_rows
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.label_map import SimilarityMaps, Thresholds, bands, label_map, score_map, stored_maps
from spar_lightning.segmentation.prompts import Classes, TextClassifier
from spar_lightning.segmentation.similarity import (
    GuidedMaps,
    PatchSimilarities,
    WindowSimilarities,
    patch_similarities,
    refined_similarities,
)
from spar_lightning.segmentation.text_embeddings import text_classifier
from spar_lightning.sliding_window import SlidingWindow

MANY: Final = 2**17  # patches; full attention over more takes minutes on a GPU and hours on a CPU

log = logging.getLogger("spar_lightning")


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
        self.blocks = None if config.block_size is None or self.windows is not None else _blocks(backbone, config)
        self.upsampler = config.build_upsampler()

    @overload
    def __call__(
        self,
        image: ImageLike | ImageRows,
        scores: Literal[False] = False,
        *,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.long,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        image: ImageLike | ImageRows,
        scores: Literal[True],
        *,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.long,
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike | ImageRows,
        scores: bool = False,
        *,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.long,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the class index of each pixel (H, W).

        The result is on the device of the image if the image is a tensor, otherwise on the CPU.

        Args:
            image: Path, PIL image, array or tensor of any size (see `as_pixels`), or rows of an image.
            scores: If True, also return the class scores (C, H, W) in fp32: the largest similarity of each class's
                names.
            size: Height H and width W of the result; None uses those of the image.
            dtype: Integer type of the class indices; uint8 takes an eighth of the memory of int64, and is enough for
                256 classes.

        Raises:
            UserError: If the segmenter has no classes.
        """
        classifier = self._classifier()
        if not classifier.labels:
            raise UserError("This segmenter has no classes. Pass classes=[...] to spar_lightning.load.")
        owner, embeddings = classifier.owner, classifier.embeddings
        maps: SimilarityMaps
        if self.blocks is None:
            pixels = image.whole() if isinstance(image, ImageRows) else as_pixels(image)
            maps, given = self.similarities(self.pixels(pixels), embeddings), (pixels.shape[-2], pixels.shape[-1])
        else:
            source = as_rows(image)
            rows, given = self.rows(source), source.size
            maps = PatchSimilarities(lambda: self.feature_rows(rows), self.grid(given), embeddings)
        place, size = _place(image), size or given
        if not scores:
            return label_map(maps, owner, size, self.thresholds, dtype).to(place)
        maps = stored_maps(maps, torch.arange(len(owner), device=owner.device))  # windows are computed only once
        labels, of_classes = label_map(maps, owner, size, self.thresholds, dtype), score_map(maps, owner, size)
        return labels.to(place), of_classes.to(place)

    @torch.no_grad()
    def features(self, image: ImageLike | ImageRows) -> Tensor:
        """Return the dense features (h, w, d) of an image, not normalized.

        They come from a single pass, or are stitched from windows or blocks, as `config` selects. The grid is that of
        the network's input (see `pixels`).
        """
        if self.blocks is not None:
            return self._from_blocks(as_rows(image), _place(image))
        given = image.whole() if isinstance(image, ImageRows) else as_pixels(image)
        return self._features(self.pixels(given)).to(given.device)

    def _from_blocks(self, image: ImageRows, place: torch.device) -> Tensor:
        """Return the features (h, w, d) of an image in blocks on the device `place`, without a second copy of them."""
        features: Tensor | None = None
        done, grid = 0, self.grid(image.size)
        for part in self.feature_rows(self.rows(image)):
            if features is None:
                features = torch.empty(*grid, part.shape[-1], dtype=part.dtype, device=place)
            features[done : done + len(part)] = part
            done += len(part)
        assert features is not None
        assert done == grid[0]
        return features

    def _features(self, pixels: Tensor) -> Tensor:
        """Return the features (h, w, d) of a network's input (3, H', W')."""
        self._warn_of_many(pixels.shape[-2], pixels.shape[-1])
        features: Tensor = (self.windows or self.blocks or self.backbone)(pixels[None])[0]
        return features

    def _warn_of_many(self, height: int, width: int) -> None:
        """Log a warning if very many patches attend to each other in one pass."""
        if self.windows is not None or self.backbone.windowed is not None:
            return
        limit = max(height, width) if self.blocks is None else self.blocks.window
        patches = min(height, limit) * min(width, limit) // self.backbone.patch_size**2
        if patches > MANY:
            log.warning(
                "%s patches attend to each other in a single pass, which takes very long. Set block_size (such as "
                "1024) or max_side.",
                f"{patches:,}",
            )

    def rows(self, image: ImageRows) -> ImageRows:
        """Return an image at the size of the network's input, except that its sides may not be multiples of patches."""
        if self.max_side is not None and max(image.size) > self.max_side:
            image = ImageRows.of(image.at_most(self.max_side))
        return image if self.resize is None else ImageRows.of(self._resized(image.whole()))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of patches of an image in blocks, for its height and width before it is resized."""
        patch = self.backbone.patch_size
        if self.max_side is not None and max(size) > self.max_side:
            size = rescaled(*size, (self.max_side, self.max_side))
        height, width = aligned_size(*self._resized_size(*size), patch)
        return height // patch, width // patch

    @torch.no_grad()
    def feature_rows(self, image: ImageRows, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield consecutive rows (n, w, d) of the features that are blended from blocks (see `block_size`).

        Args:
            image: Image at the size of the network's input (see `rows`).
            first: First row of patches.
            last: Row of patches after the last one; None yields all rows from `first`.
        """
        assert self.blocks is not None
        size = aligned_size(*image.size, self.backbone.patch_size)
        self._warn_of_many(*size)
        pixels = (band.to(self.device) for band in image.bands())  # uint8: a quarter of the memory of fp32
        if size != image.size:
            resized = bands((band.float() for band in pixels), image.size, size)
            pixels = (values.round().to(torch.uint8) for _, values in resized)
        yield from self.blocks.rows(pixels, size, first, last, self.backbone.normalize)

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
        image = self._resized(image.to(self.device))
        return self.patch_fit(self.backbone.normalize(image[None]), self.backbone.patch_size)[0]

    def _resized(self, image: Tensor) -> Tensor:
        """Resize an image (3, H, W) uint8 as `resize` demands."""
        return resize_image(image, self._resized_size(image.shape[-2], image.shape[-1]))

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.resize, int):
            return of_area(height, width, self.resize, self.backbone.patch_size)
        return (height, width) if self.resize is None else rescaled(height, width, self.resize)

    @torch.no_grad()
    def run_network(self, pixels: Tensor) -> None:
        """Run only the forward passes for a result of `pixels` (3, H', W'), to measure their time."""
        if self.windows is not None:
            for _ in self.windows.maps(pixels):
                pass
        elif self.blocks is not None:
            for _ in self.blocks.rows([pixels], (pixels.shape[-2], pixels.shape[-1])):
                pass
        else:
            self.backbone(pixels[None])


def _blocks(backbone: Backbone, config: InferenceConfig) -> SlidingWindow:
    """Return the single pass over overlapping blocks; neighbors share a quarter of their side."""
    assert config.block_size is not None
    patch = backbone.patch_size
    side = config.block_size // patch  # in patches
    if side * patch < backbone.window:
        raise UserError(
            f"block_size {config.block_size} is smaller than the images of {backbone.window} pixels with which the "
            f"network was pretrained. Use at least {backbone.window}; 1024 is usual."
        )
    return SlidingWindow(backbone, (side - side // 4) * patch, side * patch, config.window_batch, "hann")


def _place(image: object) -> torch.device:
    """Return the device of a tensor, and the CPU for other images."""
    return image.device if isinstance(image, Tensor) else torch.device("cpu")
