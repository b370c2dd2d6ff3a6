"""Index of images: their dense features, computed once, and then queried with any class names.

The folder is a feature cache with other content: the features of the network that `spar predict` would run, the size of
each image, and a small JPEG of it for pictures. A query runs the text encoder only.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from spar_lightning.datasets.augmentation import Record
from spar_lightning.datasets.image_source import Source
from spar_lightning.datasets.image_table import Images
from spar_lightning.errors import UserError
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.dataset import CachedFeatures
from spar_lightning.feature_cache.extract import Dtype, ahead, stored
from spar_lightning.feature_cache.index import CacheIndex
from spar_lightning.feature_cache.manifest import read_manifest
from spar_lightning.feature_cache.plan import ShardPlan
from spar_lightning.feature_cache.shard import CacheError, Entry, Rejected
from spar_lightning.image.codec import ImageError, decode_image, encode_jpeg, image_size
from spar_lightning.image.resize import at_most
from spar_lightning.refinement.anyup import BILINEAR
from spar_lightning.segmentation.label_map import SimilarityMaps, Thresholds, label_map
from spar_lightning.segmentation.prompts import Classes, TextClassifier
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.similarity import patch_similarities
from spar_lightning.segmentation.text_embeddings import text_classifier
from spar_lightning.student import Student, load_student

ALGORITHM: Final = 1  # increase if the same network and image give different features
PREVIEW: Final = 512  # px, long side of the stored JPEG
THREADS: Final = 4  # decode images and encode previews while the network runs

log = logging.getLogger("spar_lightning")


@dataclass(frozen=True)
class Origin:
    """Arguments of `load_student` with which the network was loaded, and the images, for queries."""

    source: str
    config: str | None = None
    arguments: Mapping[str, Any] | None = None
    images: Sequence[str] = ()

    def absolute(self) -> "Origin":
        """Return the same with absolute paths; names of backbones, configurations and repositories stay as they are."""
        source = os.path.abspath(self.source) if os.path.exists(self.source) else self.source
        arguments = {name: _absolute(value) for name, value in (self.arguments or {}).items()}
        config = None if self.config is None else _absolute(self.config)
        return Origin(source, config, arguments, [os.path.abspath(path) for path in self.images])


def _absolute(value: Any) -> Any:
    """Return the absolute path of an existing file; other values stay as they are."""
    return os.path.abspath(value) if isinstance(value, str) and os.path.isfile(value) else value


class WritableIndex(FeatureCache):
    """Feature index that images are added to.

    Args:
        root: Folder of the index; created if it does not exist.
        segmenter: Segmenter that computes the features; it needs no classes.
        dtype: Precision of the stored features.
        origin: Origin of the network.

    Raises:
        CacheError: The folder contains features of another network or with other settings.
    """

    option = "--out"
    rebuild = "run spar index with --out {other}"
    skipping = True

    def __init__(self, root: Path, segmenter: Segmenter, dtype: Dtype, origin: Origin) -> None:
        self.segmenter, self.dtype = segmenter, dtype
        backbone, windows = segmenter.backbone, segmenter.windows
        identity = {
            "index": ALGORITHM,
            "network": backbone.identity(),
            "inference": {"inference": "single"} if windows is None else windows.identity(),
            "attention": backbone.attention_identity() if windows is None else None,
            "patch_fit": segmenter.config.patch_fit,
            "max_side": segmenter.max_side,
            "dtype": dtype,
        }
        made = {**vars(origin.absolute()), "torch": torch.__version__, "device": str(segmenter.device)}
        super().__init__(root, identity, made)

    def size_of(self, images: Images) -> float:
        """Return the approximate size of the features of these images in bytes."""
        sides = np.stack([images.rows["height"], images.rows["width"]], axis=1).astype(np.float64)
        if self.segmenter.max_side is not None:
            sides /= (sides.max(axis=1, keepdims=True) / self.segmenter.max_side).clip(min=1)
        patches = (sides / self.segmenter.backbone.patch_size).prod(axis=1).sum()
        return float(patches * self.segmenter.backbone.embed_dim * np.dtype(self.dtype).itemsize)

    def add(self, images: Images, show: bool = True) -> None:
        """Compute the features of new images, together with all other processes that call this method."""
        self.build(images, self._make, show, "features")

    def _make(self, sources: Iterable[Source]) -> Iterator[Entry | Rejected]:
        """Yield the features of each image, or the reason why it cannot be read."""
        read = ahead(lambda source: (source, source.read()), sources, 1)  # one thread, because streams are sequential
        for found in ahead(self._decoded, read, THREADS):
            if isinstance(found, Rejected):
                yield found
                continue
            source, pixels, preview, record = found
            features = self.segmenter.features(pixels)
            try:
                values, ranges = stored(features, self.dtype, source.key)
            except CacheError as error:  # the other images may be fine
                yield Rejected(source.key, source.digest, str(error))
            else:
                yield Entry(source.key, source.digest, preview, values, record, ranges)

    def _decoded(self, item: tuple[Source, bytes]) -> tuple[Source, Tensor, bytes, Record] | Rejected:
        """Return an image (3, H, W), its preview, and a record with its size before `max_side`."""
        source, content = item
        try:
            pixels = decode_image(content, True, source.key, self.segmenter.max_side)
        except ImageError as error:
            return Rejected(source.key, source.digest, str(error))
        height, width = image_size(content, upright=True)
        record = Record(height, width, 0, 0, height, width, False)
        return source, pixels, encode_jpeg(at_most(pixels, PREVIEW)), record


class FeatureIndex:
    """Features of images that `spar index` has stored, for queries with any class names.

    Args:
        root: Folder of the index. Images may be added while it is read; they are found when it is opened again.
        weights: Weights of the network, if they were moved since the index was built; None uses the recorded path.
        config: YAML file of these weights, if they do not record their network.
        backbone: Arguments of the backbone that override the recorded ones, such as {"text_weights": path}.

    Attributes:
        names: Name of each image: its path in the indexed folder or tar file.
        rejected: Images that could not be read, with the reason.
        locations: Folder or tar files of the images, as they were when the index was built first.
        unfinished: Number of images whose features are not computed yet.

    Raises:
        CacheError: The folder is not an index, is damaged, or contains no images.
        UserError: `config` is set without `weights`.
    """

    def __init__(
        self,
        root: str | Path,
        weights: str | Path | None = None,
        config: str | Path | None = None,
        backbone: Mapping[str, Any] | None = None,
    ) -> None:
        self.root = Path(root)
        if config is not None and weights is None:
            raise UserError("config describes the network of weights, which are missing. Pass both or none.")
        manifest = read_manifest(self.root)
        if "index" not in manifest["identity"]:
            raise CacheError(f"{root} is a cache for training, not an index. Build one with spar index --out FOLDER.")
        self.identity, made = manifest["identity"], manifest["made"]
        self._moved = weights is None and os.path.isabs(made["source"]) and not os.path.exists(made["source"])
        recorded = (made["source"], made["config"])
        self.locations: list[str] = made["images"]
        source, yaml = recorded if weights is None else (str(weights), None if config is None else str(config))
        self.origin = Origin(source, yaml, {**made["arguments"], **(backbone or {})})
        index = CacheIndex(self.root, manifest["fingerprint"])
        index.refresh()
        shards, keys, shard, row = index.places()
        if not len(keys):
            raise CacheError(f"{root} contains no images. Run spar index to the end.")
        self.names = [key.decode() for key in keys.tolist()]
        self.unfinished = 0
        if (self.root / "plan").exists():  # a copy may have the shards only
            planned, numbers, _ = ShardPlan(self.root / "plan", self.root / "tmp").read()
            self.unfinished = len(np.setdiff1d(planned["key"][~np.isin(numbers, index.numbers)], keys))
        self.rejected = {key: item.reason for key, (item, _) in index.rejected().items()}
        self._samples = CachedFeatures(self.root / "shards", shards, keys, shard, row, manifest["fingerprint"])

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def student(self) -> Student:
        """Network of the features, on the CPU; only its text encoder is used.

        Raises:
            UserError: The weights cannot be loaded, or are not those of the features.
        """
        origin = self.origin
        if self._moved:
            raise UserError(
                f"The weights of {self.root} are not in {origin.source} anymore. Pass their path: --weights, or "
                "FeatureIndex(.., weights=..) in Python."
            )
        student = load_student(origin.source, origin.config, backbone=origin.arguments)
        if student.config.upsampler != BILINEAR:
            log.warning("Queries do not use the upsampler of %s: similarities are upsampled bilinearly.", origin.source)
        if student.backbone.identity() != self.identity["network"]:
            raise UserError(
                f"{origin.source} are not the weights with which the features in {self.root} were computed. Pass those "
                "weights (--weights), or build the index again."
            )
        return student

    def classifier(self, classes: Classes) -> TextClassifier:
        """Return the text classifier of classes, which all other methods also accept.

        Args:
            classes: Class names, or a mapping from label to several names.
        """
        return text_classifier(self.student.backbone, classes, self.student.config.templates)

    def features(self, index: int) -> Tensor:
        """Return the features (h, w, d) of an image as stored, not normalized."""
        shard, row = self._samples.locate(index)
        return shard.features(row)

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        shard, row = self._samples.locate(index)
        return shard.record(row)[:2]

    def preview(self, index: int) -> Tensor:
        """Return a small version (3, H, W) uint8 of an image, with a long side of at most 512 px."""
        shard, row = self._samples.locate(index)
        return shard.image(row)

    @torch.no_grad()
    def labels(
        self, index: int, classes: Classes | TextClassifier, *, size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.long,
    ) -> Tensor:  # fmt: skip
        """Return the class index of each pixel (H, W) of an image, as `Segmenter` does from the same features.

        Args:
            index: Index of the image in `names`.
            classes: Class names or a classifier.
            size: Height H and width W of the result; None uses those of the image.
            dtype: Integer type of the class indices.
        """
        text = self._text(classes)
        return label_map(self._maps(index, text), text.owner, size or self.size(index), Thresholds(), dtype)

    @torch.no_grad()
    def areas(self, classes: Classes | TextClassifier, indices: Iterable[int] | None = None) -> Iterator[Tensor]:
        """Yield the fraction of the patches that each class covers (C), one image after another.

        Args:
            classes: Class names or a classifier.
            indices: Indices of the images in `names`; None yields all images.
        """
        text = self._text(classes)
        for index in range(len(self)) if indices is None else indices:
            maps = self._maps(index, text)
            patches = label_map(maps, text.owner, maps.size, Thresholds())
            yield patches.flatten().bincount(minlength=len(text.labels)) / patches.numel()

    def _text(self, classes: Classes | TextClassifier) -> TextClassifier:
        return classes if isinstance(classes, TextClassifier) else self.classifier(classes)

    def _maps(self, index: int, text: TextClassifier) -> SimilarityMaps:
        backbone, refine = self.student.backbone, self.student.config.refine
        return patch_similarities(self.features(index), text.embeddings, refine, backbone.patch_size)


def ranking(areas: Sequence[Tensor], label: int, most: int) -> list[int]:
    """Return the indices of the images with the largest area of a class, at most `most`, without those that lack it.

    Args:
        areas: Fractions of each image (C), from `FeatureIndex.areas`.
        label: Index of the class.
        most: Number of images.
    """
    values = torch.stack(list(areas))[:, label]
    order: list[int] = values.argsort(descending=True, stable=True).tolist()
    return [i for i in order[:most] if values[i] > 0]
