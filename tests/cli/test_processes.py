"""Tests of two processes that `spar fit` starts on one machine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Finished

Spar = Callable[..., Finished]


@pytest.mark.slow
def test_all_parameters_train_on_two_processes(spar: Spar, photos: str, tmp_path: Path) -> None:
    """All selected parameters take part in each step, so DDP needs no find_unused_parameters."""
    done = spar([
        "fit", "--model.backbone", "OpenCLIP", "--model.backbone.model", "ViT-S-32",
        "--model.backbone.pretrained", "null", "--model.trainable", "[all]", "--model.stride", "96",
        "--data", "SA1B", "--data.shards", photos, "--data.augmentation.scale", "[320,256]",
        "--data.augmentation.min_side", "128", "--data.augmentation.multiple", "32",
        "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu",
        "--trainer.max_epochs", "2", "--run_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert done.code == 0, done.err
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
