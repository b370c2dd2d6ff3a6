"""Logger for metrics.jsonl: one JSON object per line, readable without a viewer."""

import json
import math
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from spar_lightning.files.atomic import naming


class JSONLLogger(Logger):
    """Logger that appends metrics to `metrics.jsonl` in the run folder. NaN and infinite values are written as null.

    Args:
        root: Run folder.
    """

    def __init__(self, root: str) -> None:
        super().__init__()
        self.path = Path(root) / "metrics.jsonl"
        self._opened = False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Version of the logger; always empty."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append the metrics of one step as a line of JSON."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        line = json.dumps({"step": step, **finite}, allow_nan=False)
        with naming(self.path), open(self.path, "a+", encoding="utf-8") as file:
            if not self._opened:
                _cut_torn_line(file)
                self._opened = True
            file.write(line + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings of the run are in config.yaml."""


def _cut_torn_line(file: TextIO) -> None:
    """Remove an incomplete last line, which an interrupted run can leave."""
    file.seek(0)
    text = file.read()
    file.truncate(len(text[: text.rfind("\n") + 1].encode()))


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Read metrics.jsonl as a dictionary: metric -> step -> value.

    If a step was logged again after a resume, the later value is used. null is read as NaN.
    """
    metrics: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            metrics.setdefault(name, {})[step] = math.nan if value is None else value
    return metrics
