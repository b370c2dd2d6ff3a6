"""What a sweep leaves: sweep.json, a table, and the paper's Figures 1 and 3 as PNG and SVG."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from spar_lightning.datamodules.durable import replace
from spar_lightning.errors import UserError
from spar_lightning.evaluation.figures import draw_areas, draw_strides
from spar_lightning.evaluation.timing import Timing
from spar_lightning.markdown import markdown

Figure = Literal["strides", "areas"]

TITLES: dict[Figure, str] = {
    "strides": "mIoU and time by stride (Figure 1 of the paper)",
    "areas": "mIoU and time by the area of the image (Figure 3 of the paper)",
}


class SweepReport:
    """Points of one or two figures, in a folder.

    Args:
        folder: Where they lie.
        environment: Versions and hardware.
    """

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.folder = folder
        self.environment = environment
        self.path = folder / "sweep.json"
        self._earlier = {row["key"]: row for row in read(folder)["points"]} if self.path.exists() else {}
        self.points: list[dict[str, Any]] = []

    def timings(self, key: str) -> dict[str, Any] | None:
        """Those of a point that an earlier start has measured, by benchmark."""
        return self._earlier[key]["timings"] if key in self._earlier else None

    def add(self, figure: Figure, point: dict[str, Any], miou: dict[str, float], timings: dict[str, Any]) -> None:
        """Write a point: `key`, `curve`, `stride` and `area`, with mIoU and time by benchmark."""
        row = {"figure": figure, **point, "mIoU": miou, "timings": timings, "mean": statistics.fmean(miou.values())}
        self.points.append({**row, "ms": statistics.fmean(timing["ms"] for timing in timings.values())})
        self._earlier.pop(point["key"], None)
        unfinished = self.folder / "tmp"
        unfinished.mkdir(parents=True, exist_ok=True)
        # Points of an earlier start that this one has not come to stay: a stopped sweep loses no time.
        content = {"environment": self.environment, "points": [*self.points, *self._earlier.values()]}
        replace(self.path, f"{json.dumps(content, indent=2)}\n".encode(), unfinished)

    def finish(self) -> str:
        """Write the table and draw the figures; returns the table."""
        self._earlier = {}
        text = tables(self.points)
        (self.folder / "table.md").write_text(f"{text}\n")
        draw([self.folder], self.folder)
        return text


def plain(timing: Timing) -> dict[str, Any]:
    """A timing as it is written."""
    return {**asdict(timing), "quartiles": list(timing.quartiles), "size": list(timing.size)}


def read(folder: Path) -> dict[str, Any]:
    """The content of sweep.json in a folder.

    Raises:
        UserError: There is none, or it was not written by a sweep.
    """
    path = folder / "sweep.json"
    try:
        content = json.loads(path.read_text())
        assert {"environment", "points"} <= content.keys()
    except (OSError, ValueError, AssertionError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as a sweep ({error or 'it lacks points'}). Give folders of spar evaluate --strides "
            "or --sweep."
        ) from error
    return dict(content)


def draw(folders: Sequence[Path], out: Path) -> list[Path]:
    """Draw the figures of one or several sweeps into a folder, and say which files they are.

    Raises:
        UserError: A folder holds no sweep.
    """
    points: dict[Figure, list[dict[str, Any]]] = {"strides": [], "areas": []}
    devices = set()
    sweeps = [(folder, read(folder)) for folder in folders]
    curves = [{row["curve"] for row in sweep["points"]} for _, sweep in sweeps]
    for i, (folder, sweep) in enumerate(sweeps):
        others = set().union(*curves[:i], *curves[i + 1 :])
        devices.add(sweep["environment"]["device"])
        for row in sweep["points"]:
            own = f"{folder.name}: {row['curve']}" if row["curve"] in others else row["curve"]
            points[row["figure"]].append({**row, "curve": own})
    out.mkdir(parents=True, exist_ok=True)
    files = []
    if points["strides"]:
        files += draw_strides(points["strides"], ", ".join(sorted(devices)), out / "strides")
    if points["areas"]:
        files += draw_areas(points["areas"], ", ".join(sorted(devices)), out / "areas")
    return files


def tables(points: Sequence[dict[str, Any]]) -> str:
    """A table per figure."""
    return "\n\n".join(
        f"{title}\n\n{_table(rows)}"
        for figure, title in TITLES.items()
        if (rows := [row for row in points if row["figure"] == figure])
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["mIoU"])
    means = [f"mean of {len(names)}"] if len(names) > 1 else []
    head = ["network, inference", "stride", "area", *names, *means, "ms", "quartiles", "image", "patches", "windows"]
    lines = [[*head, "peak MiB"]]
    for row in rows:
        for i, name in enumerate(names):
            timing = row["timings"][name]
            first = [row["curve"], row["stride"] or "-", f"{row['area']}²" if row["area"] else "-"]
            scores = [f"{row['mIoU'][n]:.2f}" for n in names] + ([f"{row['mean']:.2f}"] if means else [])
            lines.append(
                [
                    *([str(cell) for cell in [*first, *scores]] if i == 0 else [""] * (3 + len(scores))),
                    f"{timing['ms']:.1f}",
                    " to ".join(f"{ms:.1f}" for ms in timing["quartiles"]),
                    " x ".join(map(str, timing["size"])) + (f" ({name})" if len(names) > 1 else ""),
                    str(timing["patches"]),
                    str(timing["windows"]),
                    "-" if timing["memory"] is None else f"{timing['memory']:.0f}",
                ]
            )
    return markdown(lines)
