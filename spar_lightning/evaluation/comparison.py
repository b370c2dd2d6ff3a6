"""Comparison of two evaluations: their protocols, and which differences exceed the choice of images."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from spar_lightning.errors import UserError
from spar_lightning.evaluation import bootstrap
from spar_lightning.evaluation.bootstrap import Interval
from spar_lightning.evaluation.protocol import differences
from spar_lightning.evaluation.report import draw_seed, read, read_counts
from spar_lightning.formatting import markdown

CLASSES: Final = 5  # classes listed for each benchmark
NOTE: Final = (
    f"95 % intervals: {bootstrap.SAMPLES} draws of the images with replacement, the same for A and B. Of classes "
    f"without a difference, 5 to 10 % are listed by chance; those in fewer than {bootstrap.FEW} images are left out."
)
TITLES: Final = ["benchmark", "metric", "A", "B", "B - A", "95 % interval", "differs"]
METRICS: Final = {"mIoU": slice(0, 3), "boundary IoU": slice(3, 6)}  # columns of the counts


@dataclass(frozen=True)
class Row:
    """Difference of a metric on one benchmark, or of its mean over several.

    Attributes:
        benchmark: Name of the benchmark, or that of the mean.
        metric: Key of METRICS.
        values: Metric of both networks in percent.
        difference: Difference with its interval, or None without counts of single images.
    """

    benchmark: str
    metric: str
    values: tuple[float, float]
    difference: Interval | None

    def cells(self) -> list[str]:
        """Return the cells of a table."""
        a, b = self.values
        line = [self.benchmark, self.metric, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"]
        if self.difference is None:
            return [*line, "", ""]
        return [*line, bounds(self.difference), "yes" if self.difference.differs else "no"]


class Comparison:
    """Comparison of two results of `spar evaluate`.

    Args:
        one: Folder or results.json of network A.
        other: The same for network B.

    Attributes:
        folders: Folders of both results.
        settings: Differences of networks and protocols, one text each.
        rows: Differences of the benchmarks that both have evaluated, and of their mean.
        classes: For each benchmark, the difference of the IoU of each class with its interval.
        notes: Reasons for missing intervals and warnings, by benchmark.

    Raises:
        UserError: If a result cannot be read.
    """

    def __init__(self, one: Path, other: Path) -> None:
        self.paths = (one, other)
        self.folders = tuple(path if path.is_dir() else path.parent for path in self.paths)
        self.results = (read(one), read(other))
        first, second = (result["benchmarks"] for result in self.results)
        self.settings = [
            f"{part}: {text}"
            for part in ("model", "protocol")
            for text in differences(self.results[0][part], self.results[1][part])
        ]
        self.shared = [name for name in first if name in second]
        if not self.shared:
            raise UserError(
                f"--compare: the results have no benchmark in common. {one}: {', '.join(first)}; {other}: "
                f"{', '.join(second)}. Evaluate both on the same benchmarks."
            )
        self.rows: list[Row] = []
        self.classes: dict[str, dict[str, Interval | None]] = {}
        self.notes: dict[str, str] = {}
        draws: dict[str, list[bootstrap.Counts | None]] = {metric: [] for metric in METRICS}
        for name in self.shared:
            rows = (first[name], second[name])
            self.settings += [f"{name}: {text}" for text in differences(*(_plain(row["protocol"]) for row in rows))]
            try:
                counts = self._counts(rows)
            except UserError as error:
                self.notes[name] = f"no interval, because {error}"
                self.rows.append(Row(name, "mIoU", (rows[0]["mIoU"], rows[1]["mIoU"]), None))
                draws["mIoU"].append(None)
                continue
            if text := bootstrap.warning(counts[0]):
                self.notes[name] = text
            for metric, columns in METRICS.items():
                one_counts, other_counts = (each[..., columns] for each in counts)
                found = bootstrap.compare(one_counts, other_counts, draw_seed(rows[0]))
                a, b = (float(bootstrap.mean_iou(bootstrap.iou(each.sum(0)))) for each in (one_counts, other_counts))
                self.rows.append(Row(name, metric, (a, b), found.miou))
                draws[metric].append(None if found.miou is None else found.draws)
                if metric == "mIoU":
                    self.classes[name] = dict(zip(rows[0]["IoU"], found.per_class, strict=True))
        if len(self.shared) > 1:
            complete = [metric for metric in METRICS if len(draws[metric]) == len(self.shared)]
            self.rows += [self._mean(metric, draws[metric]) for metric in complete]

    def _mean(self, metric: str, draws: list[bootstrap.Counts | None]) -> Row:
        """Return the difference of the mean over benchmarks; with an interval if all of them have one."""
        rows = [row for row in self.rows if row.metric == metric]
        a, b = (statistics.fmean(row.values[i] for row in rows) for i in range(2))
        present = [each for each in draws if each is not None]
        interval = Interval.of(b - a, np.mean(present, axis=0)) if len(present) == len(draws) else None
        return Row(f"mean of {len(rows)}", metric, (a, b), interval)

    def _counts(self, rows: tuple[dict[str, Any], dict[str, Any]]) -> list[bootstrap.Counts]:
        """Return the counts of the images of a benchmark, of both networks.

        Raises:
            UserError: If images or classes differ, or counts of single images are missing.
        """
        a, b = rows
        if a["protocol"].get("images_sha256") != b["protocol"].get("images_sha256"):
            raise UserError("images or labels differ.")
        if a["protocol"].get("labels") != b["protocol"].get("labels"):
            raise UserError("the meaning of the label values differs.")
        if list(a["IoU"]) != list(b["IoU"]):
            raise UserError("classes differ.")
        return [read_counts(folder, row) for folder, row in zip(self.folders, rows, strict=True)]

    def text(self) -> str:
        """Return the differences between networks and protocols, and tables with both results and their differences."""
        lines = [f"A  {self.paths[0]}", f"B  {self.paths[1]}", "", *self.settings]
        only = [name for side in self.results for name in side["benchmarks"] if name not in self.shared]
        lines += [f"only in one of the two reports: {', '.join(only)}"] if only else []
        lines += ["the same network, the same protocol"] if len(lines) == 3 else []
        notes = [f"{name}: {note}" for name, note in self.notes.items()]
        lines += ["", markdown([TITLES, *(row.cells() for row in self.rows)]), *notes, "", NOTE]
        if explained := [line for name in self.classes for line in self._explanation(name)]:
            title = f"Classes with the largest differences of IoU, at most {CLASSES} of each benchmark:"
            head = ["benchmark", "class", "A", "B", "B - A", "95 % interval"]
            lines += ["", title, "", markdown([head, *explained])]
        return "\n".join(lines)

    def _explanation(self, name: str) -> list[list[str]]:
        """Return rows of the classes whose interval excludes 0, the largest differences first."""
        a, b = (result["benchmarks"][name]["IoU"] for result in self.results)
        found = self.classes[name].items()
        differing = [(label, each) for label, each in found if each is not None and each.differs]
        differing.sort(key=lambda pair: -abs(pair[1].value))
        return [
            [name, label, f"{a[label]:.2f}", f"{b[label]:.2f}", f"{each.value:+.2f}", bounds(each)]
            for label, each in differing[:CLASSES]
        ]


def bounds(interval: Interval) -> str:
    """Return the bounds of an interval of a difference as text, with signs."""
    return f"{interval.low:+.2f} to {interval.high:+.2f}"


def _plain(protocol: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in protocol.items() if key != "hash"}
