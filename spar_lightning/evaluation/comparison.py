"""Comparison of two evaluations: their protocols, and which differences exceed the choice of images."""

import statistics
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np

from spar_lightning.errors import UserError
from spar_lightning.evaluation import bootstrap
from spar_lightning.evaluation.protocol import differences
from spar_lightning.evaluation.report import read
from spar_lightning.formatting import markdown

CLASSES: Final = 5  # classes listed for each benchmark
NOTE: Final = (
    f"95 % intervals: {bootstrap.SAMPLES} draws of the images with replacement, the same for A and B. Of classes that "
    "do not differ, one in twenty is listed by chance."
)


def comparison(one: Path, other: Path) -> str:
    """Return the differences between two networks and protocols, and tables with both results and their differences.

    Raises:
        UserError: If a result cannot be read.
    """
    first, second = read(one), read(other)
    lines = [f"A  {one}", f"B  {other}", ""]
    for part in ("model", "protocol"):
        lines += [f"{part}: {text}" for text in differences(first[part], second[part])]
    shared = [name for name in first["benchmarks"] if name in second["benchmarks"]]
    rows = [["benchmark", "A", "B", "B - A", "95 % interval", "differs"]]
    reasons, explained = [], [["benchmark", "class", "A", "B", "B - A", "95 % interval"]]
    for name in shared:
        a, b = first["benchmarks"][name], second["benchmarks"][name]
        lines += [f"{name}: {text}" for text in differences(_plain(a["protocol"]), _plain(b["protocol"]))]
        row = [name, f"{a['mIoU']:.2f}", f"{b['mIoU']:.2f}", f"{b['mIoU'] - a['mIoU']:+.2f}"]
        try:
            found = _compare(a, b, one, other)
        except UserError as error:
            reasons.append(f"{name}: no interval, because {error}")
            rows.append([*row, "", ""])
            continue
        rows.append([*row, _bounds(found.miou), "yes" if found.miou.differs else "no"])
        explained += _explanation(name, found, a["IoU"], b["IoU"])
    if len(shared) > 1:
        means = [statistics.fmean(side["benchmarks"][name]["mIoU"] for name in shared) for side in (first, second)]
        rows.append(
            [f"mean of {len(shared)}", *(f"{mean:.2f}" for mean in means), f"{means[1] - means[0]:+.2f}", "", ""]
        )
    only = [name for side in (first, second) for name in side["benchmarks"] if name not in shared]
    lines += [f"only in one of the two reports: {', '.join(only)}"] if only else []
    lines += ["the same network, the same protocol"] if len(lines) == 3 else []
    lines += ["", markdown(rows), *reasons, "", NOTE]
    if len(explained) > 1:
        lines += [
            "",
            f"Classes with the largest differences, at most {CLASSES} of each benchmark:",
            "",
            markdown(explained),
        ]
    return "\n".join(lines)


def _compare(a: dict[str, Any], b: dict[str, Any], one: Path, other: Path) -> bootstrap.Comparison:
    """Return the paired comparison of the results of a benchmark.

    Raises:
        UserError: If images or classes differ, or counts of single images are missing.
    """
    if a["protocol"].get("images_sha256") != b["protocol"].get("images_sha256"):
        raise UserError("images or labels differ.")
    if a["protocol"].get("labels") != b["protocol"].get("labels"):
        raise UserError("the meaning of the label values differs.")
    if list(a["IoU"]) != list(b["IoU"]):
        raise UserError("classes differ.")
    counts = []
    for row, path in ((a, one), (b, other)):
        folder = path if path.is_dir() else path.parent
        if "counts" not in row:
            raise UserError(
                f"{folder} is of version 0.1, without counts of single images. Evaluate again with another --out."
            )
        try:
            with np.load(folder / row["counts"], allow_pickle=False) as content:
                counts.append(bootstrap.dense(content["per_image"], row["images"], len(row["IoU"])))
                complete = np.array_equal(counts[-1][..., 1].sum(0), content["matrix"].sum(1))
        except (OSError, EOFError, KeyError, IndexError, ValueError, BadZipFile) as error:
            raise UserError(f"{folder / row['counts']} cannot be read ({error}). Evaluate again.") from error
        if not complete:
            raise UserError(f"{folder} has images that version 0.1 evaluated. Evaluate again with another --out.")
    return bootstrap.compare(counts[0], counts[1])


def _explanation(name: str, found: bootstrap.Comparison, a: dict[str, Any], b: dict[str, Any]) -> list[list[str]]:
    """Return rows of the classes whose interval excludes 0, the largest differences first."""
    named = zip(a, found.per_class, strict=True)
    differing = [(label, each) for label, each in named if each is not None and each.differs]
    differing.sort(key=lambda pair: -abs(pair[1].difference))
    return [
        [name, label, f"{a[label]:.2f}", f"{b[label]:.2f}", f"{each.difference:+.2f}", _bounds(each)]
        for label, each in differing[:CLASSES]
    ]


def _bounds(interval: bootstrap.Interval) -> str:
    return f"{interval.low:+.2f} to {interval.high:+.2f}"


def _plain(protocol: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in protocol.items() if key != "hash"}
