"""Feature cache: the teacher's features on disk, as a folder of shards with a manifest and a plan.

    manifest.json   cache key (teacher, augmentation, seed, precision), see `feature_cache.manifest`
    scans/          index of each tar file or folder of images, see `datasets.shard_index`
    plan/           assignment of images to shards, see `feature_cache.plan`
    shards/         00000.h5, 00001.h5, .. with up to 64 samples each, see `feature_cache.shard`
    index.npz       sample key -> shard and row, derived from the shards, see `feature_cache.index`
    claims/, tmp/   leases on shards that are being built, see `files.leases`; unfinished files

The list of images is not part of the cache key: adding images extends the cache, and a training run can use a subset.
A shard is finished if and only if a file with its final name exists. Any number of processes on any number of machines
can build a cache together.
"""

import json
import logging
import os
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
from spar_lightning.files.leases import Claims
from spar_lightning.files.work_queue import clear_finished, share

# Converts sources to samples, in the same order; may compute samples in advance.
Make = Callable[[Iterable[Source]], Iterator[Entry | Rejected]]

REJECTED: Final = (10, 0.001)  # allowed number of unusable images: the larger of a count and a fraction

log = logging.getLogger("spar_lightning")


class FeatureCache:
    """Feature cache in a folder.

    Args:
        root: Folder of the cache; created if it does not exist.
        identity: Cache key: all settings that the features depend on, except the images themselves.
        provenance: Further information for the manifest, such as library versions and hardware. It is recorded when
            the manifest is written first, and never compared.

    Raises:
        CacheError: The folder contains a cache with a different cache key; the message lists the differences.

    Attributes:
        option: Option of the folder, in error messages.
        rebuild: Command that builds a cache in the folder {other}, in error messages.
        skipping: Whether any number of unusable images is accepted, unlike `REJECTED`.
    """

    option = "data.cache"
    rebuild = "run spar cache with the same --config and --data.cache {other} (for RenderedScenes: --data.root)"
    skipping = False

    def __init__(self, root: Path, identity: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> None:
        self.root = root
        self.identity = json.loads(json.dumps(identity))
        self.fingerprint = hash_json(self.identity)
        for folder in ("shards", "plan", "claims", "tmp"):
            make_folder(root / folder)
        if not self.manifest.exists():
            for name in sorted(shard_names(root))[:1]:  # a lost manifest is only rewritten for the same cache key
                FeatureShard(root / "shards" / name, self.fingerprint).close()
            content = {"fingerprint": self.fingerprint, "identity": self.identity, "made": dict(provenance or {})}
            publish(self.manifest, (json.dumps(content, indent=2) + "\n").encode(), root / "tmp")
        # An older version may have used other names in the cache key.
        self.fingerprint = compare(root, self.identity, self.rebuild)
        self.index = CacheIndex(root, self.fingerprint)
        self.plan = ShardPlan(root / "plan", root / "tmp")
        self.claims = Claims(root / "claims")

    @property
    def manifest(self) -> Path:
        """Path of the manifest, which records the cache key."""
        return self.root / "manifest.json"

    @property
    def shards(self) -> Path:
        """Folder of the shards."""
        return self.root / "shards"

    def missing(self, images: Images) -> Images:
        """Return the images that have neither features nor an entry in the list of unusable images.

        Raises:
            CacheError: An image differs from the cached image with the same key, or a shard is damaged.
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
                f"Image {source.key} in {source.location} differs from the image with this key in {self.root}. "
                f"Set {self.option} to another folder, or restore the original images."
            )
        # If the bytes of an unusable image have changed, try it again.
        rejected = {key: item.digest for key, (item, _) in self.index.rejected().items()}
        for i in self._listed(images, list(rejected)):
            built[i] = images[i].digest == rejected[images[i].key]
        return images.take(~built)

    @staticmethod
    def _listed(images: Images, keys: list[str]) -> list[int]:
        """Return the indices of the images with these keys."""
        places: list[int] = np.flatnonzero(find(np.sort(key_array(keys)), images.keys) >= 0).tolist()
        return places

    def build(
        self, images: Images, make: Make, show: bool = True, what: str = "teacher features", unit: str = "image"
    ) -> None:
        """Compute the missing features, together with all other processes that call this method.

        Returns when all images are done, including those that other processes work on. Finished shards are kept if
        the build is interrupted.

        Args:
            images: Images to compute features for.
            make: Function that computes samples from images.
            show: Whether to show a progress bar.
            what: Title of the progress bar.
            unit: What the bar counts.

        Raises:
            CacheError: Too many images are unusable.
            OSError: A shard cannot be written. Finished shards are kept.
        """
        todo = self.missing(images)
        self._check_rejected(images)
        self.index.save()
        if not len(todo):
            clear_finished(self.claims, self.shards)
            return
        if not os.access(self.root, os.W_OK):
            raise CacheError(
                f"{len(todo)} of {len(images)} images have no features in {self.root}, which is read-only. Make it "
                f"writable, or set {self.option} to another folder."
            )
        sweep(self.root / "tmp")
        bar: tqdm[Any]
        with tqdm(total=len(todo), desc=what, unit=unit, disable=not show) as bar:
            # Repeat until nothing is missing: another process may have planned some of these images differently.
            while len(todo):
                self._build(images, self.plan.extend(todo, self.index.numbers), make, bar)
                todo = self.missing(images)
                bar.n = (bar.total or 0) - len(todo)
                bar.refresh()
        self.index.save()
        self._check_rejected(images)

    def _build(
        self,
        images: Images,
        planned: dict[str, Images],
        make: Make,
        bar: "tqdm[Any]",
    ) -> None:
        """Build planned shards (file name -> images) and wait until all of them exist."""
        before, total = len(self.index) - bar.n, bar.total or 0
        allowed = -1

        def progress() -> None:
            """Update the bar and check the unusable images; the work of other processes is included with a lag."""
            nonlocal allowed
            self.index.refresh_seldom()
            bar.n = max(bar.n, min(len(self.index) - before, total))
            if self.index.quarantined > allowed:
                allowed = self._check_rejected(images)

        def wait(holder: str) -> None:
            progress()
            bar.set_postfix_str(f"waiting for {holder}")

        def compute(name: str) -> Callable[[], None]:
            made = []
            for item in make(map(planned[name].__getitem__, range(len(planned[name])))):
                made.append(item)
                bar.update()

            def finish() -> None:
                write_shard(self.shards / name, made, self.fingerprint, self.root / "tmp")
                self.index.add(name)
                progress()

            return finish

        share(list(planned), self.claims, self.shards, compute, wait)

    def _check_rejected(self, images: Images) -> int:
        """Raise CacheError if more images are unusable than `REJECTED` allows.

        Returns:
            Number of entries in `index.quarantined` up to which the result of this check cannot change.
        """
        limit = max(REJECTED[0], REJECTED[1] * len(images))
        most = len(images) if self.skipping else int(min(limit, len(images) - 1))
        if self.index.quarantined <= most:
            return most
        rejected = self.index.rejected()
        mine = [images[i].key for i in self._listed(images, list(rejected))]
        if len(mine) <= most:
            return self.index.quarantined + most - len(mine)
        rows = "\n".join(f"  {key}: {rejected[key][0].reason} (shards/{rejected[key][1]})" for key in mine[:10])
        allowed = "No images are left to train on." if len(mine) == len(images) else f"At most {limit:.0f} are allowed."
        raise CacheError(
            f"{len(mine)} of {len(images)} images cannot be used. The first ones:\n{rows}\n{allowed} Fix them or "
            "exclude them with data.keys, and start again. To retry unchanged files, delete the shards in brackets."
        )

    def dataset(self, keys: NDArray[np.bytes_]) -> CachedFeatures:
        """Return a dataset of the samples with these keys, in this order, without unusable images.

        Raises:
            CacheError: The cache has no features for some of the keys.
        """
        self.index.refresh()
        names, known, shard, row = self.index.places()
        place = find(known, keys)
        unusable = (place < 0) & (find(np.sort(key_array(self.index.rejected())), keys) >= 0)
        missing = keys[(place < 0) & ~unusable]
        if len(missing):
            raise CacheError(
                f"{len(missing)} of {len(keys)} images have no features in {self.root} (first: {missing[0].decode()}). "
                "Run `spar cache` or `spar fit` with the same data.shards to compute them."
            )
        if unusable.any():
            log.warning("%d of %d images are skipped; `spar cache info` shows the reasons.", unusable.sum(), len(keys))
        place = place[~unusable]
        return CachedFeatures(self.shards, names, known[place], shard[place], row[place], self.fingerprint)
