"""What needs processes of its own: two ranks, and Ctrl-C."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spar_lightning.backbones import Tiny
from tests.conftest import Finished, environment

Spar = Callable[..., Finished]


def results(folder: Path) -> dict[str, Any]:
    return {row["stage"]: row for row in json.loads((folder / "results.json").read_text())}


def student(run: Path) -> Tiny:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    tiny = Tiny(pretrained=None)
    tiny.load_vision_state_dict({name.removeprefix("student."): tensor for name, tensor in state.items()})
    return tiny


def test_two_processes_measure_what_one_does(spar: Spar, small: list[str], scenes: Path, tmp_path: Path) -> None:
    """The same global batch: two images in one process, or one in each of two."""
    common = ["fit", *small, "--data.root", str(scenes), "--trainer.max_epochs", "1"]
    one = spar([*common, "--run_dir", str(tmp_path / "one"), "--data.batch_size", "2"])
    assert one.code == 0, one.err
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    two = spar([*common, "--run_dir", str(tmp_path / "two"), *ddp])
    assert two.code == 0, two.err
    assert two.out.count("sliding window (teacher)") == 1  # only the first process prints
    expected, found = results(tmp_path / "one"), results(tmp_path / "two")
    for stage in ("before", "teacher"):
        assert found[stage]["miou"] == expected[stage]["miou"]
    assert found["after"]["images"] == {"scenes_64": 5, "scenes_96": 5}
    # Weights are compared by what they do: the key bias has no gradient but rounding, which Adam makes a full step.
    image = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = [student(tmp_path / name)(Tiny().normalize(image)) for name in ("one", "two")]
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-3)
    assert not torch.allclose(features[0], Tiny()(Tiny().normalize(image)), rtol=0, atol=0.1)
    assert found["after"]["miou"] == pytest.approx(expected["after"]["miou"], abs=0.01)


def test_ctrl_c_leaves_a_checkpoint_to_continue_from(
    spar: Spar, small: list[str], scenes: Path, tmp_path: Path
) -> None:
    args = ["fit", *small, "--data.root", str(scenes), "--trainer.max_epochs", "8"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert spar([*args, "--run_dir", str(whole)]).code == 0

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

    resumed = spar([*args, "--run_dir", str(cut), "--resume", "auto"])
    assert resumed.code == 0, resumed.err
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, cut)]
    assert states[0]["global_step"] == states[1]["global_step"] == 96
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name


def test_all_parameters_train_on_two_processes(spar: Spar, photos: str, tmp_path: Path) -> None:
    """No search for unused parameters: every one that is selected takes part in every step."""
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
