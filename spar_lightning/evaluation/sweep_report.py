"""What a sweep leaves: sweep.json, a table, and the paper's Figures 1 and 3 as PNG and SVG."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from spar_lightning.datamodules.durable import replace
from spar_lightning.errors import UserError
from spar_lightning.evaluation.figures import draw_areas, draw_strides
from spar_lightning.evaluation.protocol import differences
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
        network: The network as it is configured, as plain data.
        environment: Versions and hardware.

    Raises:
        UserError: The folder holds a sweep of another network, or something else by this name.
    """

    def __init__(self, folder: Path, network: dict[str, Any], environment: dict[str, Any]) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {"network": network, "environment": environment, "points": []}
        if (folder / "sweep.json").exists():
            try:
                earlier = read(folder)
            except UserError as error:
                raise UserError(f"{error} Or give another --out than {folder}.") from error
            if other := differences(earlier["network"], network):
                raise UserError(f"{folder} holds a sweep of another network: {'; '.join(other)}. Give another --out.")

    def add(self, point: dict[str, Any]) -> None:
        """Write a point: its figure, curve, stride or area, and mIoU and timing by benchmark."""
        row = {**point, "mean": statistics.fmean(point["mIoU"].values())}
        self.content["points"].append({**row, "ms": statistics.fmean(t["ms"] for t in point["timings"].values())})
        unfinished = self.folder / "tmp"
        unfinished.mkdir(parents=True, exist_ok=True)
        replace(self.folder / "sweep.json", f"{json.dumps(self.content, indent=2)}\n".encode(), unfinished)

    def finish(self) -> str:
        """Write the table and draw the figures; returns the table."""
        text = tables(self.content["points"])
        (self.folder / "table.md").write_text(f"{text}\n")
        draw([self.folder], self.folder)
        return text


def read(folder: Path) -> dict[str, Any]:
    """The content of sweep.json in a folder.

    Raises:
        UserError: There is none, or it was not written by a sweep.
    """
    path = folder / "sweep.json"
    advice = "Give folders of spar evaluate --strides or --sweep."
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a sweep ({error}). {advice}") from error
    if not isinstance(content, dict) or not {"network", "environment", "points"} <= content.keys():
        raise UserError(f"{path} was not written by a sweep. {advice}")
    return content


def draw(folders: Sequence[Path], out: Path) -> list[Path]:
    """Draw the figures of one or several sweeps into a folder, and say which files they are.

    Raises:
        UserError: A folder holds no sweep, or one on other benchmarks than the first.
    """
    sweeps = {folder.resolve(): read(folder) for folder in folders}
    names = _names(list(sweeps))
    points: list[dict[str, Any]] = []
    for folder, sweep in sweeps.items():
        others = {row["curve"] for other in sweeps if other != folder for row in sweeps[other]["points"]}
        for row in sweep["points"]:
            curve = f"{names[folder]}: {row['curve']}" if row["curve"] in others else row["curve"]
            points.append({**row, "curve": curve, "arithmetic": _arithmetic(sweep, row)})
    first = list(points[0]["mIoU"]) if points else []
    for row in points:
        if list(row["mIoU"]) != first:
            raise UserError(
                f"Sweeps on different benchmarks cannot share a figure: one is on {', '.join(first)}, another on "
                f"{', '.join(row['mIoU'])}. Give sweeps on the same."
            )
    kinds = {row["arithmetic"] for row in points}
    if len(kinds) > 1:  # times of different devices and precisions: every curve says its own
        points = [{**row, "curve": f"{row['curve']} ({row['arithmetic']})"} for row in points]
    unit = f"ms, {kinds.pop()}" if len(kinds) == 1 else "ms"
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for figure, drawn in (("strides", draw_strides), ("areas", draw_areas)):
        if rows := [row for row in points if row["figure"] == figure]:
            files += drawn(rows, unit, out / figure)
    return files


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The last parts of paths, as many as tell them apart."""
    for count in range(1, max(len(folder.parts) for folder in folders)):
        names = {folder: "/".join(folder.parts[-count:]) for folder in folders}
        if len(set(names.values())) == len(folders):
            return names
    return {folder: str(folder) for folder in folders}


def _arithmetic(sweep: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{sweep['environment']['device']}, {row['protocol']['precision']}"


def tables(points: Sequence[dict[str, Any]]) -> str:
    """A table per figure."""
    return "\n\n".join(
        f"{title}, {rows[0]['protocol']['precision']}\n\n{_table(rows)}"
        for figure, title in TITLES.items()
        if (rows := [row for row in points if row["figure"] == figure])
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["mIoU"])
    means = [f"mean of {len(names)}"] if len(names) > 1 else []
    head = ["network, inference", "stride", "area", *names, *means, "ms", "quartiles", "image", "patches", "windows"]
    lines = [[*head, "peak MiB"]]
    for row in rows:
        scores = [f"{row['mIoU'][name]:.2f}" for name in names] + ([f"{row['mean']:.2f}"] if means else [])
        first = [row["curve"], str(row["stride"] or "-"), f"{row['area']}²" if row["area"] else "-", *scores]
        for name in names:
            timing = row["timings"][name]
            cells = [f"{timing['ms']:.1f}", " to ".join(f"{ms:.1f}" for ms in timing["quartiles"])]
            size = " x ".join(map(str, timing["size"])) + (f" ({name})" if means else "")
            memory = "-" if timing["memory"] is None else f"{timing['memory']:.0f}"
            lines.append([*first, *cells, size, str(timing["patches"]), str(timing["windows"]), memory])
            first = [""] * len(first)
    return markdown(lines)
