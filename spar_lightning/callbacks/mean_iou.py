"""MeanIoU: callback that measures the exact mIoU of every validation set before, during and after training.

The Trainer validates the student; its options decide when. Before the first step, this callback also measures
single-pass inference and the sliding-window teacher, so that the results of a run compare the student with both. The
times of all rows are measured at the end, in alternation on the same images, so that machine noise affects all rows
equally. The rows are part of the checkpoint.
"""

import itertools
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.low_rank import plain
from spar_lightning.callbacks.run_loggers import log_table
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError, check_at_least, nearest
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.confusion import ConfusionMatrix, Result
from spar_lightning.evaluation.evaluator import count
from spar_lightning.evaluation.protocol import differences, upgraded
from spar_lightning.evaluation.timing import timed
from spar_lightning.files.atomic import naming
from spar_lightning.formatting import markdown
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter

log = logging.getLogger("spar_lightning")

Baseline = Literal["full", "windowed", "tiling"]
Stage = Literal[Baseline, "before", "teacher", "after"]

TITLES: dict[Stage, str] = {
    "full": "single pass with full attention, before",
    "before": "single pass, before",
    "windowed": "single pass with windowed attention, before",
    "tiling": "sliding window, stride = window (tiling)",
    "teacher": "sliding window (teacher)",
    "after": "single pass, after (SPAR)",
}


TIMED_IMAGES: Final = 10  # images of the last benchmark that are used to measure milliseconds per image


class Row(TypedDict):
    """Results of one network and inference mode.

    `miou` (percent) and `images` (number of images) are by benchmark. `ms` is the time per image of the last benchmark
    in milliseconds, None until the end of training.
    """

    stage: Stage
    miou: dict[str, float]
    images: dict[str, int]
    ms: float | None


