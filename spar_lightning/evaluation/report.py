"""Evaluation report: results.json, a Markdown table and per-class CSV files."""

import csv
import json
import logging
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from spar_lightning.errors import UserError
from spar_lightning.evaluation import bootstrap
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.benchmark_config import SETS, SHIPPED
from spar_lightning.evaluation.bootstrap import Counts, Interval, dense, miou_draws
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
        self._draws: dict[str, Counts] = {}  # by name of the file with the counts

    def _earlier(self) -> dict[str, Any]:
        """Return the results of this network and protocol that are already in the folder."""
        if not self.path.exists():
            check_ours(
                self.folder, self.path.name, ("table.md", "report.html", "per_class", "gallery"), "spar evaluate"
            )
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

    def refresh(self) -> None:
        """Add the results of benchmarks that other processes have added to the folder in the meantime."""
        self.content["benchmarks"] |= self._earlier()

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
        self.refresh()
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
        per_class, boundary = (
            {label: None if math.isnan(iou) else iou for label, iou in zip(benchmark.classes, values, strict=True)}
            for values in (result.per_class, result.boundary)
        )
        row: dict[str, Any] = {
            "shipped": benchmark.source in SHIPPED,
            "mIoU": result.miou,
            "boundary_IoU": statistics.fmean(iou for iou in boundary.values() if iou is not None),
            "frequency_weighted_IoU": result.frequency_weighted,
            "pixel_accuracy": result.accuracy,
            "images": result.images,
            "ms_per_image": statistics.median(counts.milliseconds),
            "IoU": per_class,
            "boundary_IoU_per_class": boundary,
            "counts": str(file.relative_to(self.folder)),
            "protocol": protocol,
        }
        of_images = dense(torch.cat(counts.per_image).numpy(), result.images, len(benchmark.classes))[..., :3]
        row["interval_warning"] = bootstrap.warning(of_images)
        if row["interval_warning"]:
            log.warning("%s: %s", benchmark.name, row["interval_warning"])
        if bootstrap.has_interval(of_images):
            self._draws[row["counts"]] = miou_draws(of_images, draw_seed(row))
        row["mIoU_interval"] = self._interval([row])
        self.content["benchmarks"][benchmark.name] = row
        self.content["mean"] = self._mean()
        unfinished = self.folder / "counts" / "tmp"
        replace_json(self.path, self.content, unfinished)  # first: it marks the folder as ours
        self._write_classes(benchmark, counts, result)
        replace(self.folder / "table.md", f"{table(self.content)}\n".encode(errors="surrogateescape"), unfinished)

    def _mean(self) -> dict[str, Any]:
        """Return the mean over benchmarks with its interval, or None for the interval if a benchmark has none."""
        rows = list(self.content["benchmarks"].values())
        return {"mIoU": statistics.fmean(row["mIoU"] for row in rows), "mIoU_interval": self._interval(rows)}

    def _interval(self, rows: list[dict[str, Any]]) -> list[float] | None:
        """Return the 95 % interval of the mean mIoU of benchmarks, or None if a benchmark has no interval.

        Benchmarks with the same files, such as voc20 and voc21, have the same draws of images.
        """
        draws = [self._draws_of(row) for row in rows]
        present = [each for each in draws if each is not None]
        if len(present) < len(rows):
            return None
        interval = Interval.of_miou(statistics.fmean(row["mIoU"] for row in rows), np.mean(present, axis=0))
        return [interval.low, interval.high]

    def _draws_of(self, row: dict[str, Any]) -> Counts | None:
        """Return the mIoU of the draws of a benchmark, or None if it has no interval or its counts cannot be read."""
        if row.get("counts") not in self._draws and row.get("mIoU_interval"):
            try:
                counts = read_counts(self.folder, row)[..., :3]
            except UserError as error:
                log.warning("The mean over benchmarks has no interval: %s", error)
                return None
            self._draws[row["counts"]] = miou_draws(counts, draw_seed(row))
        return self._draws.get(row.get("counts", ""))

    def _write_classes(self, benchmark: Benchmark, counts: ConfusionMatrix, result: Result) -> None:
        """Write per_class/NAME.csv with one line per class."""
        path = self.folder / "per_class" / f"{benchmark.name}.csv"
        path.parent.mkdir(exist_ok=True)
        columns = zip(
            benchmark.classes.items(),
            result.per_class,
            result.boundary,
            counts.matrix.sum(1).tolist(),
            counts.matrix.sum(0).tolist(),
            strict=True,
        )
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "names", "IoU", "boundary_IoU", "pixels", "predicted_pixels"])
            for (label, names), *ious, pixels, predicted in columns:
                numbers = ["" if math.isnan(iou) else f"{iou:.4f}" for iou in ious]
                writer.writerow([label, "; ".join(names), *numbers, pixels, predicted])


