"""Callbacks that disturb a run: they wait, fail or kill a process at a given moment."""

import os
import signal
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from spar_lightning.errors import UserError
from spar_lightning.stopping import signals


class Slow(Callback):
    """Callback that makes each step and each validation batch take some time."""

    def __init__(self, step: float = 0.0, validation: float = 0.0) -> None:
        self.step, self.validation = step, validation

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(self.step)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        time.sleep(self.validation)


class Fault(Callback):
    """Callback that fails on one rank at one step: with a UserError, a bug, a signal or SIGKILL."""

    def __init__(self, rank: int, kind: str, step: int = 3) -> None:
        self.rank, self.kind, self.step = rank, kind, step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != self.rank or trainer.global_step != self.step:
            return
        if self.kind == "user":
            raise UserError("data.shards: the disk of this rank is full of eels.")
        if self.kind == "bug":
            raise ZeroDivisionError("a bug")
        if self.kind == "stop":  # not deferred to the end of the step, as in a validation
            signals.settle()
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.kind == "hang":
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
