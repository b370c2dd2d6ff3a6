"""Numbers on the first pages are those that scripts have measured."""

import re

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"


def cells(page: str, *first: str) -> list[str]:
    """Return the cells of the row of a page that begins with the given cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (DOCS / page).read_text().splitlines()]
    (row,) = [row for row in rows if row[: len(first)] == list(first)]
    return row[len(first) :]


@pytest.mark.parametrize("page", ["../README.md", "index.md", "getting_started.md"])
def test_results_of_the_quickstart(page: str) -> None:
    """docs/refinement.md is written by scripts/measure_refinement.py, which measures the run of the quickstart."""
    text = (DOCS / page).read_text()
    kinds = ("single pass, before", "sliding window (teacher)", "single pass, after (SPAR)")
    measured = [cells("refinement.md", kind, "none")[:2] for kind in kinds]
    for position, size in enumerate(("size of the window", "three times")):
        numbers = [row[position] for row in measured]
        if page == "getting_started.md":
            assert all(f"| {kind} | {row[0]} | {row[1]} |" in text for kind, row in zip(kinds, measured, strict=True))
        else:
            (line,) = [line for line in text.splitlines() if line.startswith("| mIoU, images") and size in line]
            assert re.findall(r"[\d.]+(?= %)", line) == numbers


@pytest.mark.parametrize("page", ["../README.md", "index.md"])
def test_tiling_and_the_cost_of_the_teacher(page: str) -> None:
    text = " ".join((DOCS / page).read_text().split())
    tiling, student = (cells("refinement.md", name, stride, "-") for name, stride in (
        ("Tiny, sliding window", "64"), ("quickstart, single pass", "-")))  # fmt: skip
    assert f"better ({float(tiling[0]):.1f} % mIoU)" in text and float(tiling[0]) > float(student[0])
    assert 0.4 < float(tiling[1]) / float(student[1]) < 0.6 and "about half the time of the student" in text
    ratio = re.search(r"takes ([\d.]+) times as long", (DOCS / "quickstart.md").read_text())
    assert ratio is not None and f"about {float(ratio[1]):.0f} times as long" in text


def test_results_of_the_paper_agree() -> None:
    """The numbers of the paper in README are those of docs/paper.md."""
    means = [cells("paper.md", f"SigLIP2, {kind}")[6] for kind in ("single pass", "sliding window", "SPAR")]
    for page in ("../README.md", "index.md"):
        (line,) = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| mean mIoU of six")]
        assert re.findall(r"[\d.]+(?= %)", line) == means
