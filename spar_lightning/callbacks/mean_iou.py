"""MeanIoU: exact mIoU of every validation set, before, during and after training.

The student's own validations are the Trainer's; its schedule decides when. Before the first step
this callback also measures the single pass and the teacher as they start, so that a run ends with
the comparison that the method is about. What was measured travels in the checkpoint.
"""

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from spar_lightning.callbacks.score import Result, Score
from spar_lightning.datamodules.benchmark import Benchmark
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datamodules.sample import LabelledImage
from spar_lightning.distillation import Distillation
from spar_lightning.segmenter import Segmenter

Stage = Literal["before", "teacher", "after"]

TITLES: dict[Stage, str] = {
    "before": "single pass, before",
    "teacher": "sliding window (teacher)",
    "after": "single pass, after (SPAR)",
}


class Row(TypedDict):
    """One way of inference: mIoU in percent and images counted by benchmark, and ms per image of the last one."""

    stage: Stage
    miou: dict[str, float]
    images: dict[str, int]
    ms: float


class MeanIoU(Callback):
    """Measure mIoU on the datamodule's benchmarks.

    Args:
        before: Measure the single pass before the first training step.
        teacher: Measure the sliding-window teacher before the first training step; costly at full size.

    Attributes:
        rows: What was measured outside the Trainer's validations.
        results: The Trainer's last validation, by benchmark.
    """

    def __init__(self, before: bool = True, teacher: bool = True) -> None:
        self.before = before
        self.teacher = teacher
        self.rows: list[Row] = []
        self.results: dict[str, Result] = {}
        self._scores: list[Score] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            return
        if self.before:
            self._measure(trainer, "before")
        if self.teacher:
            self._measure(trainer, "teacher")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scores = [Score(len(benchmark.classes), pl_module.device) for benchmark in _data(trainer).benchmarks]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        for predicted, image in zip(outputs["labels"], batch, strict=True):
            self._scores[dataloader_idx].update(predicted, image.labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = zip(_data(trainer).benchmarks, self._scores, strict=True)
        self.results = {benchmark.name: score.compute() for benchmark, score in scores}
        pl_module.log_dict(named(self.results))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU by now
        self._measure(trainer, "after")
        self._write(trainer)

    def _measure(self, trainer: Trainer, stage: Stage) -> None:
        """Run a segmenter over all benchmarks, outside the Trainer's loop, and keep the row."""
        data, module = _data(trainer), trainer.lightning_module
        assert isinstance(module, Distillation)
        segmenter_of = module.teacher_segmenter if stage == "teacher" else partial(module.segmenter, inference="single")
        results, ms = {}, 0.0
        for benchmark, loader in zip(data.benchmarks, data.val_dataloader(), strict=True):
            limit = _limit(trainer.limit_val_batches, len(loader))
            if not limit:
                continue
            bar = tqdm(
                islice(loader, limit), f"{TITLES[stage]}: {benchmark.name}", limit, leave=False, unit="image",
                disable=not trainer.is_global_zero,
            )  # fmt: skip
            results[benchmark.name], ms = _evaluate(trainer, segmenter_of(benchmark.classes), bar, benchmark)
        if not results:
            return
        miou, images = {k: r.miou for k, r in results.items()}, {k: r.images for k, r in results.items()}
        self.rows.append({"stage": stage, "miou": miou, "images": images, "ms": ms})
        if stage != "after":  # the student's own curve comes from validation
            for logger in trainer.loggers:
                logger.log_metrics({f"{stage}/{k}": v for k, v in named(results).items()}, trainer.global_step)

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        """Print the table and leave its numbers in the run folder."""
        if self.rows:
            path = Path(trainer.default_root_dir) / "results.json"
            path.write_text(json.dumps(self.rows, indent=2) + "\n")
            print(f"\n{table(self.rows)}\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [row for row in state_dict["rows"] if row["stage"] != "after"]


def table(rows: Sequence[Row]) -> str:
    """One line per way of inference, mIoU per benchmark, milliseconds per image of the last benchmark."""
    names = list(dict.fromkeys(name for row in rows for name in row["miou"]))
    head = ["inference", *(f"mIoU {name}" for name in names), f"ms per image ({names[-1]})"]
    body = [
        [
            TITLES[row["stage"]],
            *(f"{row['miou'][n]:.1f}" if n in row["miou"] else "-" for n in names),
            f"{row['ms']:.1f}",
        ]
        for row in rows
    ]
    counted = ", ".join(f"{count} images of {name}" for name, count in rows[-1]["images"].items())
    note = f"mIoU in percent over {counted}; ms: median, segmentation alone, one image at a time"
    return f"{markdown([head, *body])}\n\n{note}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as it is; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in ruled)


def named(results: Mapping[str, Result]) -> dict[str, float]:
    """Metric names and values: each benchmark, and the plain mean of all."""
    values = {f"mIoU/{name}": result.miou for name, result in results.items()}
    return {**values, "mIoU/mean": statistics.fmean(values.values())} if values else {}


def _evaluate(
    trainer: Trainer, segmenter: Segmenter, batches: Iterable[list[LabelledImage]], benchmark: Benchmark
) -> tuple[Result, float]:
    """Score of one segmenter on one benchmark, and its median time per image in milliseconds."""
    device = trainer.strategy.root_device
    score = Score(len(benchmark.classes), device)
    times = []
    for image in (image for batch in batches for image in batch):
        pixels = image.image.to(device)
        start = _now(device)
        with trainer.precision_plugin.forward_context():
            predicted = segmenter(pixels)
        times.append(1000 * (_now(device) - start))
        score.update(predicted, image.labels.to(device))
    return score.compute(), statistics.median(times)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _data(trainer: Trainer) -> SA1B:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, SA1B)
    return datamodule


def _limit(limit: int | float | None, batches: int) -> int:
    """The Trainer's limit_val_batches as a number of batches."""
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)
