"""Tests that need separate processes: Ctrl-C, and two ranks on one machine."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spar_lightning.cli import main
from tests.conftest import Finished, environment

Spar = Callable[..., Finished]


def test_ctrl_c_leaves_a_checkpoint_to_continue_from(small: list[str], scenes: Path, tmp_path: Path) -> None:
    args = ["fit", *small, "--data.root", str(scenes), "--trainer.max_epochs", "8", "--mean_iou.before", "false",
            "--mean_iou.teacher", "false", "--trainer.check_val_every_n_epoch", "8"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*args, "--run_dir", str(whole)]) == 0

    command = [sys.executable, "-m", "spar_lightning", *args, "--run_dir", str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    metrics = cut / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"loss"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "Traceback" not in out and "--resume auto" in out
    assert 0 < torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < 96

    assert main([*args, "--run_dir", str(cut), "--resume", "auto"]) == 0
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, cut)]
    assert states[0]["global_step"] == states[1]["global_step"] == 96
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name


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
