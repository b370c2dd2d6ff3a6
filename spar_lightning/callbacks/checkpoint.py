"""Checkpoints: last.ckpt every few steps and epoch.ckpt at the end of each epoch, written atomically.

An interrupted run continues from last.ckpt in the middle of its epoch. To continue with another number of ranks, which
changes the order within an epoch, a run starts from epoch.ckpt.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from spar_lightning.errors import UserError, check_at_least
from spar_lightning.files.atomic import sync_folder


class LastCheckpoint(Checkpoint):
    """Callback that saves last.ckpt and epoch.ckpt.

    Args:
        folder: Folder of the checkpoints.
        every_n_steps: Save last.ckpt every N optimizer steps, in addition to the end of each epoch.
    """

    def __init__(self, folder: str, every_n_steps: int) -> None:
        check_at_least(1, checkpoint_every_n_steps=every_n_steps)
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self._saved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the step at which training starts, which is not saved again."""
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save last.ckpt if it is due."""
        # The last step of an epoch is skipped: on_train_epoch_end saves it, after the validation of that epoch.
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved
        if due and not trainer.is_last_batch:
            self._saved = trainer.global_step
            trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save epoch.ckpt and last.ckpt."""
        for name in ("epoch.ckpt", "last.ckpt"):
            trainer.save_checkpoint(self.folder / name, weights_only=False)


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
            raise UserError(
                f"{path} cannot be written ({error}). Free disk space and continue with --resume auto; the previous "
                "checkpoint is intact."
            ) from error
        os.replace(unfinished, path)
        sync_folder(path.parent)
