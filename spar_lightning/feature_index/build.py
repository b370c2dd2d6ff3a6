"""Building of a feature index; any number of processes share the work."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spar_lightning.datasets.augmentation import Record
from spar_lightning.datasets.image_source import Source
from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.extract import Dtype, ahead, stored
from spar_lightning.feature_cache.plan import ShardPlan
from spar_lightning.feature_cache.shard import CacheError, Entry, Rejected
from spar_lightning.feature_index.parts import PART, PartialFeatures, complete, divided, image_of, part_of
from spar_lightning.image.codec import ImageError, decode_image, encode_jpeg, image_size
from spar_lightning.image.resize import at_most
from spar_lightning.image.rows import ImageRows, as_rows
from spar_lightning.segmentation.segmenter import Segmenter

ALGORITHM: Final = 1  # increase if the same network and image give different features
PREVIEW: Final = 512  # px, long side of the stored JPEG
THREADS: Final = 4  # decode images and encode previews while the network runs


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


class _Ready(NamedTuple):
    """Image (3, H, W), ready for the network; for a part of a large image, the path or the bytes of the file."""

    source: Source
    image: Tensor | Path | bytes
    preview: bytes
    record: Record


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
            **({} if segmenter.blocks is None else {"block_size": segmenter.blocks.window, "part_bytes": PART}),
        }
        made = {**vars(origin.absolute()), "torch": torch.__version__, "device": str(segmenter.device)}
        super().__init__(root, identity, made)
        self.plan = ShardPlan(root / "plan", root / "tmp", lambda images: self.sizes(images) / PART)
        self._partial: tuple[str, PartialFeatures] | None = None  # digest of the image that was read last
        self._damaged: dict[str, str] = {}  # digest of large images that cannot be read, and the reason

    def sizes(self, images: Images) -> NDArray[np.float64]:
        """Return the approximate size of the features of each image or part in bytes."""
        patches = (self._sides(images) / self.segmenter.backbone.patch_size).prod(axis=1)
        per_patch = self.segmenter.backbone.embed_dim * np.dtype(self.dtype).itemsize
        sizes: NDArray[np.float64] = per_patch * patches * self._shares(images)
        return sizes

    def _sides(self, images: Images) -> NDArray[np.float64]:
        """Return the approximate sides (N, 2) of the network's inputs in pixels."""
        sides = np.stack([images.rows["height"], images.rows["width"]], axis=1).astype(np.float64)
        limit = self.segmenter.max_side
        return sides if limit is None else sides / (sides.max(axis=1, keepdims=True) / limit).clip(min=1)

    @staticmethod
    def _shares(images: Images) -> NDArray[np.float64]:
        """Return the share (N) of an image that each part is; 1 for a whole image."""
        parts = [part_of(key.decode()) for key in images.keys.tolist()]
        return np.array([1 if part is None else (part.last - part.first) / part.rows for part in parts], np.float64)

    def divided(self, images: Images) -> Images:
        """Replace each image with large features by its parts; only with `block_size`."""
        if self.segmenter.blocks is None:
            return images
        large = {}
        sizes = self.sizes(images)
        for i in np.flatnonzero(sizes > PART).tolist():
            if part_of(images[i].key) is None:
                rows, _ = self.segmenter.grid(_size(images[i].file or images[i].read()))
                large[i] = (rows, max(1, int(rows * PART / sizes[i])))
        return divided(images, large) if large else images

    def blocks(self, images: Images) -> int:
        """Return the number of blocks into which images, or their parts, are divided; 0 without `block_size`."""
        if (blocks := self.segmenter.blocks) is None:
            return 0
        count, patch = 0.0, self.segmenter.backbone.patch_size
        sides = (images.rows[name].tolist() for name in ("height", "width"))
        for height, width, share in zip(*sides, self._shares(images).tolist(), strict=True):
            h, w = self.segmenter.grid((height, width))
            count += share * blocks.count(h * patch, w * patch)
        return round(count)

    def missing(self, images: Images) -> Images:
        """Return the images, or their parts, that have neither features nor an entry in the list of unusable images.

        Raises:
            CacheError: An image differs from the one with this name, whose features are complete.
        """
        todo = super().missing(self.divided(images))
        keys, digests = self.index.sources()
        whole = {name: digests[parts[0]] for name, parts in complete(list(map(bytes.decode, keys.tolist()))).items()}
        for i, key in enumerate(todo.keys.tolist()):
            name = image_of(key.decode())
            if name in whole and (whole[name] != todo.rows["digest"][i]).any():
                raise CacheError(
                    f"Image {name} differs from the image with this name in {self.root}. Set {self.option} to another "
                    "folder, or restore the original image."
                )
        return todo

    def unusable(self, images: Images) -> dict[str, str]:
        """Return those of the images that cannot be read, and the reason of each."""
        digests = {key.decode(): images[i].digest for i, key in enumerate(images.keys.tolist())}
        found = {image_of(key): item for key, (item, _) in self.index.rejected().items()}
        return {name: item.reason for name, item in found.items() if digests.get(name) == item.digest}

    def add(self, images: Images, show: bool = True) -> None:
        """Compute the features of new images, together with all other processes that call this method."""
        entries = self.divided(images)
        parts = any(part_of(key.decode()) for key in entries.keys.tolist())
        self.build(entries, self._make, show, "features", "part" if parts else "image")

    def _make(self, sources: Iterable[Source]) -> Iterator[Entry | Rejected]:
        """Yield the features of each image or part, or the reason why it cannot be read."""
        read = ahead(self._read, sources, 1)  # one thread, because streams are sequential
        found: _Ready | Entry | Rejected
        for found in ahead(self._decoded, read, THREADS):
            if not isinstance(found, Rejected):
                found = self._entry(found)
            if isinstance(found, Rejected) and part_of(found.key) is not None:
                self._damaged[found.digest] = found.reason
            yield found

    def _entry(self, ready: _Ready) -> Entry | Rejected:
        """Return the features of an image or part, or the reason why it has none; other images may be fine."""
        source, image, preview, record = ready
        if source.digest in self._damaged:  # without this part, the others are not needed
            return Rejected(source.key, source.digest, self._damaged[source.digest])
        try:
            values, ranges = stored(self._features(source, image), self.dtype, source.key)
        except (CacheError, ImageError) as error:
            return Rejected(source.key, source.digest, str(error))
        return Entry(source.key, source.digest, preview, values, record, ranges)

    def _read(self, source: Source) -> tuple[Source, bytes | Path]:
        """Return the bytes of an image; with `block_size` for an image in a folder, its path."""
        return source, (source.file if self.segmenter.blocks is not None else None) or source.read()

    def _decoded(self, item: tuple[Source, bytes | Path]) -> _Ready | Rejected:
        """Decode an image, except for the parts of a large one; record its size before `max_side`, and its preview."""
        source, content = item
        image: Tensor | Path | bytes
        part, preview = part_of(source.key), b""
        try:
            if part is not None:
                image, (height, width) = content, _size(content)
                if not part.first:  # one preview per image, for which the image is read to the end
                    preview = encode_jpeg(_rows(content).at_most(PREVIEW))
            else:
                height, width = _size(content)
                limit = self.segmenter.max_side
                if isinstance(content, bytes):
                    image = decode_image(content, True, source.key, limit)
                else:
                    source.check()
                    image = as_rows(content).at_most(limit or max(height, width))
                preview = encode_jpeg(at_most(image, PREVIEW))
        except ImageError as error:
            return Rejected(source.key, source.digest, str(error))
        return _Ready(source, image, preview, Record(height, width, 0, 0, height, width, False))

    def _features(self, source: Source, image: Tensor | Path | bytes) -> Tensor:
        """Return the features (h, w, d) of an image or a part."""
        if isinstance(image, Tensor):
            return self.segmenter.features(image)
        part = part_of(source.key)
        assert part is not None
        if self._partial is None or self._partial[0] != source.digest:
            source.check()
            rows = self.segmenter.rows(_rows(image))
            self._partial = source.digest, PartialFeatures(lambda first: self.segmenter.feature_rows(rows, first))
        return self._partial[1].read(part.first, part.last)


def _rows(content: Path | bytes) -> ImageRows:
    """Return the rows of an image, turned upright."""
    return as_rows(content) if isinstance(content, Path) else ImageRows.of(decode_image(content, upright=True))


def _size(content: Path | bytes) -> tuple[int, int]:
    """Return the height and width of an image in pixels, turned upright."""
    if isinstance(content, bytes):
        return image_size(content, upright=True)
    try:
        with content.open("rb") as file:
            return image_size(file, upright=True)
    except OSError as error:
        raise ShardError(f"{content} cannot be read ({error.strerror}). Restore the file.") from error
