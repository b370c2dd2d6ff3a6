"""RunPlots: callback that plots a finished run: predictions side by side, and loss and mIoU over steps."""

from pathlib import Path
from typing import Final

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from spar_lightning.callbacks.jsonl_logger import read_metrics
from spar_lightning.callbacks.mean_iou import TITLES, MeanIoU, Stage, inference_of
from spar_lightning.callbacks.run_loggers import log_picture
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.files.atomic import naming
from spar_lightning.visualization.run_plots import draw_curves, draw_predictions

PANELS: Final[tuple[Stage, ...]] = ("before", "teacher", "after")


class RunPlots(Callback):
    """Callback that writes plots/predictions.png and plots/curves.png at the end of training, and logs them.

    Args:
        images: Number of images of the last benchmark in predictions.png; 0 writes only curves.png.
    """

    def __init__(self, images: int = 6) -> None:
        self.images = images

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the plots."""
        folder = Path(trainer.default_root_dir) / "plots"
        folder.mkdir(exist_ok=True)
        metrics = Path(trainer.default_root_dir) / "metrics.jsonl"
        if metrics.exists():
            with naming(folder / "curves.png"):
                draw_curves(read_metrics(metrics), folder / "curves.png")
            log_picture(trainer.loggers, folder / "curves.png", trainer.global_step)
        assert isinstance(pl_module, Distillation)
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
        assert isinstance(data, SA1B)
        benchmarks = data.benchmarks
        if benchmarks and self.images:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            measured = next((c.numbers(benchmarks[-1].name) for c in callbacks if isinstance(c, MeanIoU)), {})
            stages = [stage for stage in PANELS if stage != "teacher" or pl_module.teacher == "sliding"]
            titles = [f"{TITLES[stage]}\n{measured.get(stage, '')}" for stage in stages]
            self._draw_predictions(pl_module, benchmarks[-1], stages, titles, folder / "predictions.png")
            log_picture(trainer.loggers, folder / "predictions.png", trainer.global_step)

    def _draw_predictions(
        self, module: Distillation, benchmark: Benchmark, stages: list[Stage], titles: list[str], path: Path
    ) -> None:
        start = module.teacher_backbone()
        segmenters = [
            module.segmenter(benchmark.description, inference_of(module, stage), None if stage == "after" else start)
            for stage in stages
        ]
        rows = []
        for i in np.linspace(0, len(benchmark) - 1, min(self.images, len(benchmark))).astype(int).tolist():
            image = benchmark[i]
            maps = [segment(image.image.to(module.device)).cpu().numpy() for segment in segmenters]
            rows.append((image.image.permute(1, 2, 0).numpy(), image.labels.numpy(), *maps))
        with naming(path):
            draw_predictions(rows, ["image", "ground truth", *titles], list(benchmark.classes), path)
