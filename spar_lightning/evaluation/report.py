"""Evaluation report: results.json, a Markdown table and per-class CSV files."""

import csv
import json
import logging
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.benchmark_config import SETS, SHIPPED
from spar_lightning.evaluation.confusion import ConfusionMatrix, Result
from spar_lightning.evaluation.protocol import differences, upgraded
from spar_lightning.files.atomic import replace, replace_json
from spar_lightning.formatting import markdown

log = logging.getLogger("spar_lightning")


class Report:
    """Results of one network and protocol on any number of benchmarks, stored in a folder.

    Args:
        folder: Result folder.
        model: Evaluated network as plain data.
        protocol: Protocol that all results share, as plain data.
        environment: Versions and hardware; not part of any hash.

    Raises:
        UserError: If the folder contains results of another network or protocol, or files of the user with the names
            of results.
    """

    def __init__(
        self, folder: Path, model: dict[str, Any], protocol: dict[str, Any], environment: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {
            "model": model, "protocol": protocol, "environment": environment, "benchmarks": {},
        }  # fmt: skip
        self.content["benchmarks"] |= self._earlier()

    def _earlier(self) -> dict[str, Any]:
        """Return the results of this network and protocol that are already in the folder."""
        if not self.path.exists():
            check_ours(self.folder, self.path.name, ("table.md", "per_class"), "spar evaluate")
            return {}
        try:
            found = read(self.path)
        except UserError as error:
            raise UserError(f"{error} Or set --out to a folder other than {self.folder}.") from error
        ours = {**self.content["model"], **self.content["protocol"]}
        if other := differences({**found["model"], **found["protocol"]}, ours):
            raise UserError(
                f"{self.folder} contains results of another network or protocol: {'; '.join(other)}. Set another --out."
            )
        return dict(found["benchmarks"])

    @property
    def path(self) -> Path:
        """Path of results.json."""
        return self.folder / "results.json"

    def add(self, benchmark: Benchmark, protocol: dict[str, Any], counts: ConfusionMatrix, file: Path) -> None:
        """Write the results of a benchmark and replace its earlier results.

        Results of other benchmarks that were added to the folder in the meantime are preserved.

        Args:
            benchmark: Evaluated benchmark.
            protocol: Its part of the protocol.
            counts: Counts of all images.
            file: File with these counts, in the folder of the report.
        """
        self.content["benchmarks"] |= self._earlier()
        result = benchmark.results(counts)
        unlabeled = [
            label for label, pixels in zip(benchmark.classes, counts.matrix.sum(1).tolist(), strict=True) if not pixels
        ]
        if unlabeled:
            names = ", ".join(unlabeled[:3]) + (", .." if len(unlabeled) > 3 else "")
            log.warning(
                "%s: %d of %d classes have no labeled pixel: %s.",
                benchmark.name,
                len(unlabeled),
                len(benchmark.classes),
                names,
            )
        per_class = [None if math.isnan(iou) else iou for iou in result.per_class]
        self.content["benchmarks"][benchmark.name] = {
            "shipped": benchmark.source in SHIPPED,
            "mIoU": result.miou,
            "frequency_weighted_IoU": result.frequency_weighted,
            "pixel_accuracy": result.accuracy,
            "images": result.images,
            "ms_per_image": statistics.median(counts.milliseconds),
            "IoU": dict(zip(benchmark.classes, per_class, strict=True)),
            "counts": str(file.relative_to(self.folder)),
            "protocol": protocol,
        }
        unfinished = self.folder / "counts" / "tmp"
        replace_json(self.path, self.content, unfinished)  # first: it marks the folder as ours
        self._write_classes(benchmark, counts, result)
        replace(self.folder / "table.md", f"{table(self.content)}\n".encode(errors="surrogateescape"), unfinished)

    def _write_classes(self, benchmark: Benchmark, counts: ConfusionMatrix, result: Result) -> None:
        """Write per_class/NAME.csv with one line per class."""
        path = self.folder / "per_class" / f"{benchmark.name}.csv"
        path.parent.mkdir(exist_ok=True)
        columns = zip(
            benchmark.classes.items(),
            result.per_class,
            counts.matrix.sum(1).tolist(),
            counts.matrix.sum(0).tolist(),
            strict=True,
        )
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "names", "IoU", "pixels", "predicted_pixels"])
            for (label, names), iou, pixels, predicted in columns:
                writer.writerow([label, "; ".join(names), "" if math.isnan(iou) else f"{iou:.4f}", pixels, predicted])


def check_ours(folder: Path, marker: str, patterns: Iterable[str], command: str) -> None:
    """Raise UserError if a folder contains files with names of results, but not `marker`, which is written first."""
    if theirs := sorted(path for pattern in patterns for path in folder.glob(pattern)):
        raise UserError(f"{theirs[0]} was not written by {command}: {folder} contains no {marker}. Set another --out.")


def table(content: dict[str, Any]) -> str:
    """Return a Markdown table with one line per benchmark, in the order of the paper, and their unweighted mean."""
    results: dict[str, Any] = content["benchmarks"]
    names = [*(name for name in SHIPPED if name in results), *(name for name in results if name not in SHIPPED)]
    lines = [["benchmark", "mIoU", "pixel accuracy", "images", "classes", "ms per image", "protocol"]]
    for name in names:
        row = results[name]
        accuracy, ms = f"{row['pixel_accuracy']:.2f}", f"{row['ms_per_image']:.1f}"
        counted = f"{sum(iou is not None for iou in row['IoU'].values())} of {len(row['IoU'])}"
        lines.append([name, f"{row['mIoU']:.2f}", accuracy, str(row["images"]), counted, ms, row["protocol"]["hash"]])
    if len(names) > 1:
        ships = all(results[name]["shipped"] for name in names)
        known = ships and any(set(names) == set(benchmarks) for benchmarks in SETS.values())
        title = f"Mean{len(names)}" if known else f"mean of {len(names)}"
        images = str(sum(results[name]["images"] for name in names))
        mean = statistics.fmean(results[name]["mIoU"] for name in names)
        lines.append([title, f"{mean:.2f}", "", images, "", "", ""])
    return markdown(lines)


def read(path: Path) -> dict[str, Any]:
    """Return the content of a results.json, given its path or its folder.

    Raises:
        UserError: If the file cannot be read or was not written by an evaluation.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable results file ({error}). Pass a results.json of spar evaluate."
        ) from error
    if not isinstance(content, dict) or not {"model", "protocol", "benchmarks"} <= content.keys():
        raise UserError(f"{path} was not written by spar evaluate. Pass a results.json of spar evaluate.")
    return {**content, "model": upgraded(content["model"]), "protocol": upgraded(content["protocol"])}
