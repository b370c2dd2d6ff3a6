"""metrics.jsonl: every logged value as a line of JSON, so that a run can be read without a viewer."""

import json
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class JSONLLogger(Logger):
    """Append metrics to `metrics.jsonl` in the run's folder.

    Args:
        root: The run's folder.
    """

    def __init__(self, root: str) -> None:
        super().__init__()
        self.path = Path(root) / "metrics.jsonl"
        self._opened = False

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        line = json.dumps({"step": step, **{name: float(value) for name, value in metrics.items()}})
        with open(self.path, "a+") as file:
            if not self._opened:
                _cut_torn_line(file)
                self._opened = True
            file.write(line + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's settings are in config.yaml."""


def _cut_torn_line(file: TextIO) -> None:
    """Drop a last line that a power cut left half written."""
    file.seek(0)
    text = file.read()
    file.truncate(len(text[: text.rfind("\n") + 1].encode()))


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Metric -> step -> value; after a resume the later line of a step counts."""
    metrics: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            metrics.setdefault(name, {})[step] = value
    return metrics
