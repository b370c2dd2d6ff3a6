"""`spar cache info` and `spar cache verify`: description and integrity check of a feature cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tqdm import tqdm

from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.image_table import from_file
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.streaming import augmented
from spar_lightning.feature_cache.activations import folders
from spar_lightning.feature_cache.extract import encoded
from spar_lightning.feature_cache.index import CacheIndex, shard_names
from spar_lightning.feature_cache.manifest import read_manifest
from spar_lightning.feature_cache.shard import CacheError, FeatureShard
from spar_lightning.feature_index.parts import complete, image_of
from spar_lightning.files.atomic import is_dead
from spar_lightning.files.leases import Claims
from spar_lightning.formatting import bytes_text

# Largest relative error of recomputed features. Storage alone gives 2e-4 as float16 and up to 1e-2 as int8.
AGREEMENT: Final = {"float32": 1e-2, "float16": 1e-2, "int8": 2e-2}


def show(root: Path) -> int:
    """Print the content of a cache: cache key, number of images, size, rejected images, work in progress."""
    manifest = read_manifest(root)
    index = CacheIndex(root, manifest["fingerprint"])
    index.refresh()
    shards = [root / "shards" / name for name in sorted(shard_names(root))]
    size = sum(path.stat().st_size for path in shards)
    count, unusable = len(index), index.rejected()
    if "index" in manifest["identity"]:  # it can contain parts of large images
        images = complete([key.decode() for key in index.sources()[0].tolist()])
        count = len(images)
        unusable = {image_of(key): found for key, found in unusable.items() if image_of(key) not in images}
    print(f"{root}: {count:,} images with features, {bytes_text(size)}; shards: {len(shards):,}")
    print(f"fingerprint {manifest['fingerprint']}")
    for part in ("identity", "made"):
        print(f"{part}:")
        _print_tree(manifest[part], "  ")
    for tokens in folders(root):
        sizes = [path.stat().st_size for path in (tokens / "shards").glob("*.h5")]
        print(f"{tokens.name}: activations of the frozen blocks, {bytes_text(sum(sizes))}; shards: {len(sizes):,}")
    for key, (item, name) in unusable.items():
        print(f"cannot be used: {key} ({item.reason}), listed in shards/{name}")
    for folder in (root, *folders(root)):
        for name, holder in _in_progress(folder):
            print(f"in progress: {(folder / name).relative_to(root)} by {holder}")
    return 0


def _in_progress(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield shards and indexes with a lease, and the owner; a kill leaves leases of dead owners and finished items."""
    claims = Claims(folder / "claims")
    for name in sorted(claims.names()):
        holder = claims.holder(name)
        if not (is_dead(holder) or (folder / "shards" / name).exists() or (folder / "scans" / name).exists()):
            yield name, holder


def _print_tree(tree: object, indent: str) -> None:
    assert isinstance(tree, dict)
    for name, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_tree(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


def verify(root: Path) -> int:
    """Read all data of a cache and compare it with its checksums; exit with 1 if anything is damaged."""
    damaged = [line for folder in (root, *folders(root)) for line in _damaged(folder)]
    for path in [*(root / "plan").glob("*.npz"), *(root / "scans").glob("*.npz")]:
        try:
            from_file(path)
        except ShardError as error:
            damaged.append(str(error))
    print("\n".join(damaged), end="\n" if damaged else "")
    return 1 if damaged else 0


def _damaged(folder: Path) -> list[str]:
    """Return the errors in the shards of a cache or of cached activations; print how many shards are intact."""
    expected = read_manifest(folder)["fingerprint"]
    paths = [folder / "shards" / name for name in sorted(shard_names(folder))]
    damaged, samples = [], 0
    for path in tqdm(paths, desc="verifying", unit="shard", leave=False):
        try:
            with FeatureShard(path, expected) as shard:
                for row in range(len(shard.keys)):
                    shard.check(row)
                samples += len(shard.keys)
        except CacheError as error:
            damaged.append(str(error))
    where = f" of {folder.name}" if folder in folders(folder.parent) else ""
    print(f"{samples:,} samples in {len(paths) - len(damaged):,} of {len(paths):,} shards{where} are intact")
    return damaged


def recompute(datamodule: SA1B, count: int) -> None:
    """Compute samples of a cache again from their source images, and compare.

    Args:
        datamodule: Data module of the configuration.
        count: Number of samples, spread evenly over the cache.

    Raises:
        CacheError: Features differ by more than other numerical kernels explain.
    """
    cache, images = datamodule.open_cache(), datamodule.images()
    dataset = cache.dataset(images.keys)
    places = {key: i for i, key in enumerate(images.keys.tolist())}
    features = datamodule.teacher_features().features
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)):
        sample = dataset[int(index)]
        assert sample.features is not None
        source = images[places[sample.key.encode()]]
        image, _ = augmented(source.key, source.read(), datamodule.augmentation, datamodule.seed)
        _, image = encoded(image, datamodule.cache_dtype)
        same = image.shape == sample.image.shape and torch.equal(image, sample.image)
        stored, fresh = sample.features.float(), features(sample.image).cpu().float()
        error = ((fresh - stored).norm() / stored.norm()).item()
        print(f"{sample.key}: relative error {error:.1e}, image {'identical' if same else 'differs'}")
        if not error <= (allowed := AGREEMENT[datamodule.cache_dtype]):
            raise CacheError(
                f"The cached features of {sample.key} differ from those of this configuration: relative error "
                f"{error:.1e}, allowed {allowed}. Build the cache again in another folder (data.cache)."
            )
