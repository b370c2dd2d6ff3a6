"""Lightning's average of the weights (EMA) with `spar fit`: training is the same, and the student is the average."""

from pathlib import Path
from typing import Any

import pytest
import torch

import spar_lightning as spar
from spar_lightning.backbones import Tiny
from spar_lightning.cli import main

EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]


def last(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


@pytest.mark.slow
def test_an_averaged_student(small: list[str], scenes: Path, tmp_path: Path) -> None:
    fit = ["fit", *small, "--data.root", str(scenes), "--mean_iou.before", "false", "--mean_iou.teacher", "false"]
    assert main([*fit, "--run_dir", str(tmp_path / "plain")]) == 0
    assert main([*fit, *EMA, "--run_dir", str(tmp_path / "whole")]) == 0
    cut = [*fit, *EMA, "--run_dir", str(tmp_path / "cut")]
    assert main([*cut, "--trainer.max_epochs", "1"]) == 0
    assert main([*cut, "--resume", "auto"]) == 0

    plain, whole, resumed = (last(tmp_path / name) for name in ("plain", "whole", "cut"))
    for name, weights in plain["state_dict"].items():
        assert torch.equal(whole["current_model_state"][name], weights)
        assert torch.equal(resumed["current_model_state"][name], weights)
        assert torch.equal(resumed["state_dict"][name], whole["state_dict"][name])
    trained = "student.blocks.5.mlp.fc1.weight"
    assert not torch.equal(whole["state_dict"][trained], plain["state_dict"][trained])
    start = Tiny().blocks[5].mlp.fc1.weight  # type: ignore[union-attr]
    moved = [(state["state_dict"][trained] - start).norm().item() for state in (whole, plain)]
    assert 0.3 * moved[1] < moved[0] < moved[1]  # a decay of 0.9 lags behind, after 24 steps
    loaded = spar.load(tmp_path / "whole").backbone.state_dict()
    best = torch.load(tmp_path / "whole" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(loaded[trained.removeprefix("student.")], best[trained])
    of_plain = torch.load(tmp_path / "plain" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(best[trained], of_plain[trained])
