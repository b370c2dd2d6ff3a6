"""Tests of the linear probe: images of each step, a separable set, resume."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import Dataset

from spar_lightning.backbones import Tiny
from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.probes import linear
from spar_lightning.probes.encoder import PatchEncoder
from spar_lightning.probes.linear import Linear, LinearProbe
from spar_lightning.probes.training_images import TrainingImages
from spar_lightning.segmentation.config import InferenceConfig


class Numbered(Dataset[LabelledImage]):
    """Images with their index as name."""

    def __getitem__(self, index: int) -> LabelledImage:
        return LabelledImage(str(index), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.int16))


def test_every_pass_has_all_images_in_an_order_of_its_own() -> None:
    images = TrainingImages(Numbered(), 7, None, seed=1)
    passes = [[images[position].key for position in range(7 * i, 7 * i + 7)] for i in range(4)]
    assert all(sorted(each) == [str(i) for i in range(7)] for each in passes) and len({*map(tuple, passes)}) > 1
    assert [TrainingImages(Numbered(), 7, None, seed=2)[i].key for i in range(7)] != passes[0]


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Benchmark, Benchmark]:
    """Return a benchmark of images with one texture and a little noise, and its training images."""
    root = tmp_path_factory.mktemp("textures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :72] // 6 % 2
    patterns = (0 * x, x, x ^ y)
    for split, count in (("val", 6), ("train", 12)):
        for i in range(count):
            pixels = 20 + 180 * patterns[i % 3][..., None] + rng.uniform(0, 40, (64, 72, 3))
            for kind, values in (("images", pixels), ("labels", np.full((64, 72), i % 3))):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(root / split / kind / f"{i}.png")
    content = {
        "classes": [{"label": name, "names": [name]} for name in ("flat", "stripes", "checks")],
        "images": "val/images/{}.png",
        "labels": [{"file": "val/labels/{}.png"}],
        "train": {"val/": "train/"},
    }
    (root / "benchmark.yaml").write_text(yaml.safe_dump(content))
    benchmark = Benchmark(str(root))
    benchmark.open()
    return benchmark, benchmark.training()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_has_the_same_images_for_any_number_of_ranks(ranks: int, textures: tuple[Benchmark, Benchmark]) -> None:
    probe = LinearProbe(PatchEncoder(Tiny(), InferenceConfig()), *textures, Linear(batch_size=8))
    parts = []
    for rank in range(ranks):
        probe._trainer = SimpleNamespace(global_rank=rank, world_size=ranks)  # type: ignore[assignment]
        parts.append(list(probe.positions(5, 9)))
    of_a_step = 8 // ranks
    assert {len(part) for part in parts} == {4 * of_a_step}
    for step in range(4):
        together = sorted(p for part in parts for p in part[step * of_a_step : (step + 1) * of_a_step])
        assert together == list(range(40 + 8 * step, 48 + 8 * step))


@pytest.mark.parametrize("crop_size", [None, 48])
def test_separable_images_are_learned(
    crop_size: int | None, textures: tuple[Benchmark, Benchmark], tmp_path: Path
) -> None:
    settings = Linear(steps=20, batch_size=3, lr=3e-2, crop_size=crop_size, check_every=20)
    probe = LinearProbe(PatchEncoder(Tiny(), InferenceConfig()), *textures, settings)
    assert list(probe.state_dict()) == ["head.weight", "head.bias"]
    trainer = Trainer(
        accelerator="cpu", max_steps=20, max_epochs=-1, accumulate_grad_batches=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=tmp_path, reload_dataloaders_every_n_epochs=1,
    )  # fmt: skip
    trainer.fit(probe)
    assert trainer.global_step == 20 and probe.counts is not None
    result = probe.counts.results()
    assert result.miou == 100 and result.images == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_squares_of_a_wide_image_are_averaged(textures: tuple[Benchmark, Benchmark]) -> None:
    """With equal logits everywhere, the average has them, too; the map has the size of the image."""
    probe = LinearProbe(PatchEncoder(Tiny(), InferenceConfig()), *textures, Linear(crop_size=32))
    with torch.no_grad():
        probe.head.weight.zero_()
        probe.head.bias.copy_(torch.tensor([1.0, 3.0, 2.0]))
    image = torch.randint(0, 256, (3, 40, 100), dtype=torch.uint8)
    logits = probe._of_squares(image, 32)
    assert logits.shape == (3, 32, 80) and torch.allclose(logits.mean((1, 2)), torch.tensor([1.0, 3.0, 2.0]))
    assert probe.segment(image).shape == (40, 100) and probe.segment(image).unique().tolist() == [1]


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch_size": 0}, {"crop_size": 0}, {"check_every": 0}, {"lr": 0.0}, {"weight_decay": -1.0}],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=f"--{name}"):
        Linear(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("band", [1, 500, 10**9])
def test_the_loss_in_bands_is_that_of_the_whole_image(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BAND", band)
    logits = torch.randn(5, 4, 7, requires_grad=True)
    labels = torch.randint(-1, 5, (33, 50))  # -1 is ignored
    loss = linear.pixel_loss(logits, labels)
    (ours,) = torch.autograd.grad(loss, logits)
    pixels = F.interpolate(logits[None], labels.shape, mode="bilinear")
    expected = F.cross_entropy(pixels, labels[None], ignore_index=-1, reduction="sum")
    (theirs,) = torch.autograd.grad(expected, logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and torch.allclose(
        ours, theirs, atol=1e-3, rtol=1e-4
    )
