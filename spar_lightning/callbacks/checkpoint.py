"""last.ckpt every few steps and epoch.ckpt at the end of each epoch, whole or not at all.

A run that dies goes on from last.ckpt, in the middle of its epoch. epoch.ckpt is where a run goes on
with another number of processes, which changes the order inside an epoch.
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
    """Save where the run stands.

    Args:
        folder: For last.ckpt and epoch.ckpt.
        every_n_steps: Optimizer steps between two savings inside an epoch.
    """

    def __init__(self, folder: str, every_n_steps: int) -> None:
        check_at_least(1, checkpoint_every_n_steps=every_n_steps)
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self._saved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not at the last step of an epoch: its end is saved in a moment, with the validation that belongs to it.
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved
        if due and not trainer.is_last_batch:
            self._saved = trainer.global_step
            trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in ("epoch.ckpt", "last.ckpt"):
            trainer.save_checkpoint(self.folder / name, weights_only=False)


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoints that replace the old one only when they are on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the final name, sync, then rename."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch tells of a full disk in a RuntimeError
            unfinished.unlink(missing_ok=True)
            raise UserError(
                f"{path} cannot be written ({error}). Make room and go on with --resume auto; the checkpoint before "
                "this one is whole."
            ) from error
        os.replace(unfinished, path)
        sync_folder(path.parent)
