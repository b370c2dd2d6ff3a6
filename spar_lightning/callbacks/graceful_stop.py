"""Graceful stop on Ctrl-C during `fit`: finish the step, save a checkpoint, stop.

A checkpoint saved in the middle of a step would contain half an update.
"""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

STEPS_BETWEEN_LOOKS = 10  # with several ranks, which must stop at the same step


class SaveOnInterrupt(Callback):
    """Callback that saves `last.ckpt` and stops at the end of a step after SIGINT; a second Ctrl-C stops at once.

    Args:
        checkpoints: Folder for last.ckpt.
    """

    def __init__(self, checkpoints: str) -> None:
        self.path = Path(checkpoints) / "last.ckpt"
        self.stopped = False
        self._asked = False
        self._speaks = True
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the SIGINT handler."""
        self._speaks = trainer.is_global_zero
        self._previous = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if self._speaks:
            print("\nStopping after this step and saving a checkpoint. Press Ctrl-C again to stop at once.", flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint and stop if SIGINT was received on any rank."""
        asked = self._asked
        if trainer.world_size > 1:
            if trainer.global_step % STEPS_BETWEEN_LOOKS:
                return
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            trainer.save_checkpoint(self.path, weights_only=False)
            self.stopped = True
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous SIGINT handler."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
