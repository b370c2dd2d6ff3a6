"""Tests of diverging runs: training stops at once, and checkpoints and metrics stay finite and readable."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from spar_lightning.callbacks.jsonl_logger import JSONLLogger, read_metrics
from spar_lightning.cli import main
from tests.conftest import Finished

Capture = pytest.CaptureFixture[str]


class Diverging(nn.MSELoss):
    """Mean squared error that becomes NaN at one image.

    Args:
        image: Number of the image, counted from 0 by each rank.
        rank: Only this local rank diverges.
        gradient: Only the gradient becomes NaN; the loss is finite.
    """

    def __init__(self, image: int, rank: int = 0, gradient: bool = False) -> None:
        super().__init__()
        self.image = image if int(os.environ.get("LOCAL_RANK", "0")) == rank else -1
        self.gradient = gradient
        self.seen = 0

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self.seen += 1
        loss = super().forward(input, target)
        if self.seen != self.image + 1:
            return loss
        return loss + (loss - loss.detach()).sqrt() if self.gradient else loss * math.nan  # sqrt'(0) is infinite


LOSS = f"{__name__}.{Diverging.__name__}"
EVERY_STEP = ["--checkpoint_every_n_steps", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small: list[str], scenes: Path) -> Path:
    """Return the folder of a run of one epoch (12 steps)."""
    folder = tmp_path_factory.mktemp("diverging") / "run"
    first = ["--trainer.max_epochs", "1", "--mean_iou.teacher", "false"]
    assert main(["fit", *small, *first, "--data.root", str(scenes), "--run_dir", str(folder)]) == 0
    return folder


def tensors(content: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested dictionaries and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)


def strict(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; raise ValueError for NaN and Infinity, which are not JSON."""

    def fail(constant: str) -> NoReturn:
        raise ValueError(constant)

    return [json.loads(line, parse_constant=fail) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "found", "logged"),
    [
        (["--model.loss", LOSS, "--model.loss.image", "3"], ["loss is nan", "images: sa_", "global step 15"], 15),
        (
            ["--model.loss", LOSS, "--model.loss.image", "0", "--model.loss.gradient", "true", *EVERY_STEP],
            ["trained parameters", "blocks.3", "global step 13"],
            12,  # the weights are checked before the loss of the step is logged
        ),
    ],
)
def test_a_diverging_run_stops_and_keeps_its_checkpoints(
    options: list[str], found: list[str], logged: int, finished: Path, small: list[str], scenes: Path, tmp_path: Path,
    capsys: Capture,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    assert set(before) == {"last.ckpt", "epoch.ckpt", "best.ckpt"}
    where = ["--data.root", str(scenes), "--run_dir", str(run), "--resume", "auto"]
    assert main(["fit", *small, *where, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert [part for part in ["spar fit: error:", *found, "model.lr", "--resume auto"] if part not in error] == []
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    for path in (run / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        state = [content["state_dict"], content["optimizer_states"]]
        assert all(tensor.isfinite().all() for tensor in tensors(state))
    steps = [row["step"] for row in strict(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(logged))


@pytest.mark.slow
def test_all_ranks_report_the_image_of_the_diverging_one(
    small: list[str], scenes: Path, tmp_path: Path, spar: Callable[..., Finished]
) -> None:
    where = ["--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), "--trainer.devices", "2"]
    loss = ["--model.loss", LOSS, "--model.loss.image", "3", "--model.loss.rank", "1"]
    bare = ["--mean_iou.before", "false", "--mean_iou.teacher", "false"]
    done = spar(["fit", *small, *where, *loss, *bare])
    assert done.code == 2, done.err
    assert "loss is nan" in done.err and "global step 3" in done.err and "Traceback" not in done.err


def test_metrics_are_json_if_a_value_is_not_finite(tmp_path: Path) -> None:
    logger = JSONLLogger(str(tmp_path))
    logger.log_metrics({"loss": math.nan, "other": 1.0}, step=0)
    logger.log_metrics({"loss": -math.inf}, step=1)
    assert strict(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": None, "other": 1.0}, {"step": 1, "loss": None}]
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics["other"] == {0: 1.0} and all(math.isnan(value) for value in metrics["loss"].values())
