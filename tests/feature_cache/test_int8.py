"""Features with 8 bits per value: the error, the round trip through a shard, its checksum, and its size."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from spar_lightning.backbones import Backbone, DINOv3Text, SigLIP2, Tiny
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.datasets.shard_index import scan
from spar_lightning.distillation import Distillation
from spar_lightning.feature_cache.extract import Dtype, TeacherFeatures
from spar_lightning.feature_cache.int8 import MOST_ERROR, quantized, relative_error, restored
from spar_lightning.feature_cache.shard import CacheError, Entry, FeatureShard, write_shard
from spar_lightning.sliding_window import SlidingWindow
from tests.backbones.small_models import randomized
from tests.feature_cache.test_cache import make, sources

BACKBONES: list[Callable[[], Backbone]] = [
    Tiny,
    lambda: randomized(SigLIP2("ViT-B-32-SigLIP2-256", None)),
    lambda: randomized(DINOv3Text("vit_tiny_patch16_dinov3_qkvb", window=64)),
]


@given(arrays(np.float32, (3, 4, 2), elements=st.floats(-60000, 60000, width=32)))
def test_each_value_is_within_half_a_step(values: NDArray[np.float32]) -> None:
    features = torch.from_numpy(values)
    codes, ranges = quantized(features)
    assert codes.dtype == np.uint8 and codes.shape == features.shape and ranges.shape == (2, 2)
    found = restored(torch.from_numpy(codes), torch.from_numpy(ranges)).float()
    rounding = 2**-11 * features.abs() + 1e-3  # of float16
    assert ((found - features).abs() <= torch.from_numpy(ranges[1]) / 2 + rounding).all()
    same = torch.from_numpy(ranges[1]) == 0  # a constant channel
    assert torch.equal(found[..., same], features[..., same].half().float())


@pytest.mark.parametrize("build", BACKBONES)
@torch.no_grad()
def test_the_error_of_a_teachers_features_is_below_one_percent(build: Callable[[], Backbone]) -> None:
    """Compare also with the deviation from the mean of each channel, because a common offset carries no information."""
    torch.manual_seed(0)
    backbone = build()
    side = 2 * backbone.window
    images = torch.randint(256, (1, 3, side, side + 4 * backbone.patch_size), dtype=torch.uint8)
    features = SlidingWindow(backbone, stride=backbone.window // 2)(backbone.normalize(images))[0]
    codes, ranges = quantized(features)
    error = relative_error(features, codes, ranges)
    assert error < MOST_ERROR
    assert error * features.norm() / (features - features.mean((0, 1))).norm() < MOST_ERROR


def teacher(dtype: Dtype) -> TeacherFeatures:
    augmentation = Augmentation("none", min_side=64, multiple=8)
    return TeacherFeatures(Distillation(Tiny(), stride=32), augmentation, 0, dtype, torch.device("cpu"), nullcontext)


def test_shards_take_half_the_space_and_have_the_pixels_that_the_teacher_saw(tmp_path: Path) -> None:
    for i in range(64):  # as in a shard of a cache; the last chunk of its data is padded
        Image.fromarray(render(0, i, 8 * (8 + i % 16), 8 * (23 - i % 16)).image).save(tmp_path / f"{i}.png")
    images, bytes_of = scan(str(tmp_path)), {}
    for dtype in ("float16", "int8"):
        make, path = teacher(dtype), tmp_path / f"{dtype}.h5"
        entries = [entry for entry in make(iter(images)) if isinstance(entry, Entry)]
        assert len(entries) == 64 and write_shard(path, entries, "f", tmp_path)
        bytes_of[dtype] = path.stat().st_size
        with FeatureShard(path, "f") as shard:
            for row in range(0, 64, 8):
                image, features = shard.read(row)
                expected = make.features(image)
                error = (features.float() - expected).norm() / expected.norm()
                assert error < (MOST_ERROR if dtype == "int8" else 1e-3)  # of rounding alone
    assert bytes_of["int8"] <= 0.55 * bytes_of["float16"]


def test_a_larger_error_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(render(0, 0, 72, 96).image).save(tmp_path / "0.png")
    images = scan(str(tmp_path))
    make = teacher("int8")
    (entry,) = make(iter(images))
    assert isinstance(entry, Entry) and entry.ranges is not None

    def outlier(image: Tensor) -> Tensor:
        features = torch.randn(9, 12, 128)
        features[0, 0] = 1000.0
        return features

    monkeypatch.setattr(make, "features", outlier)
    with pytest.raises(CacheError, match=r"as int8 have an error of .*Use float16"):
        list(make(iter(images)))


def shard(path: Path, eight: bool) -> Path:
    """Write a shard of three samples with 32 x 32 patches and 64 channels."""
    entries = []
    for source in sources(3):
        features = torch.randn(32, 32, 64, generator=torch.Generator().manual_seed(int(source.key[3:])))
        entry = make(source)._replace(content=b"", features=features.half().numpy())
        if eight:
            codes, ranges = quantized(features)
            entry = entry._replace(features=codes, ranges=ranges)
        entries.append(entry)
    assert write_shard(path, entries, "f", path.parent)
    return path


def test_a_shard_restores_the_features_and_takes_half_the_space(tmp_path: Path) -> None:
    small, plain = shard(tmp_path / "int8.h5", True), shard(tmp_path / "float16.h5", False)
    with FeatureShard(small, "f") as ours, FeatureShard(plain, "f") as theirs:
        for row in range(3):
            features, exact = ours.features(row), theirs.features(row)
            assert features.dtype == torch.float16 and torch.equal(ours.check(row)[1], features)
            assert (features.float() - exact.float()).norm() / exact.float().norm() < 0.01
    sizes = []
    for path in (small, plain):
        with h5py.File(path) as file:
            sizes.append(sum(file[name].id.get_storage_size() for name in ("tok", "range") if name in file))
    assert sizes[0] / sizes[1] < 0.55


@pytest.mark.parametrize(("name", "row"), [("range", 1), ("tok", 0)])
def test_a_changed_value_is_detected(name: str, row: int, tmp_path: Path) -> None:
    path = shard(tmp_path / "int8.h5", True)
    with h5py.File(path, "r+") as file:  # HDF5 renews its own checksum
        file[name][1, 0] += 1
    with FeatureShard(path, "f") as damaged:
        damaged.check(2)
        with pytest.raises(CacheError, match="does not match its checksum"):
            damaged.check(row)
