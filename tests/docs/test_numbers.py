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
ROWS = {stage: cells("quickstart.md", "0", title) for stage, title in TITLES.items() if stage != "windowed"}


@pytest.mark.parametrize("page", ["../README.md", "index.md"])
def test_results_of_the_quickstart(page: str) -> None:
    lines = (DOCS / page).read_text().splitlines()
    for position, size in enumerate(("size of the window", "three times")):
        (line,) = [line for line in lines if line.startswith("| mIoU, images") and size in line]
        found = [ROWS[stage][position] for stage in ("full", "before", "tiling", "teacher", "after")]
        assert re.findall(r"[\d.]+(?= %)", line) == found


def test_the_table_of_the_quickstart() -> None:
    text = (DOCS / "getting_started.md").read_text()
    assert all(f"| {TITLES[stage]} | {row[0]} | {row[1]} |" in text for stage, row in ROWS.items())


def test_the_refined_student_is_that_of_the_quickstart() -> None:
    for stage in ("before", "teacher", "after"):
        assert cells("refinement.md", TITLES[stage], "none")[:2] == ROWS[stage][:2]


@pytest.mark.parametrize("page", ["../README.md", "index.md"])
def test_what_training_adds_and_the_cost_of_the_teacher(page: str) -> None:
    text = " ".join((DOCS / page).read_text().split())
    before, student = float(ROWS["before"][1]), float(ROWS["after"][1])
    assert f"has {before} % without any training" in text and before < student
    assert all(student > float(ROWS[stage][1]) for stage in ("full", "tiling"))
    of_paper = cells("quickstart.md", "0", "sliding window, equal weights (the paper's teacher)")[1]
    assert f"the paper's has {of_paper} %" in text
    ratio = re.search(r"takes ([\d.]+) times as long", (DOCS / "quickstart.md").read_text())
    assert ratio is not None and f"about {float(ratio[1]):.0f} times as long" in text


def test_results_of_the_paper_agree() -> None:
    """The numbers of the paper in README are those of docs/paper.md."""
    means = [cells("paper.md", f"SigLIP2, {kind}")[6] for kind in ("single pass", "sliding window", "SPAR")]
    for page in ("../README.md", "index.md"):
        (line,) = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| mean mIoU of six")]
        assert re.findall(r"[\d.]+(?= %)", line) == means
