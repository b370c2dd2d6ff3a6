"""Numbers on the first pages are those that scripts have measured."""

import re

import pytest

from spar_lightning.callbacks.mean_iou import TITLES
from tests.conftest import ROOT

DOCS = ROOT / "docs"


def cells(page: str, *first: str) -> list[str]:
    """Return the cells of the row of a page that begins with the given cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (DOCS / page).read_text().splitlines()]
    (row,) = [row for row in rows if row[: len(first)] == list(first)]
    return row[len(first) :]


# The run of a user, seed 0; scripts/measure_quickstart.py has written its table.
ROWS = {kind: cells("quickstart.md", "0", kind) for kind in TITLES.values() if kind != TITLES["full"]}
TRAINING = [ROWS[TITLES[stage]] for stage in ("before", "teacher", "after")]


@pytest.mark.parametrize("page", ["../README.md", "index.md"])
def test_results_of_the_quickstart(page: str) -> None:
    lines = (DOCS / page).read_text().splitlines()
    for position, size in enumerate(("size of the window", "three times")):
        (line,) = [line for line in lines if line.startswith("| mIoU, images") and size in line]
        assert re.findall(r"[\d.]+(?= %)", line) == [row[position] for row in TRAINING]


def test_the_table_of_the_quickstart() -> None:
    text = (DOCS / "getting_started.md").read_text()
    assert all(f"| {kind} | {row[0]} | {row[1]} |" in text for kind, row in ROWS.items())


def test_the_refined_student_is_that_of_the_quickstart() -> None:
    for stage in ("before", "teacher", "after"):
        assert cells("refinement.md", TITLES[stage], "none")[:2] == ROWS[TITLES[stage]][:2]


@pytest.mark.parametrize("page", ["../README.md", "index.md"])
def test_tiling_and_the_cost_of_the_teacher(page: str) -> None:
    text = " ".join((DOCS / page).read_text().split())
    tiling, windowed, student = (ROWS[TITLES[stage]] for stage in ("tiling", "windowed", "after"))
    assert f"({tiling[1]} % mIoU)" in text and float(tiling[1]) > float(student[1])
    assert f"({windowed[1]} %)" in text and float(windowed[1]) > float(student[1])
    assert float(tiling[2]) < float(student[2]) and "takes less time than the student" in text
    ratio = re.search(r"takes ([\d.]+) times as long", (DOCS / "quickstart.md").read_text())
    assert ratio is not None and f"about {float(ratio[1]):.0f} times as long" in text


def test_results_of_the_paper_agree() -> None:
    """The numbers of the paper in README are those of docs/paper.md."""
    means = [cells("paper.md", f"SigLIP2, {kind}")[6] for kind in ("single pass", "sliding window", "SPAR")]
    for page in ("../README.md", "index.md"):
        (line,) = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| mean mIoU of six")]
        assert re.findall(r"[\d.]+(?= %)", line) == means
