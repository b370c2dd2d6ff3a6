"""Table 1 of the paper next to measured results (paper_table.yaml has the numbers of the paper).

`spar evaluate --check_paper DIR` reads one result folder for each row of the table, as scripts/reproduce_paper.sh
writes them.
"""

import statistics
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark_config import SETS, shipped
from spar_lightning.evaluation.benchmark_config import read as read_benchmark
from spar_lightning.evaluation.report import read
from spar_lightning.files.hashing import hash_json
from spar_lightning.formatting import markdown
from spar_lightning.refinement.lposs import LPOSS, Preset
from spar_lightning.segmentation.prompts import prompt_templates

MEAN: Final = "Mean6"
REPRODUCED, CLOSE = 0.5, 2.0  # largest differences in percentage points that count as this
CONTEXT_IMAGES: Final = [5104, 5105]  # of PASCAL Context, whose exact number is not known
STRIDE: Final = 24  # of all sliding-window rows
# Mark and ANSI color of a cell.
MARKS: Final = {"reproduced": ("=", 32), "close": ("~", 33), "different": ("!", 31), "not comparable": ("?", 35)}
LEGEND: Final = (
    f"Cells: the paper, measured. = within {REPRODUCED} points, ~ within {CLOSE:.0f} points, ! further away, ? not "
    "comparable."
)


@dataclass(frozen=True)
class PaperRow:
    """Row of Table 1.

    Attributes:
        title: Backbone and inference, as in docs/paper.md.
        family: Family of the backbone.
        inference: Inference mode.
        miou: mIoU of each benchmark and their mean, in percent.
        window: Native image side in pixels; None for NaFlex.
        refine: Preset of LPOSS, or None.
        upsampler: Name of the upsampler, or None.
    """

    title: str
    family: str
    inference: str
    miou: dict[str, float]
    window: int | None = None
    refine: Preset | None = None
    upsampler: str | None = None

    def deviations(self, content: dict[str, Any]) -> list[str]:
        """Return how network and protocol of a result differ from those of the row, as texts."""
        model, protocol = content["model"], dict(content["protocol"])
        if isinstance(protocol.get("upsampler"), dict):
            protocol["upsampler"] = protocol["upsampler"].get("name")  # its weights are not part of the paper's row
        expected = {
            "family": self.family,
            "window": self.window or model.get("window"),
            "inference": self.inference,
            "stride": STRIDE if self.inference == "sliding" else None,
            "blend": None,
            "attention": None,
            "precision": "32-true",
            "templates_sha256": hash_json(prompt_templates("openai_imagenet"), 12),
            "refine": LPOSS(self.refine).identity() if self.refine else None,
            "upsampler": self.upsampler,
        }
        found = {**protocol, "family": model.get("family"), "window": model.get("window")}
        return [
            f"{key} {found.get(key)} instead of {value}" for key, value in expected.items() if found.get(key) != value
        ]


def paper_rows() -> dict[str, PaperRow]:
    """Return the rows of Table 1 by the names of their result folders."""
    text = resources.files("spar_lightning.evaluation").joinpath("paper_table.yaml").read_text(encoding="utf-8")
    return {name: PaperRow(**row) for name, row in yaml.safe_load(text).items()}


def check_paper(folder: Path, color: bool) -> tuple[str, bool]:
    """Return Table 1 with measured results as text, and whether all measured numbers are close to the paper.

    Args:
        folder: Folder with one result folder per row; rows may be missing.
        color: Mark cells by ANSI colors, too.

    Raises:
        UserError: If no row has a result, or if a result cannot be read.
    """
    rows = paper_rows()
    found = {name: read(folder / name) for name in rows if (folder / name / "results.json").is_file()}
    if not found:
        raise UserError(
            f"--check_paper {folder}: found no results.json of Table 1. Expected at least one of the folders "
            f"{', '.join(rows)}, as scripts/reproduce_paper.sh writes them."
        )
    notes = [f"{name}: no results yet" for name in rows if (folder / name).is_dir() and name not in found]
    columns = [*SETS["paper6"], MEAN]
    lines, colors, good = [["Table 1", *columns]], list[list[int | None]](), True
    for name, row in rows.items():
        cells, line_colors, wrong = [row.title], list[int | None](), list[str]()
        if name in found:
            wrong = row.deviations(found[name])
            start = name.replace("-spar", "-single")
            if start != name and start in found and found[start]["model"] == found[name]["model"]:
                wrong.append(f"weights are those of {start}, expected a student")
            results = found[name]["benchmarks"]
            wrong += [text for each in columns[:-1] if each in results for text in _incomplete(each, results[each])]
            notes += [f"{name}: not comparable: {'; '.join(wrong)}"] if wrong else []
            measured = {each: results[each]["mIoU"] for each in columns[:-1] if each in results}
            if len(measured) == len(columns) - 1:
                measured[MEAN] = statistics.fmean(measured.values())
        else:
            measured = {}
        for column in columns:
            expected, number = row.miou[column], measured.get(column)
            state = None if number is None else "not comparable" if wrong else _state(number - expected)
            good = good and state in (None, "reproduced", "close")
            cells.append(
                f"{expected:.1f} {'' if number is None or state is None else f'{number:.1f} {MARKS[state][0]}'}"
            )
            line_colors.append(None if state is None else MARKS[state][1])
        lines.append(cells)
        colors.append(line_colors)
    text = _colored(markdown(lines), colors) if color else markdown(lines)
    return "\n".join([text, "", LEGEND, *notes]), good


def _colored(table: str, colors: list[list[int | None]]) -> str:
    """Color the cells of a Markdown table, except those of the header and the first column."""
    head, rule, *lines = table.splitlines()
    for i, line in enumerate(lines):
        first, *cells = line.strip("|").split("|")
        painted = [
            cell if code is None else f"\033[{code}m{cell}\033[0m" for cell, code in zip(cells, colors[i], strict=True)
        ]
        lines[i] = "|" + "|".join([first, *painted]) + "|"
    return "\n".join([head, rule, *lines])


def _incomplete(name: str, row: dict[str, Any]) -> list[str]:
    """Return a text if a result is not of the whole bundled benchmark."""
    if not row["shipped"]:
        return [f"{name} is not the bundled benchmark"]
    expected = read_benchmark(shipped()[name]).expected_images
    allowed = [expected] if expected else CONTEXT_IMAGES
    return [] if row["images"] in allowed else [f"{name} has {row['images']} of {allowed[0]} images"]


def _state(difference: float) -> str:
    """Return the key of MARKS for a difference; 0.05 points are rounding of the paper."""
    size = abs(difference) - 0.05
    return "reproduced" if size <= REPRODUCED else "close" if size <= CLOSE else "different"
