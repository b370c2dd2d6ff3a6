"""The teacher's features on disk: a folder of shards with a manifest and a plan.

    manifest.json   identity of the cache (teacher, augmentation, seed, precision), see `manifest`
    scans/          what lies in each tar or folder of images, see `scan`
    plan/           which images belong to which shard, see `shard_plan`
    shards/         00000.h5 .. of up to 64 samples each, see `feature_shard`
    index.npz       key -> shard and row; made from the shards, see `cache_index`
    claims/, tmp/   who works on what; unfinished files

The list of images is no part of the identity: more images extend a cache, and training on a subset
selects from it. A shard is done when it exists under its final name; nothing else is believed. Any
number of processes on any number of machines build a cache together, see `claims`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from spar_lightning.datasets.image_source import Source, key_array
from spar_lightning.datasets.image_table import Images, find
from spar_lightning.feature_cache.dataset import CachedFeatures
from spar_lightning.feature_cache.index import CacheIndex, shard_names
from spar_lightning.feature_cache.manifest import compare
from spar_lightning.feature_cache.plan import ShardPlan
from spar_lightning.feature_cache.shard import CacheError, Entry, FeatureShard, Rejected, write_shard
from spar_lightning.files.atomic import make_folder, publish, sweep
from spar_lightning.files.hashing import hash_json
from spar_lightning.files.work_queue import Claims, share

# Turns sources into samples, in order; it may work ahead.
Make = Callable[[Iterable[Source]], Iterator[Entry | Rejected]]

REJECTED: Final = (10, 0.001)  # images that may be unusable: the larger of a number and a share

log = logging.getLogger("spar_lightning")


class FeatureCache:
    """A cache folder of one identity.

    Args:
        root: The folder; made when it is missing.
        identity: Everything that the features depend on, apart from the images themselves.
        provenance: What is worth knowing and changes nothing: versions, hardware. Kept as the first builder had it.

    Raises:
        CacheError: The folder holds a cache of another identity; the sentence lists the differences.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> None:
        self.root = root
        self.identity = json.loads(json.dumps(identity))
        self.fingerprint = hash_json(self.identity)
        for folder in ("shards", "plan", "claims", "tmp"):
            make_folder(root / folder)
        if not self.manifest.exists():
            for name in sorted(shard_names(root))[:1]:  # a manifest was lost: it is written anew for the same features
                FeatureShard(root / "shards" / name, self.fingerprint).close()
            content = {"fingerprint": self.fingerprint, "identity": self.identity, "made": dict(provenance or {})}
            publish(self.manifest, (json.dumps(content, indent=2) + "\n").encode(), root / "tmp")
        self.fingerprint = compare(root, self.identity)  # an older version may have hashed it in other words
        self.index = CacheIndex(root, self.fingerprint)
        self.plan = ShardPlan(root / "plan", root / "tmp")

    @property
    def manifest(self) -> Path:
        """The file that says whose features these are."""
        return self.root / "manifest.json"

    def missing(self, images: Images) -> Images:
        """Those of the images that have neither features nor a reason why they cannot.

        Raises:
            CacheError: One of them is another image than the one whose features lie here; or a shard is damaged.
        """
        self.index.refresh()
        keys, digests = self.index.sources()
        place = find(keys, images.keys)
        built = place >= 0
        other = built.copy()
        other[built] = (digests[place[built]] != images.rows["digest"][built]).any(axis=1)
        if other.any():
            source = images[int(other.argmax())]
            raise CacheError(
                f"The image {source.key} in {source.location} is not the one whose features lie in {self.root}. "
                "Name another folder in data.cache, or restore the old shard."
            )
        # A rejected image that has other bytes now was mended: it is tried again.
        rejected = {key: item.digest for key, (item, _) in self.index.rejected().items()}
        for i in self._listed(images, list(rejected)):
            built[i] = images[i].digest == rejected[images[i].key]
        return images.take(~built)

    @staticmethod
    def _listed(images: Images, keys: list[str]) -> list[int]:
        """Places of the images with these keys."""
        places: list[int] = np.flatnonzero(find(np.sort(key_array(keys)), images.keys) >= 0).tolist()
        return places

    def build(self, images: Images, make: Make, show: bool = True, what: str = "teacher features") -> None:
        """Compute the features that are missing, together with every other process that does.

        Returns when all of them are there, whoever made them. Finished shards stay if this is cut off.

        Args:
            images: What should have features afterwards.
            make: The samples of images.
            show: Whether to draw a progress bar.
            what: Its title.

        Raises:
            CacheError: Too many images cannot be used.
            OSError: A shard cannot be written; those that are finished stay.
        """
        todo = self.missing(images)
        self._check_rejected(images)
        self.index.save()
        if not len(todo):
            return
        sweep(self.root / "tmp")
        bar: tqdm[Any]
        with tqdm(total=len(todo), desc=what, unit="image", disable=not show) as bar:
            # Again while something is missing: another builder may have planned a part of it in another way.
            while len(todo):
                self._build(images, self.plan.extend(todo, self.index.numbers), make, bar)
                todo = self.missing(images)
        self.index.save()
        self._check_rejected(images)

    def _build(
        self,
        images: Images,
        planned: dict[str, Images],
        make: Make,
        bar: "tqdm[Any]",
    ) -> None:
        """Make planned shards, by file name, until all of them are there."""
        before, total = len(self.index) - bar.n, bar.total or 0

        def compute(name: str) -> Callable[[], None]:
            made = []
            for item in make(map(planned[name].__getitem__, range(len(planned[name])))):
                made.append(item)
                bar.update()

            def finish() -> None:
                write_shard(self.root / "shards" / name, made, self.fingerprint, self.root / "tmp")
                self.index.refresh()
                bar.n = max(bar.n, min(len(self.index) - before, total))  # others' work counts too
                self._check_rejected(images)

            return finish

        share(
            list(planned),
            Claims(self.root / "claims"),
            lambda: shard_names(self.root),
            compute,
            lambda holder: bar.set_postfix_str(f"waiting for {holder}"),
        )

    def _check_rejected(self, images: Images) -> None:
        """Stop when more images cannot be used than chance explains."""
        limit = max(REJECTED[0], REJECTED[1] * len(images))
        if self.index.quarantined <= min(limit, len(images) - 1):
            return
        rejected = self.index.rejected()
        mine = [images[i].key for i in self._listed(images, list(rejected))]
        if len(mine) < len(images) and len(mine) <= limit:
            return
        rows = "\n".join(f"  {key}: {rejected[key][0].reason} (shards/{rejected[key][1]})" for key in mine[:10])
        allowed = "Nothing is left to train on." if len(mine) == len(images) else f"Allowed are {limit:.0f}."
        raise CacheError(
            f"{len(mine)} of {len(images)} images cannot be used, the first of them\n{rows}\n{allowed} Mend them, or "
            "leave them out with data.keys, and start again; to try the same bytes again, delete those shards."
        )

    def dataset(self, keys: NDArray[np.bytes_]) -> CachedFeatures:
        """The samples with these keys, in this order, without those that were rejected.

        Raises:
            CacheError: Some of them are not in the cache.
        """
        self.index.refresh()
        names, known, shard, row = self.index.places()
        place = find(known, keys)
        unusable = (place < 0) & (find(np.sort(key_array(self.index.rejected())), keys) >= 0)
        missing = keys[(place < 0) & ~unusable]
        if len(missing):
            raise CacheError(
                f"{len(missing)} of {len(keys)} images have no features in {self.root}, the first of them "
                f"{missing[0].decode()}. `spar cache` and `spar fit` build them; run one with the same data.shards."
            )
        if unusable.any():
            log.warning("%d of %d images cannot be used; `spar cache info` says why.", unusable.sum(), len(keys))
        place = place[~unusable]
        return CachedFeatures(self.root / "shards", names, known[place], shard[place], row[place], self.fingerprint)
