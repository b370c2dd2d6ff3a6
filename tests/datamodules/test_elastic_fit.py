"""Test of `spar fit` with 4, 2, 1 and 3 ranks in the same epoch: each image is trained once."""

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from scripts.crash_fit import start
from spar_lightning.datasets.samples import Sample


class Seen(Callback):
    """Callback that records the keys of the images that a rank trains, and the ends of epochs and validations.

    Args:
        folder: Folder of the records.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _write(self, trainer: Trainer, **row: Any) -> None:
        row |= {"epoch": trainer.current_epoch, "step": trainer.global_step, "batches": trainer.num_training_batches}
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: list[Sample], *args: Any) -> None:
        self._write(trainer, keys=[sample.key for sample in batch])

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer, event="validation")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_last_batch:
            self._write(trainer, event="end")


def test_four_two_one_and_three_ranks(small: list[str], scenes: Path, tmp_path: Path) -> None:
    """Train 4 images on 4 ranks, 4 on 2, 1 on 1 and 3 on 3; then an epoch of 12 images on 3."""
    run = tmp_path / "run"
    args = [
        "fit", *small, "--data.root", str(scenes), "--run_dir", str(run), "--trainer.accelerator", "cpu",
        "--mean_iou.before", "false", "--mean_iou.teacher", "false", "--trainer.logger", "false",
        "--trainer.callbacks", f"{__name__}.Seen", "--trainer.callbacks.folder", str(tmp_path),
        "--trainer.num_sanity_val_steps", "0", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    for ranks, steps in ((4, 1), (2, 3), (1, 4), (3, 9)):
        world = ["--trainer.devices", str(ranks), *(["--trainer.strategy", "ddp"] if ranks > 1 else [])]
        log = tmp_path / f"log-{ranks}"
        pids = start([*args, *world, "--trainer.max_steps", str(steps), "--resume", "auto"], ranks, log)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [0] * ranks, log.read_text()[-3000:]

    records = [
        [json.loads(line) for line in (tmp_path / f"rank-{rank}.jsonl").read_text().splitlines()] for rank in range(4)
    ]
    rows = [row for rank in records for row in rank if "keys" in row]
    for epoch in range(2):
        keys = list(chain(*(row["keys"] for row in rows if row["epoch"] == epoch)))
        assert len(keys) == len(set(keys)) == 12
    assert [row["step"] for row in records[0] if "keys" in row] == list(range(9))
    events = [(row["event"], row["epoch"], row["step"], row["batches"]) for row in records[0] if "event" in row]
    assert events == [("validation", 0, 5, 5), ("end", 0, 5, 5), ("validation", 1, 9, 4), ("end", 1, 9, 4)]
    for name in ("epoch.ckpt", "last.ckpt"):
        saved = torch.load(run / "checkpoints" / name, weights_only=True)
        assert (saved["epoch"], saved["global_step"]) == (1, 9)
