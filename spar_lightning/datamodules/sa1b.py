"""SA1B: data module with image shards and a feature cache for training, and labeled validation sets.

With `cache` set, all ranks together compute missing features before training starts, and every epoch reads them. With
`cache: null`, the data loader augments the images and the teacher runs in the training step. In both cases, the
augmentation of an image is drawn once and is the same in every epoch.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from spar_lightning.datamodules.dataloader import ResumableLoader
from spar_lightning.datamodules.epoch_length import set_epoch_length
from spar_lightning.datamodules.packed_sampler import PackOrder
from spar_lightning.datamodules.samplers import EpochOrder, RankSlice, StreamOrder
from spar_lightning.datasets.augmentation import PRESETS, Augmentation
from spar_lightning.datasets.image_table import Images, find
from spar_lightning.datasets.loader import one_by_one
from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.datasets.shard_index import expand, scan_all
from spar_lightning.datasets.shard_stream import is_streamed
from spar_lightning.datasets.streaming import SourceImages
from spar_lightning.datasets.subset import select
from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.benchmark import opened_later
from spar_lightning.feature_cache.activations import ActivationCache, CachedActivations
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.cost import augmented_sizes
from spar_lightning.feature_cache.dataset import CachedFeatures
from spar_lightning.feature_cache.extract import Dtype, Teacher, TeacherFeatures
from spar_lightning.files.hashing import sha256
from spar_lightning.files.home import expand_home

SHORT_PACK = 16  # images per step of a dry run with sequence packing


class SA1B(LightningDataModule):
    """Unlabeled training images in tar files or folders, and labeled validation sets.

    Args:
        shards: Training images in SA-1B's layout: tar files (plain or gzipped), URLs of tar files, `pipe:` commands
            that print a tar file, or image folders. One path or brace pattern, or a list of them.
        cache: Folder of the feature cache; missing features are computed before training. null disables the cache: the
            teacher then runs in each training step.
        augmentation: Random resize, crop and flip, drawn once per image: a preset, and options that override it.
        benchmarks: Validation sets: bundled benchmarks such as voc21 (`spar evaluate --help` has their names), sets of
            them (paper6, standard8, standard10), YAML files, or folders with benchmark.yaml, images/ and labels/.
        benchmark_root: Folder that contains the data of the bundled benchmarks; null if none of them is used.
        max_images: Use only this number of images, the first ones of the shards; null uses all.
        fraction: Fraction of the images to use (above 0, at most 1), chosen by a hash of their keys: a larger fraction
            contains a smaller one. null uses all.
        keys: Keys of the images to use, as a list or as a text file with one key per line. A key is a file name without
            suffix. null uses all.
        batch_size: Images per step and device; the paper uses 1.
        num_workers: Loader processes per device, for training and for validation each; also the number of threads that
            decode images for the teacher. 0 loads in the main process.
        seed: Seed of the augmentation and of the order of training.
        cache_dtype: Precision of the features; int8 stores images as JPEG.
        cache_activations: Also cache the activations that enter the first trainable block, in a folder of the cache. A
            step then runs only the trainable blocks and reads no image.
        pack_tokens: Sequence packing: maximum number of patches in a step, such as 16384. A step processes as many
            images as fit, in one packed sequence, instead of batch_size; null uses batch_size.

    Raises:
        UserError: If an option is outside its range or conflicts with another option.
    """

    def __init__(
        self,
        shards: str | list[str],
        cache: str | None = None,
        augmentation: Augmentation = Augmentation(),
        benchmarks: Sequence[str] = (),
        benchmark_root: str | None = None,
        max_images: int | None = None,
        fraction: float | None = None,
        keys: str | list[str] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        cache_dtype: Dtype = "float16",
        cache_activations: bool = False,
        pack_tokens: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, max_images=max_images, pack_tokens=pack_tokens)
        check_at_least(0, num_workers=num_workers, seed=seed)
        if fraction is not None and not 0 < fraction <= 1:
            raise UserError(f"data.fraction must be above 0 and at most 1, but got {fraction}.")
        if cache_activations and cache is None:
            raise UserError(
                "data.cache_activations needs a feature cache, but data.cache is null. Set data.cache to a folder."
            )
        if pack_tokens is not None and batch_size != 1:
            raise UserError(
                f"data.pack_tokens {pack_tokens} and data.batch_size {batch_size} cannot be combined: a pack contains "
                "as many images as fit. Set only one of them."
            )
        self.shards: str | Sequence[str] = expand_home(shards)
        self.cache = None if cache is None else Path(expand_home(cache))
        if not isinstance(augmentation, Augmentation):
            raise UserError(
                f"data.augmentation must be an Augmentation, but got {augmentation!r}. Allowed presets: "
                f"{', '.join(PRESETS)} (none keeps the image size). Set data.augmentation.preset, or pass "
                "Augmentation(preset) in Python."
            )
        self.augmentation = augmentation
        self.benchmarks = opened_later(benchmarks, benchmark_root)
        self.max_images, self.fraction, self.chosen = max_images, fraction, expand_home(keys)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dtype: Dtype = cache_dtype
        self.cache_activations, self.pack_tokens = cache_activations, pack_tokens
        self._images: Images | None = None
        self._cache: FeatureCache | None = None  # reused: its key needs a copy and a hash of the teacher
        self._tokens: NDArray[np.int64] | None = None
        self._train: SourceImages | CachedFeatures | CachedActivations | None = None

    def setup(self, stage: str) -> None:
        """Open the validation sets; in fit, also open the training data and help to compute missing features."""
        for benchmark in self.benchmarks:
            benchmark.open()
        if stage != "fit":
            return
        self._fit_patch()
        self._check_steps()
        if self.cache is None:
            self._train = SourceImages(self.images(), self.augmentation, self.seed)
        else:
            # The cache is not built in prepare_data, where the other ranks would wait in a collective with idle GPUs.
            self._train = self.build_cache()

    def _check_steps(self) -> None:
        """Raise UserError, before features are computed, if there are too few images for a step or a validation."""
        if self.pack_tokens is not None:
            return
        trainer = self.trainer
        assert trainer is not None
        steps = len(EpochOrder(len(self.images()), self.batch_size, 0, trainer.world_size, self.seed))
        interval = trainer.val_check_interval
        if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and interval > steps:
            raise UserError(
                f"trainer.val_check_interval is {interval}, but an epoch has {steps} steps. Set it to at most {steps}, "
                "or count the steps of the whole run with --trainer.check_val_every_n_epoch null."
            )

    def images(self) -> Images:
        """Return the images of the shards that max_images, keys and fraction select.

        Raises:
            ShardError: If a shard is missing or damaged.
            UserError: If one of `keys` is not in the shards.
        """
        if self._images is None:
            assert self.trainer is not None
            # Without a cache, or if it is read-only, the shard index is stored in the run folder, where a resumed run
            # finds it.
            run, cache = Path(self.trainer.default_root_dir), self.cache
            writable = cache is not None and (not cache.exists() or os.access(cache, os.W_OK))
            found = self._scan(expand(self.shards), cache if cache is not None and writable else run, cache)
            self._images = select(found, self.chosen, self.fraction)
        return self._images

    def _scan(self, locations: list[str], root: Path, known: Path | None) -> Images:
        """Return the first `max_images` images; only as many shards are read as needed."""
        show = is_first_process()
        if self.max_images is None:
            return scan_all(locations, root, show, known)
        count = 1
        while True:
            images = scan_all(locations[:count], root, show, known)
            if len(images) >= self.max_images or count >= len(locations):
                return images.take(slice(self.max_images))
            count += max(1, (self.max_images - len(images)) * count // len(images))

    def shorten(self, steps: int, folder: Path) -> None:
        """Reduce the data for a dry run: images for a few steps, no cache, no validation.

        Args:
            steps: Number of steps per rank.
            folder: Temporary folder for files that would be written elsewhere.
        """
        self.cache, self.cache_activations, self.benchmarks = None, False, []
        most = SHORT_PACK if self.pack_tokens is not None else self.batch_size
        self.max_images = steps * most

    def open_cache(self) -> FeatureCache:
        """Open the feature cache of this configuration.

        Raises:
            CacheError: If the folder contains a cache with a different cache key.
            UserError: If `cache` is null.
        """
        if self._cache is not None:
            return self._cache
        assert self.trainer is not None
        if self.cache is None:
            raise UserError("Cannot open a feature cache: data.cache is null. Set data.cache to a folder.")
        self._fit_patch()
        identity = {
            "teacher": self._teacher.teacher_identity(),
            "augmentation": self.augmentation.identity(),
            "seed": self.seed,
            "dtype": self.cache_dtype,
            **({"images": "jpeg"} if self.cache_dtype == "int8" else {}),
            "precision": str(self.trainer.precision),
        }
        device = self._device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        made = {"torch": torch.__version__, "device": name, "compiled": self._teacher.compiled}
        self._cache = FeatureCache(self.cache, identity, made)
        return self._cache

    def build_cache(self) -> CachedFeatures | CachedActivations:
        """Compute missing features and return the cached training images; all calling processes share the work."""
        cache, images = self.open_cache(), self.images()
        # Opened first, so that an error occurs before hours of feature extraction.
        tokens = self.open_activations() if self.cache_activations else None
        cache.build(images, self.teacher_features(), show=is_first_process())
        features = cache.dataset(images.keys)
        if tokens is None:
            return features
        usable = images.take(find(np.sort(features.keys), images.keys) >= 0)
        todo = tokens.tokens.missing(usable)
        if len(todo):
            text = tokens.text(todo, tokens.bytes(todo, self.augmentation, self.seed))
            if is_first_process():
                print(text, flush=True)
        tokens.build(usable, features, is_first_process())
        return tokens.dataset(features)

    def open_activations(self) -> ActivationCache:
        """Open the cache of the frozen blocks' activations, in a folder of the feature cache."""
        # Tokens inside a ViT can have outliers, for which 8 bits with one range are too few; not measured.
        dtype = "float16" if self.cache_dtype == "int8" else self.cache_dtype
        return ActivationCache(self.open_cache(), self._teacher, dtype, self._device, self._precision)

    def teacher_features(self) -> TeacherFeatures:
        """Return the function that computes cache samples from images on this rank's device."""
        return TeacherFeatures(
            self._teacher,
            self.augmentation,
            self.seed,
            self.cache_dtype,
            self._device,
            self._precision,
            max(self.num_workers, 1),
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return a loader of training batches; their order depends on the seed, the epoch and the number of ranks."""
        assert self._train is not None
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        images = self.images()
        if self.pack_tokens is not None:
            if self._tokens is None:
                self._tokens = self._count_tokens(images)
            order: EpochOrder = PackOrder(self._tokens, self.pack_tokens, rank, world_size, self.seed)
        elif self.cache is None and any(map(is_streamed, images.locations)):
            location = images.rows["location"]
            order = StreamOrder(location, self.batch_size, rank, world_size, self.seed, self.num_workers)
        else:
            order = EpochOrder(len(self._train), self.batch_size, rank, world_size, self.seed)
        order.content = sha256(images.keys.tobytes(), 16)
        pinned = self._device.type == "cuda"
        on_length = partial(set_epoch_length, self.trainer)
        return ResumableLoader(self._train, order, self.num_workers, pinned, on_length=on_length)

    def _count_tokens(self, images: Images) -> NDArray[np.int64]:
        """Return the number of patches (N,) of each training sample."""
        if self.cache is None and any(map(is_streamed, images.locations)):
            raise UserError(
                "data.pack_tokens needs random access to all images, but gzipped and remote shards can only be read "
                "from the front. Set data.cache, or use local uncompressed shards."
            )
        sides = augmented_sizes(images, self.augmentation, self.seed) // self._teacher.student.patch_size
        tokens: NDArray[np.int64] = sides.prod(axis=1)
        if not isinstance(self._train, SourceImages):  # a cache skips images that cannot be used
            assert self._train is not None
            tokens = tokens[find(np.sort(self._train.keys), images.keys) >= 0]
        return tokens.clip(min=1)

    def val_dataloader(self) -> list[DataLoader[LabelledImage]]:
        """Return one loader per benchmark; each image is on exactly one rank."""
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        for benchmark in self.benchmarks:
            if len(benchmark) < world_size:
                raise UserError(
                    f"The validation set {benchmark.name} has {len(benchmark)} images for {world_size} ranks. "
                    "Each rank needs at least one: use fewer devices or more images."
                )
        return [
            one_by_one(benchmark, self.num_workers, RankSlice(len(benchmark), rank, world_size))
            for benchmark in self.benchmarks
        ]

    @property
    def _device(self) -> torch.device:
        """Device on which the network will run; it may not have been moved there yet."""
        assert self.trainer is not None
        return self.trainer.strategy.root_device

    @property
    def _precision(self) -> Callable[[], AbstractContextManager[Any]]:
        assert self.trainer is not None
        precision: Callable[[], AbstractContextManager[Any]] = self.trainer.precision_plugin.forward_context
        return precision

    @property
    def _teacher(self) -> Teacher:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, Teacher)
        return module

    def _fit_patch(self) -> None:
        """Let the sides of images be multiples of the backbone's patch size."""
        self.augmentation = self.augmentation.for_patch(self._teacher.student.patch_size)
