"""Report of a probe: results.json, a Markdown table and a CSV file with the classes, for several seeds or sizes."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spar_lightning.errors import UserError
from spar_lightning.evaluation.report import check_ours
from spar_lightning.files.atomic import replace, replace_json
from spar_lightning.formatting import markdown

FILES = ("results.json", "table.md", "per_class.csv")


class ProbeReport:
    """Results of a probe of one network on one benchmark, one row for each seed or size.

    Args:
        folder: Result folder.
        content: What the results depend on, as plain data: `model`, `protocol` and `benchmark`.
        environment: Versions and hardware.
        row: What a row stands for; rows of seeds are averaged.

    Attributes:
        rows: Results by seed or size, those of an earlier run included.

    Raises:
        UserError: If the folder contains results of something else, or files of the user with the same names.
    """

    def __init__(
        self, folder: Path, content: Mapping[str, Any], environment: Mapping[str, Any], row: str = "seed"
    ) -> None:
        self.folder, self._environment = folder, dict(environment)
        self._content = json.loads(json.dumps(content))  # as it is read again: all keys are text
        self._row = row
        self.rows = self._earlier()

    def _earlier(self) -> dict[str, dict[str, Any]]:
        """Return the rows that are already in the folder; other processes may add some."""
        path = self.folder / FILES[0]
        if not path.exists():
            check_ours(self.folder, FILES[0], FILES[1:], "spar probe")
            return {}
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable results file ({error}). Set another --out.") from error
        if not isinstance(found, dict) or {key: found.get(key) for key in self._content} != self._content:
            raise UserError(
                f"{self.folder} contains results of another probe, network or benchmark. Set another --out."
            )
        return dict(found[f"{self._row}s"])

    def add(self, row: object, result: Mapping[str, Any], per_class: Mapping[str, float]) -> None:
        """Add the result of a seed or size and write all files.

        Args:
            row: Seed or size.
            result: Numbers of the result; the first one is the main one. NaN for one that is not defined.
            per_class: Main number of each class; NaN for a class that never occurs.
        """
        self.rows = self._earlier() | {str(row): {**_finite(result), "per_class": _finite(per_class)}}
        if self._row == "seed":
            self.rows = {seed: self.rows[seed] for seed in sorted(self.rows, key=int)}
        unfinished = self.folder / "tmp"
        content = {**self._content, "environment": self._environment, f"{self._row}s": self.rows}
        if self._row == "seed":
            content |= self.summary()
        replace_json(self.folder / FILES[0], content, unfinished)
        replace(self.folder / FILES[1], f"{self.table()}\n".encode(errors="surrogateescape"), unfinished)
        replace(self.folder / FILES[2], self._classes().encode(errors="surrogateescape"), unfinished)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return mean and standard deviation (n - 1; 0 for one seed) over seeds of each number."""
        columns = {name: [row[name] for row in self.rows.values()] for name in self._numbers()}
        return {
            "mean": {name: statistics.fmean(values) for name, values in columns.items()},
            "std": {
                name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in columns.items()
            },
        }  # fmt: skip

    def table(self) -> str:
        """Return a Markdown table with one line per row; for seeds, also their mean and standard deviation."""
        names = self._numbers()
        lines = [[self._row, *names], *([row, *_cells(result, names)] for row, result in self.rows.items())]
        if self._row == "seed" and len(self.rows) > 1:
            found = self.summary()
            lines += [["mean", *_cells(found["mean"], names)], ["standard deviation", *_cells(found["std"], names)]]
        return markdown(lines)

    def _numbers(self) -> list[str]:
        first = next(iter(self.rows.values()))
        return [name for name in first if name != "per_class"]

    def _classes(self) -> str:
        """Return the content of per_class.csv: one line per class, one column per row of the table."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["class", *(f"{self._row} {row}" for row in self.rows)])
        columns = [result["per_class"] for result in self.rows.values()]
        for label in columns[0]:
            values = [column[label] for column in columns]
            writer.writerow([label, *("" if value is None else f"{value:.4f}" for value in values)])
        return text.getvalue()


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return the values with null for NaN, which JSON does not have."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _cells(row: Mapping[str, float | None], names: Sequence[str]) -> list[str]:
    """Return the numbers of a row as text; one that is not defined is empty."""
    values = [row[name] for name in names]
    return ["" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.2f}" for v in values]
