"""Progress bars: one for the whole of `fit`, with rate, remaining time and loss, and one per validation."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class FitProgress(ProgressBar):
    """Progress bars (tqdm) that count the training batches of the whole run instead of one epoch.

    Args:
        title: Title of the bar for training.
    """

    def __init__(self, title: str = "distilling") -> None:
        super().__init__()
        self._title = title
        self._enabled = True
        self._fit: tqdm[Any] | None = None
        self._validation: tqdm[Any] | None = None

    def disable(self) -> None:
        """Disable the bars."""
        self._enabled = False

    def enable(self) -> None:
        """Enable the bars."""
        self._enabled = True

    def _bar(self, description: str, total: float, unit: str, leave: bool, initial: int = 0) -> "tqdm[Any]":
        # A log file gets a line every 10 s instead of a redraw every 0.1 s.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        count = None if total == float("inf") else int(total)
        return tqdm(
            desc=description, total=count, unit=unit, leave=leave, initial=initial, mininterval=interval,
            dynamic_ncols=True, disable=not self._enabled,
        )  # fmt: skip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of the run."""
        loop = trainer.fit_loop.epoch_loop
        total = self._total(trainer, loop.batch_idx + 1)
        self._fit = self._bar(self._title, total or float("inf"), "step", leave=True, initial=loop.total_batch_idx + 1)

    @staticmethod
    def _total(trainer: Trainer, finished: int) -> int | None:
        """Return the batches of the run, if its end is known; an epoch in which the ranks change has another length.

        Args:
            trainer: Trainer of the run.
            finished: Number of finished batches of the current epoch.
        """
        before = trainer.fit_loop.epoch_loop.total_batch_idx + 1 - finished
        epochs = float("inf") if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
        total = before + trainer.num_training_batches * (epochs - trainer.current_epoch)
        if trainer.max_steps > 0:
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
        return None if total == float("inf") else int(total)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar of the run and show the logged values."""
        assert self._fit is not None
        self._fit.total = self._total(trainer, batch_idx + 1)
        shown = self.get_metrics(trainer, pl_module)
        self._fit.set_postfix(
            {"epoch": trainer.current_epoch, **{k: v for k, v in shown.items() if k != "v_num"}}, refresh=False
        )
        self._fit.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of the run."""
        if self._fit is not None:
            self._fit.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close all bars."""
        for bar in (self._fit, self._validation):
            if bar is not None:
                bar.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of the validation."""
        total = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        self._validation = self._bar("validating", total, "image", leave=False)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Advance the bar of the validation."""
        assert self._validation is not None
        self._validation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of the validation."""
        assert self._validation is not None
        self._validation.close()
