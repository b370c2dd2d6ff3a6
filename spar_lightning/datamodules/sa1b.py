"""SA1B: tar shards and a feature cache for training, labelled folders for validation.

With `cache` set, missing features are computed before training starts and every epoch reads them;
with `cache: null` the images are augmented in the loader and the teacher runs in the training step.
Either way an image is augmented once, the same in every epoch.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spar_lightning.datamodules.augmentation import Augmentation, Record
from spar_lightning.datamodules.benchmark import Benchmark
from spar_lightning.datamodules.feature_cache import FeatureCache
from spar_lightning.datamodules.feature_shard import CacheError, Entry
from spar_lightning.datamodules.image import decode_image, encode_image
from spar_lightning.datamodules.loader import EpochOrder, RankSlice, ResumableLoader
from spar_lightning.datamodules.plan import ShardError, Source, list_keys, scan
from spar_lightning.datamodules.sample import LabelledImage, Sample
from spar_lightning.errors import UserError, check_at_least


class TarImages(Dataset[Sample]):
    """Augmented images straight from the tars, without features."""

    def __init__(self, sources: Sequence[Source], augmentation: Augmentation, seed: int) -> None:
        self.sources, self.augmentation, self.seed = sources, augmentation, seed

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Sample:
        source = self.sources[index]
        image, _ = augmented(source, self.augmentation, self.seed)
        return Sample(source.key, image, None)


def augmented(source: Source, augmentation: Augmentation, seed: int) -> tuple[Tensor, Record]:
    """The image as it is trained on (3, H, W) uint8, and what was done to it.

    Raises:
        ShardError: The bytes are no image that can be read whole.
    """
    content = source.read()
    try:
        image = decode_image(content)
    except OSError as error:
        raise ShardError(
            f"{source.tar}: {source.key} cannot be decoded ({error}). Repair or remove this image in the tar."
        ) from error
    record = augmentation.draw(image.shape[-2], image.shape[-1], seed, source.key)
    return augmentation.apply(image, record), record


class SA1B(LightningDataModule):
    """Unlabelled images in WebDataset tars, and the validation sets.

    Args:
        shards: Tar files of images in SA-1B's layout: one brace pattern or a list of them.
        cache: Folder of the teacher's features, built where they are missing; null runs the teacher in each step.
        augmentation: Size, crop and flip, drawn once per image.
        benchmarks: Labelled folders for validation.
        max_images: Train on the first images of the shards only; null takes all.
        batch_size: Images per step and process; the paper takes 1.
        num_workers: Loader processes for each of training and validation.
        seed: Of the augmentation and of the order of training.
        cache_dtype: Precision in which features are stored.
    """

    def __init__(
        self,
        shards: str | list[str],
        cache: str | None = None,
        augmentation: Augmentation = Augmentation(),
        benchmarks: list[Benchmark] | None = None,
        max_images: int | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        cache_dtype: Literal["float16", "float32"] = "float16",
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, max_images=max_images)
        check_at_least(0, num_workers=num_workers, seed=seed)
        names = [benchmark.name for benchmark in benchmarks or []]
        if len(set(names)) < len(names):
            raise UserError(
                f"data.benchmarks: two have the same name, of {', '.join(names)}. Give each its own `name`."
            )
        self.shards = shards
        self.cache = None if cache is None else Path(cache)
        self.augmentation = augmentation
        self.benchmarks = benchmarks or []
        self.max_images = max_images
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dtype = cache_dtype
        self._train: Dataset[Sample] | None = None

    def prepare_data(self) -> None:
        """Compute the features that are missing (in fit, with a cache)."""
        if self.cache is None or not self._fitting:
            return
        self._check_patch()
        cache = self._open_cache()
        sources = scan(self.shards, self.max_images)
        assert self.trainer is not None
        teacher = self._module.build_teacher().to(self.trainer.strategy.root_device)
        cache.build(sources, partial(self._entry, teacher))

    def setup(self, stage: str) -> None:
        """Open what this process reads."""
        for benchmark in self.benchmarks:
            benchmark.open()
        if stage != "fit":
            return
        self._check_patch()
        if self.cache is None:
            self._train = TarImages(scan(self.shards, self.max_images), self.augmentation, self.seed)
        else:
            self._train = self._open_cache().dataset(list_keys(self.shards, self.max_images))

    def train_dataloader(self) -> ResumableLoader:
        """Batches of `Sample`s, in an order that depends on the seed, the epoch and the number of ranks."""
        assert self._train is not None
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        order = EpochOrder(len(self._train), self.batch_size, rank, world_size, self.seed)  # type: ignore[arg-type]
        return ResumableLoader(self._train, order, self.num_workers)

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
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    @property
    def _fitting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == "fit"

    def _check_patch(self) -> None:
        patch = self._module.student.patch_size
        if self.augmentation.multiple % patch:
            raise UserError(
                f"data.augmentation.multiple is {self.augmentation.multiple}, but the backbone's patches of {patch} "
                f"pixels ask for a multiple of {patch}."
            )

    def _open_cache(self) -> FeatureCache:
        assert self.cache is not None
        assert self.trainer is not None
        identity = {
            "teacher": self._module.teacher_identity(),
            "augmentation": self.augmentation.identity(),
            "seed": self.seed,
            "dtype": self.cache_dtype,
            "precision": str(self.trainer.precision),
        }
        return FeatureCache(self.cache, identity)

    @torch.no_grad()
    def _entry(self, teacher: Any, source: Source) -> Entry:
        """Augment one image and compute its features from the very bytes that are stored."""
        assert self.trainer is not None
        image, record = augmented(source, self.augmentation, self.seed)
        png = encode_image(image)
        pixels = decode_image(png).to(self.trainer.strategy.root_device)
        with self.trainer.precision_plugin.forward_context():
            features: Tensor = teacher(self._module.student.normalize(pixels[None]))[0]
        stored = features.cpu().numpy().astype(self.cache_dtype)
        if not np.isfinite(stored).all():
            raise CacheError(
                f"The features of {source.key} do not fit into {self.cache_dtype} "
                f"(largest {features.abs().max():.3g}). "
                "Set data.cache_dtype: float32."
            )
        return Entry(source.key, png, stored, record)
