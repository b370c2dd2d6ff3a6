"""Plots of a run: predictions side by side, and loss and mIoU over steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.visualization.palette import palette


def draw_predictions(
    rows: Sequence[tuple[NDArray[Any], ...]], titles: Sequence[str], classes: Sequence[str], path: Path
) -> None:
    """Draw images and their segmentation maps in a grid, with a legend of the classes.

    Args:
        rows: Image (H, W, 3) and segmentation maps (H, W), one tuple per image.
        titles: Titles of the columns; may have several lines.
        classes: Name of each class.
        path: Image file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = palette(len(classes))
    figure = Figure(figsize=(2.4 * len(titles), 2.4 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, cells in zip(rows, axes, strict=True):
        for i, (content, cell) in enumerate(zip(row, cells, strict=True)):
            labels = np.where(content == IGNORED, len(classes), content) if i else content
            cell.imshow(colours[labels] if i else content, interpolation="nearest")
            cell.set_axis_off()
    for title, cell in zip(titles, axes[0], strict=True):
        cell.set_title(title, fontsize=9)
    patches = [Patch(color=colours[i] / 255, label=name) for i, name in enumerate(classes[:40])]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.08)


def draw_curves(values: dict[str, dict[int, float]], path: Path) -> None:
    """Draw loss and mIoU over steps, with lines for the student's start and the teacher.

    Args:
        values: Values by metric name and step; NaN and infinite values are left out.
        path: Image file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = (part.subplots() for part in figure.subfigures(1, 2, squeeze=False)[0])
    finite = ((name, {step: v for step, v in curve.items() if math.isfinite(v)}) for name, curve in values.items())
    values = {name: curve for name, curve in finite if curve}
    loss = values.get("loss", {})
    left.plot(list(loss), list(loss.values()), linewidth=0.8, alpha=0.35, color="C0", label="single step")
    steps, smooth = _running_mean(loss)
    left.plot(steps, smooth, color="C0", label="running mean")
    left.set(xlabel="step", ylabel="loss", title="training", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    names = [name for name in values if name.startswith("mIoU/") and name != "mIoU/mean"]
    for colour, name in enumerate([*names, "mIoU/mean"] if len(names) > 1 else names):
        _draw_miou(right, values, name, "black" if name == "mIoU/mean" else f"C{colour}")
    right.set(xlabel="step", ylabel="mIoU (%)", title="validation (dotted: before training, dashed: teacher)")
    right.title.set_fontsize(11)
    for axes in (left, right):  # below the axes, where a legend hides no curve
        if axes.get_legend_handles_labels()[0]:
            axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _draw_miou(axes: Any, values: dict[str, dict[int, float]], name: str, colour: str) -> None:
    """Draw one benchmark over steps, with lines for the student's start and the teacher."""
    curve = {**values.get(f"before/{name}", {}), **values[name]}
    label, last = name.removeprefix("mIoU/"), list(curve.values())[-1]
    for stage, style in (("before", ":"), ("teacher", "--")):
        for value in values.get(f"{stage}/{name}", {}).values():
            axes.plot([min(curve), max(curve)], [value] * 2, style, color=colour, alpha=0.7)
            label += f", {last - value:+.1f} vs. {'start' if stage == 'before' else 'teacher'}"
    axes.plot(list(curve), list(curve.values()), "o-", color=colour, label=label)


def _running_mean(curve: dict[int, float], width: int = 20) -> tuple[list[int], list[float]]:
    steps, values = list(curve), np.array(list(curve.values()))
    width = min(width, len(values)) or 1
    return steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid").tolist() if steps else []
