"""SA1B: shards of images and a feature cache for training, labelled folders for validation.

With `cache` set, missing features are computed before training starts, by all processes together,
and every epoch reads them; with `cache: null` the images are augmented in the loader and the teacher
runs in the training step. Either way an image is augmented once, the same in every epoch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from spar_lightning.datamodules.dataloader import EpochOrder, RankSlice, ResumableLoader, StreamOrder
from spar_lightning.datamodules.packed_sampler import PackOrder
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.image_source import is_streamed
from spar_lightning.datasets.image_table import Images, find
from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.datasets.shard_index import expand, scan_all
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

SHORT_PACK = 16  # images for each step of a dry run where packs are filled by patches


class SA1B(LightningDataModule):
    """Unlabelled images in tars or folders, and the validation sets.

    Args:
        shards: Images in SA-1B's layout: tar files (plain or gzipped), URLs of such, `pipe:` commands that print
            one, or folders of images; one brace pattern or a list.
        cache: Folder of the teacher's features, built where they are missing; null runs the teacher in each step.
        augmentation: Size, crop and flip, drawn once per image: a preset, and settings that differ from it.
        benchmarks: Validation sets: names of those that ship (voc21, voc20, cityscapes, ade20k, context60, context59),
            paths of YAML files, or folders with benchmark.yaml, images/ and labels/.
        benchmark_root: Folder in which the data of the benchmarks that ship lie.
        max_images: Use the first images of the shards only; null takes all.
        fraction: Share of the images that is used, chosen by their keys: a larger one contains the smaller.
        keys: Keys of the images that are used, or a text file with one in each line; null takes all.
        batch_size: Images per step and process; the paper takes 1.
        num_workers: Loader processes for each of training and validation, and threads that decode images for the
            teacher.
        seed: Of the augmentation and of the order of training.
        cache_dtype: Precision in which features are stored.
        cache_activations: Also cache the tokens that enter the first trainable block, in a folder of the cache: a step
            then runs the trainable blocks only and reads no image.
        pack_tokens: Patches of a pack, such as 16384: a step takes as many images as fill it, in one sequence, instead
            of batch_size; null takes batch_size.
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
                "data.cache_activations needs the cached images, but data.cache is null. Give a folder there."
            )
        if pack_tokens is not None and batch_size != 1:
            raise UserError(
                f"data.pack_tokens {pack_tokens} and data.batch_size {batch_size} exclude each other: a pack holds as "
                "many images as fill it. Leave one of them out."
            )
        self.shards = shards
        self.cache = None if cache is None else Path(cache)
        if not isinstance(augmentation, Augmentation):
            raise UserError(
                f"data.augmentation must be an Augmentation such as Augmentation('text'), not {augmentation!r}."
            )
        self.augmentation = augmentation
        self.benchmarks = opened_later(benchmarks, benchmark_root)
        self.max_images, self.fraction, self.chosen = max_images, fraction, keys
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dtype: Dtype = cache_dtype
        self.cache_activations, self.pack_tokens = cache_activations, pack_tokens
        self._images: Images | None = None
        self._cache: FeatureCache | None = None  # kept: its identity costs a copy of the teacher and a hash of it
        self._tokens: NDArray[np.int64] | None = None
        self._train: SourceImages | CachedFeatures | CachedActivations | None = None

    def setup(self, stage: str) -> None:
        """Open what this process reads; in fit, take part in making the features that are missing."""
        for benchmark in self.benchmarks:
            benchmark.open()
        if stage != "fit":
            return
        self._check_patch()
        if self.cache is None:
            self._train = SourceImages(self.images(), self.augmentation, self.seed)
        else:
            # Not in prepare_data: there the other processes would wait inside a collective, with idle GPUs.
            self._train = self.build_cache()

    def images(self) -> Images:
        """The training images: those of the shards, as far as max_images, fraction and keys choose them.

        Raises:
            ShardError: A shard is missing or damaged.
            UserError: One of `keys` is no image of the shards.
        """
        if self._images is None:
            assert self.trainer is not None
            # Without a cache the scans lie in the run's folder, where a resumed run finds them.
            root = self.cache or Path(self.trainer.default_root_dir)
            found = self._scan(expand(self.shards), root)
            self._images = select(found, self.chosen, self.fraction)
        return self._images

    def _scan(self, locations: list[str], root: Path) -> Images:
        """The first `max_images` images; of many shards only as many are read as that takes."""
        show = is_first_process()
        if self.max_images is None:
            return scan_all(locations, root, show)
        count = 1
        while True:
            images = scan_all(locations[:count], root, show)
            if len(images) >= self.max_images or count >= len(locations):
                return images.take(slice(self.max_images))
            count += max(1, (self.max_images - len(images)) * count // len(images))

    def shorten(self, steps: int, folder: Path) -> None:
        """Leave what a dry run needs: images for a few steps, no cache, no validation.

        Args:
            steps: Of one process.
            folder: For what would be written elsewhere.
        """
        self.cache, self.cache_activations, self.benchmarks = None, False, []
        most = SHORT_PACK if self.pack_tokens is not None else self.batch_size
        self.max_images = steps * most

    def open_cache(self) -> FeatureCache:
        """The cache of this configuration.

        Raises:
            CacheError: The folder holds another one.
        """
        if self._cache is not None:
            return self._cache
        assert self.trainer is not None
        if self.cache is None:
            raise UserError("data.cache is null: there is no cache to build. Give a folder for the features.")
        self._check_patch()
        identity = {
            "teacher": self._teacher.teacher_identity(),
            "augmentation": self.augmentation.identity(),
            "seed": self.seed,
            "dtype": self.cache_dtype,
            "precision": str(self.trainer.precision),
        }
        device = self._device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        made = {"torch": torch.__version__, "device": name, "compiled": self._teacher.compiled}
        self._cache = FeatureCache(self.cache, identity, made)
        return self._cache

    def build_cache(self) -> CachedFeatures | CachedActivations:
        """The cached training images, once all of them are there: made by all processes that call this."""
        cache, images = self.open_cache(), self.images()
        # Rejected now, not after hours of the teacher.
        tokens = self.open_activations() if self.cache_activations else None
        cache.build(images, self.teacher_features(), show=is_first_process())
        features = cache.dataset(images.keys)
        if tokens is None:
            return features
        usable = images.take(find(np.sort(features.keys), images.keys) >= 0)
        todo = tokens.tokens.missing(usable)
        if len(todo):
            text = tokens.text(todo, self.augmentation, self.seed)
            if is_first_process():
                print(text, flush=True)
        tokens.build(usable, features, is_first_process())
        return tokens.dataset(features)

    def open_activations(self) -> ActivationCache:
        """The tokens that the frozen blocks give, beside the cache."""
        return ActivationCache(self.open_cache(), self._teacher, self.cache_dtype, self._device, self._precision)

    def teacher_features(self) -> TeacherFeatures:
        """What makes a sample of the cache out of an image, on this process's device."""
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
        """Batches of `Sample`s, in an order that depends on the seed, the epoch and the number of ranks."""
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
        return ResumableLoader(self._train, order, self.num_workers, pinned)

    def _count_tokens(self, images: Images) -> NDArray[np.int64]:
        """Patches of each training sample."""
        if self.cache is None and any(map(is_streamed, images.locations)):
            raise UserError(
                "data.pack_tokens chooses images from the whole of an epoch, but gzipped and remote shards are read "
                "from the front. Set data.cache, or download them."
            )
        sides = augmented_sizes(images, self.augmentation, self.seed) // self._teacher.student.patch_size
        tokens: NDArray[np.int64] = sides.prod(axis=1)
        if not isinstance(self._train, SourceImages):  # a cache leaves out images that cannot be used
            assert self._train is not None
            tokens = tokens[find(np.sort(self._train.keys), images.keys) >= 0]
        return tokens.clip(min=1)

    def val_dataloader(self) -> list[DataLoader[LabelledImage]]:
        """One loader per benchmark, each image on exactly one rank."""
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        for benchmark in self.benchmarks:
            if len(benchmark) < world_size:
                raise UserError(
                    f"The validation set {benchmark.name} has {len(benchmark)} images for {world_size} processes. "
                    "Each needs at least one: use fewer devices or more images."
                )
        return [
            DataLoader(
                benchmark,
                sampler=RankSlice(len(benchmark), rank, world_size),
                collate_fn=list,
                num_workers=self.num_workers,
            )
            for benchmark in self.benchmarks
        ]

    @property
    def _device(self) -> torch.device:
        """Where the network will run, which is not always where it lies yet."""
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

    def _check_patch(self) -> None:
        patch, multiple = self._teacher.student.patch_size, self.augmentation.settings.multiple
        if multiple % patch:
            raise UserError(
                f"data.augmentation.multiple is {multiple}, but the backbone's patches of {patch} "
                f"pixels ask for a multiple of {patch}."
            )
