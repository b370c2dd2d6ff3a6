"""Tests of the checkpoints: saved every N steps, and replacing the old file only when complete."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spar_lightning.callbacks.checkpoint import DurableCheckpointIO, LastCheckpoint
from spar_lightning.callbacks.jsonl_logger import JSONLLogger, read_metrics
from spar_lightning.errors import UserError


class Trainer(SimpleNamespace):
    """Trainer with only the attributes that the callback reads."""

    def __init__(self) -> None:
        super().__init__(global_step=0, is_last_batch=False, saved=[], validates=())
        self.fit_loop = SimpleNamespace(
            _data_fetcher=object(),
            epoch_loop=SimpleNamespace(_should_check_val_fx=lambda fetcher: self.global_step in self.validates),
        )
        self.strategy = SimpleNamespace(reduce_boolean_decision=lambda asked, all: asked)

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        self.saved.append((path.name, self.global_step))


def steps(callback: LastCheckpoint, trainer: Any, accumulate: int, last: int) -> None:
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    for batch in range(1, last * accumulate + 1):
        trainer.global_step = batch // accumulate
        trainer.is_last_batch = batch == last * accumulate
        callback.on_train_batch_end(trainer, None, None, None, batch - 1)  # type: ignore[arg-type]


def test_not_before_a_validation_which_a_resumed_run_would_skip() -> None:
    trainer, callback = Trainer(), LastCheckpoint("checkpoints", every_n_steps=2)
    trainer.validates = (4, 6)
    steps(callback, trainer, 1, last=9)
    assert trainer.saved == [("last.ckpt", 2), ("last.ckpt", 8)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_once_every_so_many_steps_and_not_before_the_end_of_an_epoch(accumulate: int) -> None:
    trainer, callback = Trainer(), LastCheckpoint("checkpoints", every_n_steps=4)
    steps(callback, trainer, accumulate, last=12)
    assert trainer.saved == [("last.ckpt", 4), ("last.ckpt", 8)]
    callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.saved[2:] == [("epoch.ckpt", 12), ("last.ckpt", 12)]


def test_at_least_one_step() -> None:
    with pytest.raises(UserError, match=r"checkpoint_every_n_steps .*1.*0"):
        LastCheckpoint("checkpoints", 0)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = DurableCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"last\.ckpt .*disk full"):
        io.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and len(list(path.parent.iterdir())) == 1
    monkeypatch.undo()
    io.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_metrics_go_on_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0, "loss": 2.0}) + '\n{"step": 1, "lo')
    JSONLLogger(str(tmp_path)).log_metrics({"loss": 1.0}, step=1)
    assert read_metrics(path) == {"loss": {0: 2.0, 1: 1.0}}
