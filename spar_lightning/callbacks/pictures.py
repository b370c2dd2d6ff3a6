"""Pictures of a finished run: predictions side by side, and loss and mIoU over steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from spar_lightning.callbacks.jsonl import read_metrics
from spar_lightning.callbacks.mean_iou import TITLES
from spar_lightning.datamodules.benchmark import Benchmark
from spar_lightning.datamodules.sample import IGNORED
from spar_lightning.distillation import Distillation
from spar_lightning.pictures.palette import palette
from spar_lightning.pyplot import pyplot


class Pictures(Callback):
    """Draw plots/predictions.png and plots/curves.png when training ends.

    Args:
        images: How many images of the last benchmark are shown.
    """

    def __init__(self, images: int = 6) -> None:
        self.images = images

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "plots"
        folder.mkdir(exist_ok=True)
        metrics = Path(trainer.default_root_dir) / "metrics.jsonl"
        if metrics.exists():
            draw_curves(metrics, folder / "curves.png")
        assert isinstance(pl_module, Distillation)
        benchmarks: list[Benchmark] = trainer.datamodule.benchmarks  # type: ignore[attr-defined]
        if benchmarks and self.images:
            self._draw_predictions(pl_module, benchmarks[-1], folder / "predictions.png")

    def _draw_predictions(self, module: Distillation, benchmark: Benchmark, path: Path) -> None:
        backbone = module.teacher_backbone()
        teacher = module.segmenter(benchmark.description, "sliding", backbone)
        before = module.segmenter(benchmark.description, "single", backbone)
        after = module.segmenter(benchmark.description, "single")
        rows = []
        for i in np.linspace(0, len(benchmark) - 1, min(self.images, len(benchmark))).astype(int).tolist():
            image = benchmark[i]
            maps = [segment(image.image.to(module.device)).cpu().numpy() for segment in (before, teacher, after)]
            rows.append((image.image.permute(1, 2, 0).numpy(), image.labels.numpy(), *maps))
        draw_predictions(rows, ["image", "truth", *TITLES.values()], list(benchmark.classes), path)


def draw_predictions(
    rows: Sequence[tuple[NDArray[Any], ...]], titles: Sequence[str], classes: Sequence[str], path: Path
) -> None:
    """One row per image: the image (H, W, 3), then label maps (H, W), with a legend of the classes."""
    plt = pyplot()
    from matplotlib.patches import Patch

    colours = palette(len(classes))
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2.4 * len(titles), 2.4 * len(rows) + 0.9), squeeze=False
    )
    for row, cells in zip(rows, axes, strict=True):
        for i, (content, cell) in enumerate(zip(row, cells, strict=True)):
            labels = np.where(content == IGNORED, len(classes), content) if i else content
            cell.imshow(colours[labels] if i else content, interpolation="nearest")
            cell.set_axis_off()
    for title, cell in zip(titles, axes[0], strict=True):
        cell.set_title(title, fontsize=9)
    patches = [Patch(color=colours[i] / 255, label=name) for i, name in enumerate(classes[:40])]
    figure.legend(handles=patches, loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.9 / (2.4 * len(rows) + 0.9), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(metrics: Path, path: Path) -> None:
    """Loss and mIoU over steps, with the start and the teacher as lines to compare with."""
    plt = pyplot()
    values = read_metrics(metrics)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    loss = values.get("loss", {})
    left.plot(list(loss), list(loss.values()), linewidth=0.8, alpha=0.35, color="C0", label="one step")
    steps, smooth = _running_mean(loss)
    left.plot(steps, smooth, color="C0", label="running mean")
    left.set(xlabel="step", ylabel="loss", title="distance to the teacher", yscale="log")
    left.legend()
    names = [name for name in values if name.startswith("mIoU/") and name != "mIoU/mean"]
    for colour, name in enumerate([*names, "mIoU/mean"] if len(names) > 1 else names):
        _draw_miou(right, values, name, "black" if name == "mIoU/mean" else f"C{colour}")
    right.set(xlabel="step", ylabel="mIoU (%)", title="segmentation: student, its start (dotted), teacher (dashed)")
    if names:
        right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_miou(axes: Any, values: dict[str, dict[int, float]], name: str, colour: str) -> None:
    """One benchmark over steps, with lines where the student started and where the teacher is."""
    curve = {**values.get(f"before/{name}", {}), **values[name]}
    label, last = name.removeprefix("mIoU/"), list(curve.values())[-1]
    for stage, style in (("before", ":"), ("teacher", "--")):
        for value in values.get(f"{stage}/{name}", {}).values():
            axes.plot([min(curve), max(curve)], [value] * 2, style, color=colour, alpha=0.7)
            label += f", {last - value:+.1f} to {'start' if stage == 'before' else 'teacher'}"
    axes.plot(list(curve), list(curve.values()), "o-", color=colour, label=label)


def _running_mean(curve: dict[int, float], width: int = 20) -> tuple[list[int], list[float]]:
    steps, values = list(curve), np.array(list(curve.values()))
    width = min(width, len(values)) or 1
    return steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid").tolist() if steps else []
