"""Tests of training from cached activations: same losses, no images read, activations of other networks rejected."""

import io
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor

from spar_lightning.backbones import OpenCLIP, Tiny
from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.parameter_groups import frozen_blocks, set_trainable
from spar_lightning.datamodules import SA1B
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError
from spar_lightning.feature_cache import extract
from spar_lightning.feature_cache import shard as feature_shard
from spar_lightning.feature_cache.activations import CachedActivations
from spar_lightning.feature_cache.shard import CacheError, FeatureShard
from spar_lightning.image.codec import encode_image

SMALL = Augmentation("released", (96, 72), (0.7, 1.0), min_side=64, multiple=8)


class Losses(Callback):
    """Callback that records the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tar file with six synthetic images and a damaged one."""
    path = tmp_path_factory.mktemp("images") / "sa_000000.tar"
    with tarfile.open(path, "w") as file:
        for i in range(7):
            buffer = io.BytesIO()
            Image.fromarray(render(0, i, 90, 110).image).save(buffer, "png")
            content = buffer.getvalue()[: 500 if i == 3 else None]
            member = tarfile.TarInfo(f"sa_{i}.png")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def fit(
    tar: Path,
    cache: Path,
    trainable: Sequence[str] = ("blocks.-2", "blocks.-1"),
    backbone: type[Tiny] = Tiny,
    attention: Any = "full",
    **data: Any,
) -> list[float]:
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[losses], default_root_dir=str(cache),
    )  # fmt: skip
    module = Distillation(backbone(), stride=32, trainable=trainable, lr=1e-3, attention=attention)
    trainer.fit(module, datamodule=SA1B(str(tar), str(cache), SMALL, **data))
    return losses.values


@pytest.mark.parametrize("trainable", [("blocks.-1",), ("blocks.-3.mlp", "norm"), ("head",)])
def test_losses_are_those_of_the_whole_network_to_the_bit(
    trainable: tuple[str, ...], tar: Path, tmp_path: Path
) -> None:
    whole = fit(tar, tmp_path, trainable, cache_dtype="float32")
    assert len(whole) == 12  # two epochs of the six valid images
    assert fit(tar, tmp_path, trainable, cache_dtype="float32", cache_activations=True) == whole
    assert len(set(whole)) == 12


def test_int8_features_train_like_float16_and_have_float16_activations(
    tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "encode_jpeg", encode_image)  # the same images for both types
    plain, small = (fit(tar, tmp_path / dtype, cache_dtype=dtype) for dtype in ("float16", "int8"))
    assert small != plain and small == pytest.approx(plain, rel=0.01)
    with_tokens = fit(tar, tmp_path / "int8", cache_dtype="int8", cache_activations=True)
    assert with_tokens == pytest.approx(small, rel=0.01)
    (tokens,) = (tmp_path / "int8").glob("activations-*/shards/*.h5")
    with h5py.File(tokens, "r", locking=False) as file:
        assert file["tok"].dtype == "float16" and "range" not in file
    with pytest.raises(CacheError, match=r"dtype: cache int8, configuration float16"):
        fit(tar, tmp_path / "int8")


def test_windowed_attention_has_activations_of_its_own_and_shares_the_features(tar: Path, tmp_path: Path) -> None:
    full = fit(tar, tmp_path, cache_dtype="float32", cache_activations=True)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.h5")}
    attention = WindowedAttention(tile=3)
    whole = fit(tar, tmp_path, attention=attention, cache_dtype="float32")
    assert fit(tar, tmp_path, attention=attention, cache_dtype="float32", cache_activations=True) == whole
    assert whole[0] != full[0]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(list(tmp_path.glob("activations-4-windowed-*/shards/*.h5"))) == 1
    assert fit(tar, tmp_path, cache_dtype="float32", cache_activations=True) == full


class Rounded(Tiny):
    """Backbone that rounds the input of its fifth block to float16 if gradients are enabled (student, not teacher)."""

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        if start >= 4 or (stop is not None and stop <= 4) or not torch.is_grad_enabled():
            return super().run_blocks(tokens, grids, start, stop)
        return super().run_blocks(super().run_blocks(tokens, grids, start, 4).half().float(), grids, 4, stop)


def test_losses_in_float16_differ_by_its_rounding_and_nothing_else(tar: Path, tmp_path: Path) -> None:
    prefix = fit(tar, tmp_path, backbone=Rounded, cache_activations=True)
    assert prefix == fit(tar, tmp_path, backbone=Rounded)
    np.testing.assert_allclose(prefix[0], fit(tar, tmp_path / "unrounded")[0], rtol=1e-3)