class MeanIoU(Callback):
    """Callback that measures mIoU on the validation sets.

    trainer.check_val_every_n_epoch and trainer.val_check_interval set when it is measured during training. A teacher
    with a single pass has no row of its own: its row is `before`, or `full` if model.attention is windowed. A baseline
    that equals the row `before` is not repeated.

    Args:
        before: Measure single-pass inference before the first training step.
        teacher: Measure the sliding-window teacher before the first training step; expensive for large images.
        baselines: What else to measure before the first training step: `full` or `windowed` (a single pass with this
            attention), `tiling` (a sliding window without overlap, stride = window).
        at_end: Measure single-pass inference at the end of training, as the last row of the printed table.
        benchmarks: Names of the benchmarks in data.benchmarks to measure; null measures all.
        max_images: Number of images per benchmark, spread evenly over it; null uses all.

    Attributes:
        rows: Results measured outside the Trainer's validation.
        results: Results of the Trainer's last validation, by benchmark.
    """

    def __init__(
        self,
        before: bool = True,
        teacher: bool = True,
        baselines: Sequence[Baseline] = (),
        at_end: bool = True,
        benchmarks: Sequence[str] | None = None,
        max_images: int | None = None,
    ) -> None:
        check_at_least(1, **{"mean_iou.max_images": max_images})
        self.before = before
        self.teacher = teacher
        self.baselines = baselines
        self.at_end = at_end
        self.benchmarks = benchmarks
        self.max_images = max_images
        self.rows: list[Row] = []
        self.results: dict[str, Result] = {}
        self._counts: list[ConfusionMatrix] = []
        self._validated = -1  # global step of the last validation
        self._protocol: dict[str, Any] = {}
        self._fitting = False

    def check(self, data: SA1B) -> None:
        """Raise UserError if one of `benchmarks` is not a benchmark of the data module."""
        names = [benchmark.name for benchmark in data.benchmarks]
        for name in self.benchmarks or []:
            if name not in names:
                raise UserError(
                    f"mean_iou.benchmarks: {name!r} is not in data.benchmarks. {nearest(name, names)}Allowed: "
                    f"{', '.join(names) or 'none'}."
                )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Select the benchmarks and their images, and record the protocol."""
        data = _data(trainer)
        assert isinstance(pl_module, Distillation)
        # Rows are results of both modes, so the protocol contains the stride and the attention.
        protocol = pl_module.protocol(str(trainer.precision))
        both = [replace(protocol, config=replace(pl_module.config, inference=mode)) for mode in ("single", "sliding")]
        self._protocol = {**both[0].content(), **both[1].content()}
        if stage == "fit" and "windowed" in self.baselines and not pl_module.student.windowable:
            log.warning(
                "mean_iou.baselines: windowed is left out, because %s does not support windowed attention.",
                type(pl_module.student).__name__,
            )
            self.baselines = [baseline for baseline in self.baselines if baseline != "windowed"]
        self._fitting = stage == "fit"
        if self.benchmarks is not None:
            data.benchmarks = [benchmark for benchmark in data.benchmarks if benchmark.name in self.benchmarks]
        for benchmark in data.benchmarks:
            benchmark.keep(self.max_images)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the rows before training, unless the run is resumed."""
        if trainer.global_step:
            return
        assert isinstance(pl_module, Distillation)
        same = "windowed" if pl_module.config.windowed else "full"  # as the row `before`
        wanted = {"before": self.before, "teacher": self.teacher and pl_module.teacher == "sliding"}
        for stage in TITLES:
            if wanted.get(stage, stage in self.baselines and not (stage == same and self.before)):
                self._measure(trainer, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create an empty confusion matrix for each benchmark."""
        benchmarks = _data(trainer).benchmarks
        self._counts = [ConfusionMatrix(len(benchmark.classes), pl_module.device) for benchmark in benchmarks]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Add the predictions of a batch to the confusion matrix."""
        for predicted, image in zip(outputs["labels"], batch, strict=True):  # one image, from this rank's slice
            index = trainer.global_rank + trainer.world_size * batch_idx
            self._counts[dataloader_idx].update(predicted, image.labels, index)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the confusion matrices over all ranks and log the mIoU."""
        counts = zip(_data(trainer).benchmarks, self._counts, strict=True)
        self.results = {benchmark.name: benchmark.results(mine.all_ranks()) for benchmark, mine in counts}
        self._validated = trainer.global_step
        pl_module.log_dict(named(self.results))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last row and the times of all rows, then print and write the results."""
        pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU by now
        if self.at_end:
            assert isinstance(pl_module, Distillation)
            if self._validated == trainer.global_step and pl_module.config.inference == "single":
                self._add("after", self.results)  # the Trainer's last validation
            else:
                self._measure(trainer, "after")
        self._time(trainer)
        self._write(trainer)

    def _measure(self, trainer: Trainer, stage: Stage) -> None:
        """Measure all benchmarks outside the Trainer's loop and add the row."""
        data = _data(trainer)
        device, precision = trainer.strategy.root_device, trainer.precision_plugin.forward_context
        results = {}
        for benchmark, loader in zip(data.benchmarks, data.val_dataloader(), strict=True):
            limit = _limit(trainer.limit_val_batches, len(loader))
            if not limit:
                continue
            counts = ConfusionMatrix(len(benchmark.classes), device)
            images = (image for batch in islice(loader, limit) for image in batch)
            indices = itertools.count(trainer.global_rank, trainer.world_size)
            steps = count(_segmenter(trainer, stage, benchmark), images, indices, counts, device, precision)
            title = f"{TITLES[stage]}: {benchmark.name}"
            for _ in tqdm(steps, title, limit, leave=False, unit="image", disable=not trainer.is_global_zero):
                pass
            results[benchmark.name] = benchmark.results(counts.all_ranks())
        self._add(stage, results)
        if stage != "after":  # the student's own curve comes from validation
            for logger in trainer.loggers if results else ():
                logger.log_metrics({f"{stage}/{k}": v for k, v in named(results).items()}, trainer.global_step)

    def _add(self, stage: Stage, results: Mapping[str, Result]) -> None:
        if results:
            miou, images = {k: r.miou for k, r in results.items()}, {k: r.images for k, r in results.items()}
            self.rows.append({"stage": stage, "miou": miou, "images": images, "ms": None})

    @rank_zero_only
    @torch.no_grad()
    def _time(self, trainer: Trainer) -> None:
        """Measure milliseconds per image of all rows, in alternation on the first images of the last benchmark."""
        if not self.rows:
            return
        last, images = list(self.rows[-1]["images"].items())[-1]
        benchmark = next(benchmark for benchmark in _data(trainer).benchmarks if benchmark.name == last)
        device = trainer.strategy.root_device
        module = trainer.lightning_module
        assert isinstance(module, Distillation)
        stages = [row["stage"] for row in self.rows]
        networks = {"after": plain(module.student)} if "after" in stages else {}
        start = module.teacher_backbone() if stages != ["after"] else None  # one copy for all rows before training
        segmenters = [_segmenter(trainer, stage, benchmark, networks.get(stage, start)) for stage in stages]
        times: list[list[float]] = [[] for _ in self.rows]
        for i in range(min(TIMED_IMAGES, images)):
            pixels = benchmark[i].image.to(device)
            for segmenter, milliseconds in zip(segmenters, times, strict=True):
                with trainer.precision_plugin.forward_context():
                    milliseconds.append(timed(partial(segmenter, pixels), device)[1])
        for row, milliseconds in zip(self.rows, times, strict=True):
            row["ms"] = statistics.median(milliseconds)

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        """Print and log the table, and write its numbers to the run folder."""
        if self.rows:
            path = Path(trainer.default_root_dir) / "results.json"
            with naming(path):
                path.write_text(json.dumps(self.rows, indent=2, allow_nan=False) + "\n")
            print(f"\n{table(self.rows)}\n")
            log.info("results\n%s", table(self.rows))
            names = list(dict.fromkeys(name for row in self.rows for name in row["miou"]))
            columns = ["stage", *(f"mIoU/{name}" for name in names), "ms"]
            rows = [[row["stage"], *map(row["miou"].get, names), row["ms"]] for row in self.rows]
            log_table(trainer.loggers, "results", columns, rows, trainer.global_step)

    def numbers(self, benchmark: str) -> dict[Stage, str]:
        """Return mIoU and milliseconds per image on a benchmark as text, for each row that was measured on it."""
        return {
            row["stage"]: f"mIoU {row['miou'][benchmark]:.1f}" + (f", {row['ms']:.0f} ms" if row["ms"] else "")
            for row in self.rows
            if benchmark in row["miou"]
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the rows and the protocol with which they were measured."""
        return {"rows": self.rows, "protocol": self._protocol}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows, unless they were measured with another protocol."""
        self.rows = [row for row in state_dict["rows"] if row["stage"] != "after"]
        other = differences(upgraded(state_dict.get("protocol", self._protocol)), self._protocol)
        if self._fitting and other:
            log.warning(
                "The mIoU before training is omitted from the table: it was measured with other settings (%s). "
                "Measure it with `spar validate`, or start a new run with another --run_dir.",
                "; ".join(other),
            )
            self.rows = []


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table: a line per row, mIoU per benchmark, milliseconds per image of the last benchmark."""
    names = list(dict.fromkeys(name for row in rows for name in row["miou"]))
    head = ["inference", *(f"mIoU {name}" for name in names), f"ms per image ({names[-1]})"]
    body = [
        [
            TITLES[row["stage"]],
            *(f"{row['miou'][n]:.1f}" if n in row["miou"] else "-" for n in names),
            "-" if row["ms"] is None else f"{row['ms']:.1f}",
        ]
        for row in rows
    ]
    counted = ", ".join(f"{count} images of {name}" for name, count in rows[-1]["images"].items())
    note = f"mIoU in percent over {counted}; ms: median of up to {TIMED_IMAGES} images, rows timed in alternation"
    return f"{markdown([head, *body])}\n\n{note}"


def named(results: Mapping[str, Result]) -> dict[str, float]:
    """Return the metrics by name: mIoU of each benchmark, and their unweighted mean."""
    values = {f"mIoU/{name}": result.miou for name, result in results.items()}
    return {**values, "mIoU/mean": statistics.fmean(values.values())} if values else {}


def _segmenter(trainer: Trainer, stage: Stage, benchmark: Benchmark, network: Backbone | None = None) -> Segmenter:
    """Return the segmenter of a row, by default with the student or a copy of the network as it was before training."""
    module = trainer.lightning_module
    assert isinstance(module, Distillation)
    # Before the first step the student is still that network; a copy would cost memory.
    start = stage in ("teacher", "tiling") or trainer.global_step > 0
    if network is None and stage != "after" and start:
        network = module.teacher_backbone()
    return module.segmenter(benchmark.description, inference_of(module, stage), network)


def inference_of(module: Distillation, stage: Stage) -> InferenceConfig:
    """Return the inference settings of a row."""
    match stage:
        case "teacher":
            return replace(module.config, inference="sliding")
        case "tiling":
            return replace(module.config, inference="sliding", stride=module.student.window)
        case "full":
            return replace(module.config, inference="single", attention="full")
        case "windowed":
            return replace(module.config, inference="single", attention=module.config.windowed or "windowed")
        case _:
            return replace(module.config, inference="single")


def _data(trainer: Trainer) -> SA1B:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, SA1B)
    return datamodule


def _limit(limit: int | float | None, batches: int) -> int:
    """Convert the Trainer's limit_val_batches to a number of batches."""
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)
