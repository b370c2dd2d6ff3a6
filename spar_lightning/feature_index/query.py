"""Queries on a feature index: segmentation maps and areas of any classes, without running the network."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.feature_cache.dataset import CachedFeatures
from spar_lightning.feature_cache.index import CacheIndex
from spar_lightning.feature_cache.manifest import read_manifest
from spar_lightning.feature_cache.plan import ShardPlan
from spar_lightning.feature_cache.shard import CacheError
from spar_lightning.feature_index.build import Origin
from spar_lightning.feature_index.parts import complete, image_of
from spar_lightning.refinement.anyup import BILINEAR
from spar_lightning.segmentation.label_map import SimilarityMaps, Thresholds, label_map
from spar_lightning.segmentation.prompts import Classes, TextClassifier
from spar_lightning.segmentation.similarity import PatchSimilarities, patch_similarities
from spar_lightning.segmentation.text_embeddings import text_classifier
from spar_lightning.student import Student, load_student

log = logging.getLogger("spar_lightning")


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
        images = complete([key.decode() for key in keys.tolist()])
        if not images:
            raise CacheError(f"{root} contains no complete image. Run spar index to the end.")
        self.names, self._parts = list(images), list(images.values())
        self.unfinished = 0
        if (self.root / "plan").exists():  # a copy may have the shards only
            planned, numbers, _ = ShardPlan(self.root / "plan", self.root / "tmp").read()
            todo = np.setdiff1d(planned["key"][~np.isin(numbers, index.numbers)], keys)
            self.unfinished = len({image_of(key.decode()) for key in todo.tolist()})
        unusable = {image_of(key): item.reason for key, (item, _) in index.rejected().items()}
        self.rejected = {name: reason for name, reason in unusable.items() if name not in images}
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
        if student.config.refine is not None and "block_size" in self.identity:
            log.warning("Queries do not use the refinement of %s: the index was built with block_size.", origin.source)
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
        return torch.cat(list(self._rows(index)))

    def _rows(self, index: int) -> Iterator[Tensor]:
        """Yield the features (n, w, d) of each part of an image; most images have one part."""
        for part in self._parts[index]:
            shard, row = self._samples.locate(part)
            yield shard.features(row)

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        shard, row = self._samples.locate(self._parts[index][0])
        return shard.record(row)[:2]

    def preview(self, index: int) -> Tensor:
        """Return a small version (3, H, W) uint8 of an image, with a long side of at most 512 px."""
        shard, row = self._samples.locate(self._parts[index][0])
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
        if "block_size" not in self.identity:
            backbone, refine = self.student.backbone, self.student.config.refine
            return patch_similarities(self.features(index), text.embeddings, refine, backbone.patch_size)
        grids = [shard.hw[row].tolist() for shard, row in map(self._samples.locate, self._parts[index])]
        size = sum(h for h, _ in grids), grids[0][1]
        return PatchSimilarities(lambda: self._rows(index), size, text.embeddings)


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
