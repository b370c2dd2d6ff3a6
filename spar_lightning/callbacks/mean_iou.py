"""MeanIoU: exact mIoU of every validation set, before, during and after training.

The student's own validations are the Trainer's; its schedule decides when. Before the first step
this callback also measures the single pass and the teacher as they start, so that a run ends with
the comparison that the method is about. What was measured travels in the checkpoint.
"""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError, check_at_least, nearest
from spar_lightning.evaluation.loop import count
from spar_lightning.evaluation.protocol import differences
from spar_lightning.evaluation.score import Result, Score
from spar_lightning.markdown import markdown
from spar_lightning.segmenter import Inference

log = logging.getLogger("spar_lightning")

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
    """Measure mIoU on the datamodule's benchmarks; trainer.check_val_every_n_epoch and val_check_interval say when.

    Args:
        before: Measure the single pass before the first training step.
        teacher: Measure the sliding-window teacher before the first training step; costly at full size.
        at_end: Measure the single pass when training ends, and print all of it in a table.
        benchmarks: Names of those of data.benchmarks that are measured; null takes all.
        max_images: Images of each benchmark, spread evenly over it; null takes all.

    Attributes:
        rows: What was measured outside the Trainer's validations.
        results: The Trainer's last validation, by benchmark.
    """

    def __init__(
        self,
        before: bool = True,
        teacher: bool = True,
        at_end: bool = True,
        benchmarks: Sequence[str] | None = None,
        max_images: int | None = None,
    ) -> None:
        check_at_least(1, **{"mean_iou.max_images": max_images})
        self.before = before
        self.teacher = teacher
        self.at_end = at_end
        self.benchmarks = benchmarks
        self.max_images = max_images
        self.rows: list[Row] = []
        self.results: dict[str, Result] = {}
        self._scores: list[Score] = []
        self._protocol: dict[str, Any] = {}
        self._fitting = False

    def check(self, data: SA1B) -> None:
        """Raise UserError if a name is none of the datamodule's benchmarks."""
        names = [benchmark.name for benchmark in data.benchmarks]
        for name in self.benchmarks or []:
            if name not in names:
                raise UserError(
                    f"mean_iou.benchmarks: {name!r} is none of data.benchmarks. {nearest(name, names)}Those are "
                    f"{', '.join(names) or 'none'}."
                )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = _data(trainer)
        assert isinstance(pl_module, Distillation)
        # Its rows are single passes and sliding windows, whatever validation is; the stride belongs to them.
        protocol = replace(pl_module.protocol(str(trainer.precision)), inference="sliding")
        self._protocol = protocol.content()
        self._fitting = stage == "fit"
        if self.benchmarks is not None:
            data.benchmarks = [benchmark for benchmark in data.benchmarks if benchmark.name in self.benchmarks]
        for benchmark in data.benchmarks:
            benchmark.keep(self.max_images)

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
        if self.at_end:
            pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU by now
            self._measure(trainer, "after")
        self._write(trainer)

    def _measure(self, trainer: Trainer, stage: Stage) -> None:
        """Run a segmenter over all benchmarks, outside the Trainer's loop, and keep the row."""
        data, module = _data(trainer), trainer.lightning_module
        assert isinstance(module, Distillation)
        way: Inference = "sliding" if stage == "teacher" else "single"
        backbone = module.teacher_backbone() if stage == "teacher" else None
        results, ms = {}, 0.0
        for benchmark, loader in zip(data.benchmarks, data.val_dataloader(), strict=True):
            limit = _limit(trainer.limit_val_batches, len(loader))
            if not limit:
                continue
            device, precision = trainer.strategy.root_device, trainer.precision_plugin.forward_context
            score = Score(len(benchmark.classes), device)
            shown = (image for batch in islice(loader, limit) for image in batch)
            times = tqdm(
                count(module.segmenter(benchmark.description, way, backbone), shown, score, device, precision),
                f"{TITLES[stage]}: {benchmark.name}", limit, leave=False, unit="image",
                disable=not trainer.is_global_zero,
            )  # fmt: skip
            ms = statistics.median(times)
            results[benchmark.name] = score.compute()
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
        return {"rows": self.rows, "protocol": self._protocol}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [row for row in state_dict["rows"] if row["stage"] != "after"]
        other = differences(state_dict.get("protocol", self._protocol), self._protocol)
        if self._fitting and other:
            log.warning(
                "The mIoU before training is left out of the table: it was measured otherwise (%s). Measure it by "
                "`spar validate`, or start anew with another --run_dir.",
                "; ".join(other),
            )
            self.rows = []


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


def named(results: Mapping[str, Result]) -> dict[str, float]:
    """Metric names and values: each benchmark, and the plain mean of all."""
    values = {f"mIoU/{name}": result.miou for name, result in results.items()}
    return {**values, "mIoU/mean": statistics.fmean(values.values())} if values else {}


def _data(trainer: Trainer) -> SA1B:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, SA1B)
    return datamodule


def _limit(limit: int | float | None, batches: int) -> int:
    """The Trainer's limit_val_batches as a number of batches."""
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)
