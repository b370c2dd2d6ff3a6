"""Figures 1 and 3 of the paper from the points of sweeps, as PNG for the screen and SVG for print.

Curves differ in marker and line style as well as in color, to be distinguishable in black-and-white print.
"""

from collections.abc import Iterator, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any

MARKERS = "osD^vPX*"
STYLES = ("-", "--", "-.", ":")


def draw_strides(points: Sequence[dict[str, Any]], score: str, time: str, stem: Path) -> list[Path]:
    """Draw mIoU over the network's time per image.

    Sliding windows are curves, labeled with their strides; a stride equal to the window is tiling. Single passes are
    points.

    Args:
        points: Points of the sweep.
        score: Label of the mIoU axis.
        time: Label of the time axis.
        stem: Path of the files without suffix.

    Returns:
        Paths of the PNG and the SVG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for look, (curve, rows) in zip(_looks(), _curves(points), strict=False):
        rows = sorted(rows, key=lambda row: row["ms"])
        sliding = rows[0]["stride"] is not None
        size = {} if sliding else {"markersize": 10, "linestyle": "none"}
        axes.errorbar(
            [row["ms"] for row in rows],
            [row["mean"] for row in rows],
            xerr=list(zip(*(_spread(row) for row in rows), strict=True)),
            label=_printable(curve), elinewidth=1, **{**look, **size},
        )  # fmt: skip
        for row in rows if sliding else ():
            tiling = row["stride"] == row["window"]
            text, offset, side = ("tiling", (-6, -16), "left") if tiling else (str(row["stride"]), (0, 7), "center")
            axes.annotate(text, (row["ms"], row["mean"]), offset, textcoords="offset points", ha=side)
    _time(axes.xaxis, axes.set_xscale, time)
    axes.set_ylabel(_printable(score))
    axes.margins(y=0.15)
    if any(row["stride"] is not None for row in points):
        axes.set_title("numbers: stride of the sliding window in pixels (tiling: stride = window)", fontsize=10)
    return _save(figure, axes, stem)


def draw_areas(points: Sequence[dict[str, Any]], score: str, time: str, stem: Path) -> list[Path]:
    """Draw mIoU and the network's time per image over the side of a square of the image's area, in pixels.

    The arguments and the result are the same as in `draw_strides`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for look, (curve, rows) in zip(_looks(), _curves(points), strict=False):
        rows = sorted(rows, key=lambda row: row["area"])
        areas = [row["area"] for row in rows]
        left.plot(areas, [row["mean"] for row in rows], label=_printable(curve), **look)
        spread = list(zip(*(_spread(row) for row in rows), strict=True))
        right.errorbar(areas, [row["ms"] for row in rows], yerr=spread, elinewidth=1, label=_printable(curve), **look)
    windows = sorted({row["window"] for row in points})
    for axes in (left, right):
        axes.set_xlabel("side of a square of the image's area (pixels)")
        axes.set_xticks(sorted({row["area"] for row in points}), minor=False)
        axes.tick_params(axis="x", labelrotation=45)
        for window in windows:
            axes.axvline(window, color="0.6", linewidth=1, linestyle=":")
            axes.text(window, 0.01, " window", color="0.4", size=9, transform=axes.get_xaxis_transform(), clip_on=True)
    left.set_ylabel(_printable(score))
    _time(right.yaxis, right.set_yscale, time)
    return _save(figure, left, stem)


def _curves(points: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(curve, [row for row in points if row["curve"] == curve]) for curve in {row["curve"]: 0 for row in points}]


def _looks() -> Iterator[dict[str, Any]]:
    """Yield color, marker and line style for each curve."""
    for i, marker, style in zip(count(), cycle(MARKERS), cycle(STYLES), strict=False):
        yield {"color": f"C{i % 10}", "marker": marker, "linestyle": style, "markersize": 6}


def _spread(row: dict[str, Any]) -> tuple[float, float]:
    """Return the distances from the median to both quartiles, averaged over benchmarks, for error bars."""
    timings = row["timings"].values()
    sides = [sum(abs(timing["quartiles"][i] - timing["ms"]) for timing in timings) / len(timings) for i in (0, 1)]
    return sides[0], sides[1]


def _printable(text: str) -> str:
    """Return a text without bytes that are not UTF-8, which matplotlib rejects."""
    return text.encode(errors="replace").decode()


def _time(axis: Any, set_scale: Any, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    set_scale("log")
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(label)


def _save(figure: Any, axes: Any, stem: Path) -> list[Path]:
    for each in figure.axes:
        each.grid(True, which="both", color="0.9", linewidth=0.6)
        each.set_axisbelow(True)
    # The legend is below the axes, so that it does not hide points. Long names need a single column.
    handles, names = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, names)) > 40 else 2
    figure.legend(handles, names, fontsize=9, loc="outside lower center", ncols=columns, frameon=False)
    files = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=200)
    return files
