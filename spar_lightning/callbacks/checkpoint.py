"""Checkpoints: last.ckpt every few steps and on a signal, epoch.ckpt at the end of each epoch, best.ckpt by mIoU.

All are written atomically, into one folder. A stopped run continues from last.ckpt, in the middle of its epoch if
necessary.
"""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from spar_lightning.errors import UserError, check_at_least
from spar_lightning.files.atomic import sync_folder
from spar_lightning.stopping import signals


class LastCheckpoint(Checkpoint):
    """Callback that saves last.ckpt and epoch.ckpt, and stops the run on a signal (see `spar_lightning.stopping`).

    During training, a signal on any rank stops all ranks at the end of the same optimizer step, with a checkpoint. Each
    validation also starts with a checkpoint: a signal ends it at once, and the resumed run repeats it.

    Args:
        folder: Folder of the checkpoints.
        every_n_steps: Save last.ckpt every N optimizer steps, in addition to the end of each epoch.
    """

    def __init__(self, folder: str, every_n_steps: int) -> None:
        check_at_least(1, checkpoint_every_n_steps=every_n_steps)
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self._step = 0  # optimizer step at the end of the previous batch
        self._stopping = False
        self._validating = self._within = False  # saving before a validation; saving within an epoch at its end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defer signals to the end of a step."""
        self._step = trainer.global_step
        signals.defer()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save last.ckpt if it is due or if a rank was asked to stop."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        loop = trainer.fit_loop.epoch_loop
        # Before a validation, on_validation_start saves; after the last batch, on_train_epoch_end does. A checkpoint
        # of this moment would make Lightning skip that validation.
        assert trainer.fit_loop._data_fetcher is not None
        if not stepped or trainer.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            return
        self._stopping = _stop(trainer)
        if self._stopping or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, "last.ckpt")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop after the previous step, whose metrics have been logged by now.

        Raises:
            Stopped: If a rank was asked to stop.
        """
        if self._stopping:
            signals.resume()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save last.ckpt before a validation during training, and let a signal end the validation at once.

        Raises:
            Stopped: If this rank was asked to stop.
        """
        if trainer.sanity_checking or not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            return
        # A resume in the middle of a validation has counted its first batch as started (see on_save_checkpoint).
        total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        total.ready = total.started = total.processed
        self._validating = True
        self._save(trainer, "last.ckpt")
        self._validating = False
        signals.resume()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defer signals again."""
        if not trainer.sanity_checking:
            signals.defer()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark a checkpoint that is saved before a validation, so that a resumed run begins with it."""
        if self._within:  # Lightning has counted the epoch as processed already
            for counter in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counter["processed"] -= 1
        if self._validating:  # Lightning only repeats a validation whose first batch was started
            total = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
            total["ready"] += 1
            total["started"] += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save epoch.ckpt and last.ckpt.

        Raises:
            Stopped: If a rank was asked to stop.
        """
        # max_steps also ends a run within an epoch, which then continues from last.ckpt.
        self._within = not trainer.is_last_batch
        for name in ("last.ckpt",) if self._within else ("epoch.ckpt", "last.ckpt"):
            self._save(trainer, name)
        self._within = False
        if _stop(trainer):
            signals.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a signal end the command at once from here on.

        Raises:
            Stopped: If this rank was asked to stop.
        """
        signals.resume()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the deferral of signals."""
        signals.settle()

    def _save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / name, weights_only=False)


def _stop(trainer: Trainer) -> bool:
    """Return whether any rank was asked to stop; the same on all ranks. Every rank must call this at the same step."""
    stop = trainer.strategy.reduce_boolean_decision(signals.requested is not None, all=False)
    if stop and signals.requested is None:
        signals.requested = signal.SIGTERM  # that rank knows which signal it was
    return stop


def _of_loader(error: BaseException | None) -> BaseException | None:
    """Return the error of a loader process that was killed, which torch's signal handler raises at any place."""
    while error is not None and "DataLoader worker" not in str(error):
        error = error.__context__
    return error


class BestCheckpoint(ModelCheckpoint):
    """Callback that saves best.ckpt, the checkpoint with the best mean mIoU.

    A class of its own, because Lightning allows one ModelCheckpoint per metric, which a user can thus add.

    Args:
        folder: Folder of the checkpoint.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, "best", monitor="mIoU/mean", mode="max", enable_version_counter=False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the state of this callback in checkpoints of version 0.1."""
        states = checkpoint["callbacks"]
        older = self.state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)
        if self.state_key not in states and older in states:
            states[self.state_key] = states[older]


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that replaces the old file only after the new one is on disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a temporary file in the same folder, sync it, then rename it.

        Raises:
            UserError: If the file cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
            unfinished.unlink(missing_ok=True)
            if killed := _of_loader(error):
                raise killed from None
            raise UserError(
                f"{path} cannot be written ({error}). Free disk space and continue with --resume auto; the previous "
                "checkpoint is intact."
            ) from error
        os.replace(unfinished, path)
        sync_folder(path.parent)