def check_ours(folder: Path, marker: str, patterns: Iterable[str], command: str) -> None:
    """Raise UserError if a folder contains files with names of results, but not `marker`, which is written first."""
    if theirs := sorted(path for pattern in patterns for path in folder.glob(pattern)):
        raise UserError(f"{theirs[0]} was not written by {command}: {folder} contains no {marker}. Set another --out.")


def table(content: dict[str, Any]) -> str:
    """Return a Markdown table with one line per benchmark, in the order of the paper, and their unweighted mean."""
    return markdown(cells(content))


def cells(content: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the table of results; the first line has the titles."""
    results: dict[str, Any] = content["benchmarks"]
    names = [*(name for name in SHIPPED if name in results), *(name for name in results if name not in SHIPPED)]
    lines = [[
        "benchmark", "mIoU", "95 % interval", "boundary IoU", "pixel accuracy", "images", "classes", "ms per image",
        "protocol",
    ]]  # fmt: skip
    for name in names:
        row = results[name]
        counted = f"{sum(iou is not None for iou in row['IoU'].values())} of {len(row['IoU'])}"
        boundary = f"{row['boundary_IoU']:.2f}" if "boundary_IoU" in row else ""
        lines.append([
            name, f"{row['mIoU']:.2f}", _bounds(row.get("mIoU_interval")), boundary, f"{row['pixel_accuracy']:.2f}",
            str(row["images"]), counted, f"{row['ms_per_image']:.1f}", row["protocol"]["hash"],
        ])  # fmt: skip
    if len(names) > 1:
        ships = all(results[name]["shipped"] for name in names)
        known = ships and any(set(names) == set(benchmarks) for benchmarks in SETS.values())
        title = f"Mean{len(names)}" if known else f"mean of {len(names)}"
        images = str(sum(results[name]["images"] for name in names))
        mean, interval = statistics.fmean(results[name]["mIoU"] for name in names), content.get("mean", {})
        bounds = _bounds(interval.get("mIoU_interval"))
        lines.append([title, f"{mean:.2f}", bounds, "", "", images, "", "", ""])
    return lines


def _bounds(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def read_counts(folder: Path, row: dict[str, Any]) -> Counts:
    """Return the counts (images, C, 6) of the images of a benchmark, in the order of the benchmark.

    The columns are correct, labeled and predicted pixels, and the same three of the boundary regions.

    Args:
        folder: Result folder.
        row: Results of the benchmark.

    Raises:
        UserError: If the file with the counts is of an earlier version or cannot be read.
    """
    if "counts" not in row:
        raise UserError(f"{folder} is of version 0.1, without counts of single images. Evaluate again.")
    try:
        counts = ConfusionMatrix.load(folder / row["counts"], len(row["IoU"]))
        if sorted(counts.images) != list(range(row["images"])):
            raise ValueError(f"it has {len(counts.images)} of {row['images']} images")
        return dense(torch.cat(counts.per_image).numpy(), row["images"], len(row["IoU"]))
    except (OSError, EOFError, KeyError, IndexError, ValueError, BadZipFile) as error:
        raise UserError(f"{folder / row['counts']} cannot be read ({error}). Evaluate again.") from error


def draw_seed(row: dict[str, Any]) -> int:
    """Return the seed of the draws of images, a function of the image and label files of a benchmark."""
    return int(row["protocol"]["images_sha256"], 16)


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