def test_packs_take_the_prefix_too(tar: Path, tmp_path: Path) -> None:
    one = fit(tar, tmp_path, cache_dtype="float32", batch_size=6)
    assert len(one) == 2
    packs = fit(tar, tmp_path, cache_dtype="float32", cache_activations=True, pack_tokens=10_000)
    np.testing.assert_allclose(packs, one, rtol=1e-5)


def test_no_image_is_read(tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fit(tar, tmp_path, cache_activations=True)

    def fail(content: bytes) -> torch.Tensor:
        raise AssertionError("an image was decoded")

    parts, part = list[tuple[str, str]](), FeatureShard._part

    def watch(self: FeatureShard, name: str, offsets: np.ndarray, row: int) -> np.ndarray:
        parts.append((self.path.parts[-3], name))
        return part(self, name, offsets, row)

    monkeypatch.setattr(feature_shard, "decode_image", fail)
    monkeypatch.setattr(FeatureShard, "_part", watch)
    assert fit(tar, tmp_path, cache_activations=True) == expected
    assert ("activations-4", "tok") in parts and (tmp_path.name, "tok") in parts and (tmp_path.name, "img") not in parts


def test_each_number_of_frozen_blocks_has_its_own_folder(tar: Path, tmp_path: Path) -> None:
    for trainable in (("blocks.-1",), ("blocks.-2", "blocks.-1"), ("blocks.-1",)):
        fit(tar, tmp_path, trainable, cache_activations=True)
    assert sorted(path.name for path in tmp_path.glob("activations-*")) == ["activations-4", "activations-5"]


def test_tokens_of_another_cache_are_refused(tar: Path, tmp_path: Path) -> None:
    fit(tar, tmp_path / "one", cache_activations=True)
    fit(tar, tmp_path / "two", cache_activations=False, seed=1)
    shutil.copytree(tmp_path / "one" / "activations-4", tmp_path / "two" / "activations-4")
    with pytest.raises(CacheError, match=r"features: cache [0-9a-f]{64}, configuration [0-9a-f]{64}"):
        fit(tar, tmp_path / "two", cache_activations=True, seed=1)


@pytest.mark.parametrize("folder", ["shards", "activations-4/shards"])
def test_a_flipped_bit_is_found(folder: str, tar: Path, tmp_path: Path) -> None:
    fit(tar, tmp_path, cache_activations=True)
    path = tmp_path / folder / "00000.h5"
    content = bytearray(path.read_bytes())
    with h5py.File(path, "r", locking=False) as file:
        start = file["tok"].id.get_chunk_info(0).byte_offset
    content[start + 100] ^= 16
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"00000\.h5 .*sa_\d"):
        fit(tar, tmp_path, cache_activations=True)


def test_a_folder_that_is_lost_is_made_again(tar: Path, tmp_path: Path) -> None:
    expected = fit(tar, tmp_path, cache_activations=True)
    shutil.rmtree(tmp_path / "activations-4")
    assert fit(tar, tmp_path, cache_activations=True) == expected


@pytest.mark.parametrize(
    ("trainable", "blocks"),
    [(["blocks.-2", "blocks.-1"], 4), (["blocks.0"], 0), (["blocks.*.qkv"], 0), (["head"], 6), (["norm", "head"], 6)],
)
def test_frozen_blocks_are_those_that_no_gradient_reaches(trainable: list[str], blocks: int) -> None:
    tiny = Tiny()
    set_trainable(tiny, tiny.parameter_groups(), trainable)
    assert frozen_blocks(tiny, tiny.depth) == blocks


def test_a_trainable_embedding_leaves_no_prefix(tar: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_activations: false"):
        fit(tar, tmp_path, ["pos_embed"], cache_activations=True)
    assert not any((tmp_path / "shards").iterdir())  # the error is raised before the teacher runs
    clip = OpenCLIP("ViT-S-32", pretrained=None)  # the group "norm" includes the norm before the blocks
    set_trainable(clip, clip.parameter_groups(), ["norm"])
    with pytest.raises(UserError, match=r"data\.cache_activations: false"):
        frozen_blocks(clip, clip.depth)


def test_without_a_cache_there_is_no_prefix(tar: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_activations needs"):
        SA1B(str(tar), None, cache_activations=True)


def test_samples_keep_the_order_of_the_features(tar: Path, tmp_path: Path) -> None:
    fit(tar, tmp_path, cache_activations=True)
    data = SA1B(str(tar), str(tmp_path), SMALL, cache_activations=True, keys=["sa_5", "sa_1", "sa_4"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=str(tmp_path))
    trainer.strategy.connect(Distillation(Tiny(), stride=32))
    data.trainer = trainer
    samples = data.build_cache()
    assert isinstance(samples, CachedActivations)
    assert [samples[i].key for i in range(len(samples))] == ["sa_1", "sa_4", "sa_5"]
