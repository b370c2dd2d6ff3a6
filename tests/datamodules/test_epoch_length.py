"""Tests of Lightning's counters in an epoch in which the number of ranks changes, and in the epochs after it.

The ranks are simulated: the only process is rank 0 of them.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spar_lightning.callbacks.checkpoint import LastCheckpoint
from spar_lightning.datamodules import SA1B
from spar_lightning.datamodules.dataloader import ResumableLoader
from spar_lightning.datamodules.epoch_length import set_epoch_length
from spar_lightning.datamodules.samplers import EpochOrder

IMAGES = 24


class Ranks(SA1B):
    """Data module with numbers instead of images."""

    def __init__(self, ranks: int) -> None:
        super().__init__("none.tar")
        self.ranks = ranks

    def setup(self, stage: str) -> None:
        """Open nothing."""

    def train_dataloader(self) -> ResumableLoader:
        order = EpochOrder(IMAGES, 1, 0, self.ranks, seed=3)
        return ResumableLoader(range(IMAGES), order, 0, on_length=partial(set_epoch_length, self.trainer))  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader([0, 1])  # type: ignore[arg-type]


class Module(LightningModule):
    """Module that records the progress of its training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.batches: dict[int, list[int]] = {}  # indices of the batches in each epoch
        self.lengths: list[int | float] = []  # number of batches, seen by hooks at the start of training and epochs
        self.validations: list[int] = []  # optimizer steps of validations
        self.ends: list[tuple[int, int]] = []  # number of each epoch, and optimizer step at its end
        self.last: list[int] = []  # optimizer steps of batches that Lightning calls the last ones

    def training_step(self, batch: list[int], batch_idx: int) -> Tensor:
        self.batches.setdefault(self.current_epoch, []).append(batch_idx)
        return self.weight * 1.0

    def on_train_start(self) -> None:
        self.lengths.append(self.trainer.num_training_batches)

    def on_train_epoch_start(self) -> None:
        self.lengths.append(self.trainer.num_training_batches)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.is_last_batch:
            self.last.append(self.global_step)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validations += [self.global_step] * (batch_idx == 0)

    def on_train_epoch_end(self) -> None:
        if self.trainer.is_last_batch:
            self.ends.append((self.current_epoch, self.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Crash(Callback):
    """Callback that fails before an optimizer step, or after the last batch of an epoch has been saved."""

    def __init__(self, step: int | None = None, save: Path | None = None) -> None:
        self.step, self.save = step, save

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.save is not None and trainer.is_last_batch:
            trainer.save_checkpoint(self.save)
            raise ZeroDivisionError


def fit(folder: Path, ranks: int, crash: Crash | None = None, resume: str | None = None, **options: Any) -> Module:
    """Train two epochs, until the crash if one is given, with a checkpoint after each step."""
    module = Module()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=str(folder), callbacks=[LastCheckpoint(str(folder), 1), crash or Callback()],
        **{"max_epochs": 2, **options},
    )  # fmt: skip
    start = None if resume is None else str(folder / resume)
    try:
        trainer.fit(module, datamodule=Ranks(ranks), ckpt_path=start, weights_only=False)
    except ZeroDivisionError:
        assert crash is not None
    return module


@pytest.mark.parametrize(
    ("before", "step", "after", "options", "lengths", "validations"),
    [
        (4, 2, 4, {}, (6, 6), [6, 12]),
        (4, 2, 2, {}, (2 + 8, 12), [10, 22]),
        (2, 8, 4, {}, (8 + 2, 6), [10, 16]),
        (1, 22, 4, {}, (22, 6), [22, 28]),  # 2 images are too few for 4 ranks: only the validation is left
        (1, 22, 4, {"check_val_every_n_epoch": 2}, (22, 6), [28]),
        (4, 1, 2, {"limit_train_batches": 0.5, "val_check_interval": 0.5}, (1 + 4, 6), [2, 4, 8, 11]),
        (2, 5, 4, {"limit_train_batches": 0.5}, (5, 3), [5, 8]),
        (4, 3, 2, {"limit_train_batches": 5}, (5, 5), [5, 10]),
        (4, 1, 2, {"accumulate_grad_batches": 2, "val_check_interval": 3}, (2 + 8, 12), [1, 3, 4, 6, 8, 9, 11]),
        (4, 2, 1, {"max_steps": 100}, (2 + 16, 24), [18, 42]),
    ],
)
def test_a_crash_within_an_epoch(
    before: int, step: int, after: int, options: dict[str, Any], lengths: tuple[int, int], validations: list[int],
    tmp_path: Path,
) -> None:  # fmt: skip
    first = fit(tmp_path, before, Crash(step), **options)
    done = len(first.batches[0])
    module = fit(tmp_path, after, resume="last.ckpt", **options)
    assert module.batches.get(0, []) == list(range(done, lengths[0]))
    assert module.batches[1] == list(range(lengths[1]))
    assert module.lengths == list(lengths)
    assert module.validations == validations
    steps = [end for _, end in module.ends]
    assert [epoch for epoch, _ in module.ends] == [0, 1]
    assert module.last == (steps if done < lengths[0] else steps[1:])


def test_another_loader_leaves_the_trainer_alone(tmp_path: Path) -> None:
    data = Ranks(2)
    data.trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=str(tmp_path))
    assert len(list(data.train_dataloader())) == 12 and data.trainer.num_training_batches == float("inf")


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (4, 4)])
@pytest.mark.parametrize("options", [{}, {"max_steps": 100}, {"max_steps": 100, "check_val_every_n_epoch": 2}])
def test_other_ranks_from_the_end_of_an_epoch(before: int, after: int, options: Any, tmp_path: Path) -> None:
    end, length = IMAGES // before, IMAGES // after
    fit(tmp_path, before, max_epochs=1)
    module = fit(tmp_path, after, resume="epoch.ckpt", **options)
    assert module.batches == {1: list(range(length))}
    assert module.lengths == [length, length]
    assert module.validations == [end + length] and module.ends == [(1, end + length)]


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (4, 4)])
def test_other_ranks_from_the_last_batch(before: int, after: int, tmp_path: Path) -> None:
    """Lightning takes a checkpoint of on_train_batch_end for the end of the epoch."""
    fit(tmp_path, before, Crash(save=tmp_path / "x.ckpt"))
    module = fit(tmp_path, after, resume="x.ckpt")
    assert module.batches == {1: list(range(IMAGES // after))}
    assert module.ends == [(1, IMAGES // before + IMAGES // after)]


def test_max_steps_within_an_epoch(tmp_path: Path) -> None:
    """Train 8, 6 and 9 images of an epoch; the last one is too few for 3 ranks. Then two epochs with 3 ranks."""
    resume = None
    modules = []
    for ranks, steps in ((4, 2), (2, 5), (1, 14), (3, 30)):
        modules.append(fit(tmp_path, ranks, resume=resume, max_steps=steps, max_epochs=3))
        resume = "last.ckpt"
    assert [module.batches.get(0, []) for module in modules] == [[0, 1], [2, 3, 4], list(range(5, 14)), []]
    assert [module.validations for module in modules] == [[], [], [], [14, 22, 30]]
    assert [module.ends for module in modules] == [[], [], [], [(0, 14), (1, 22), (2, 30)]]
    assert modules[3].batches == {1: list(range(8)), 2: list(range(8))}
