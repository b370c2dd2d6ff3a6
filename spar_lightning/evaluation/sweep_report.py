"""Sweep report: sweep.json, a Markdown table, and Figures 1 and 3 of the paper as PNG and SVG."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from spar_lightning.errors import UserError
from spar_lightning.evaluation.protocol import differences, upgraded
from spar_lightning.evaluation.report import check_ours
from spar_lightning.files.atomic import replace, replace_json
from spar_lightning.formatting import markdown
from spar_lightning.visualization.sweep_figures import draw_areas, draw_strides

Figure = Literal["strides", "areas"]

TITLES: dict[Figure, str] = {
    "strides": "mIoU and time by stride (Figure 1 of the paper)",
    "areas": "mIoU and time by the area of the image (Figure 3 of the paper)",
}
FIGURES = tuple(f"{figure}.{suffix}" for figure in TITLES for suffix in ("png", "svg"))


class SweepReport:
    """Points of one or two figures, stored in a folder.

    Nothing is written before all points are measured.

    Args:
        folder: Result folder.
        identity: Plain data that all points share: `network`, `protocol` and `benchmarks`.
        environment: Versions and hardware.

    Raises:
        UserError: If the folder contains a different sweep, a sweep.json that is not a sweep, or figures of the user.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], environment: dict[str, Any]) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {**identity, "environment": environment, "points": []}
        if (folder / "sweep.json").exists():
            try:
                earlier = read(folder)
            except UserError as error:
                raise UserError(f"{error} Or set --out to a folder other than {folder}.") from error
            for part in identity:
                if other := differences(earlier[part], identity[part]):
                    raise UserError(f"{folder} contains a different sweep: {'; '.join(other)}. Set another --out.")
        else:
            check_ours(folder, "sweep.json", ("sweep.md", *FIGURES), "spar evaluate")

    def add(self, point: dict[str, Any]) -> None:
        """Add a point.

        Args:
            point: Figure, curve, stride or area, protocol and images, and the mIoU and timing of each benchmark.
        """
        row = {**point, "mean": statistics.fmean(point["mIoU"].values())}
        self.content["points"].append({**row, "ms": statistics.fmean(t["ms"] for t in point["timings"].values())})

    def finish(self) -> str:
        """Write the points, the table and the figures, and return the table."""
        unfinished = self.folder / "tmp"
        text = tables(self.content["points"])
        replace_json(self.folder / "sweep.json", self.content, unfinished)
        replace(self.folder / "sweep.md", f"{text}\n".encode(errors="surrogateescape"), unfinished)
        for name in FIGURES:  # figures of an earlier command may be outdated
            (self.folder / name).unlink(missing_ok=True)
        draw([self.folder], self.folder)
        return text


def read(folder: Path) -> dict[str, Any]:
    """Return the content of sweep.json in a folder.

    Raises:
        UserError: If the file cannot be read or was not written by a sweep.
    """
    path = folder / "sweep.json"
    advice = "Pass folders of spar evaluate --strides or --sweep."
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable sweep file ({error}). {advice}") from error
    keys = {"network", "protocol", "benchmarks", "environment", "points"}
    if not isinstance(content, dict) or not keys <= content.keys():
        raise UserError(f"{path} was not written by a sweep. {advice}")
    return {**content, "network": upgraded(content["network"]), "protocol": upgraded(content["protocol"])}


def draw(folders: Sequence[Path], out: Path) -> list[Path]:
    """Draw the figures of one or several sweeps into a folder, and return the paths of the files.

    Raises:
        UserError: If a folder does not contain a sweep, or if the sweeps have different images or classes.
    """
    sweeps = {folder.resolve(): read(folder) for folder in folders}
    names = tails(list(sweeps))
    points: list[dict[str, Any]] = []
    for folder, sweep in sweeps.items():
        others = {row["curve"] for other in sweeps if other != folder for row in sweeps[other]["points"]}
        for row in sweep["points"]:
            curve = f"{names[folder]}: {row['curve']}" if row["curve"] in others else row["curve"]
            arithmetic = f"{sweep['environment']['device']}, {row['protocol']['precision']}"
            points.append({**row, "curve": curve, "arithmetic": arithmetic, "refined": refined(row["protocol"])})
    for row in points:
        if row["images"] != points[0]["images"]:
            raise UserError(
                f"Sweeps on different benchmarks cannot share a figure: one is on {_benchmarks(points[0])}, another on "
                f"{_benchmarks(row)}. Pass sweeps on the same images and classes."
            )
    time = _shared(points, "arithmetic")
    score = _shared(points, "refined")
    benchmarks = list(points[0]["images"]) if points else []
    on = f" on {benchmarks[0]}" if len(benchmarks) == 1 else f", mean of {len(benchmarks)} benchmarks"
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for figure, drawn in (("strides", draw_strides), ("areas", draw_areas)):
        if rows := [row for row in points if row["figure"] == figure]:
            labels = f"mIoU{on} (%){score}", f"network's time per image (ms{time})"
            files += drawn(rows, *labels, out / figure)
    return files


def _shared(points: list[dict[str, Any]], key: str) -> str:
    """Return the value that all points share, for an axis label; if they differ, add each value to its curve name."""
    kinds = {row[key] for row in points}
    if len(kinds) == 1:
        return f", {text}" if (text := kinds.pop()) else ""
    for row in points:
        row["curve"] += f" ({row[key] or 'no refinement'})"
    return ""


def _benchmarks(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} ({facts['images']} images, {facts['images_sha256']})" for name, facts in row["images"].items()
    )


def refined(protocol: dict[str, Any]) -> str:
    """Return a short text with the refinement and the upsampler of a protocol; empty without them."""
    words = []
    if "refine" in protocol:
        words.append("LPOSS " + ", ".join(f"{k} {v:g}" for k, v in protocol["refine"].items() if k != "name"))
    if "upsampler" in protocol:
        words.append(protocol["upsampler"]["name"])
    return ", ".join(words)


def tails(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the last parts of each path, as many as are needed to make all of them different."""
    for count in range(1, max(len(path.parts) for path in paths)):
        names = {path: "/".join(path.parts[-count:]) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {path: str(path) for path in paths}


def tables(points: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown tables of the points, one per figure."""
    parts = []
    for figure, title in TITLES.items():
        if rows := [row for row in points if row["figure"] == figure]:
            protocol = rows[0]["protocol"]
            settings = [protocol["precision"], *([refined(protocol)] if refined(protocol) else [])]
            parts.append(f"{title}, {', '.join(settings)}\n\n{_table(rows)}")
    return "\n\n".join(parts)


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
