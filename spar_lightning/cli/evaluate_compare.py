"""`spar evaluate --compare`: differences of two results, with confidence intervals, as text and as a page."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from spar_lightning.cli.output import check_new_file
from spar_lightning.evaluation.comparison import Comparison
from spar_lightning.evaluation.html_report import comparison_page


def compare(results: Sequence[Path], rest: Sequence[str]) -> int:
    """Print the differences of two results; with --out, also write them to an HTML page."""
    parser = ArgumentParser("spar evaluate --compare", description=compare.__doc__)
    parser.add_argument("--out", type=Path, help="HTML file to write: bars of all classes, and the pictures of B")
    out = parser.parse_args(rest).out
    if out is not None:
        check_new_file("--out", out)
    comparison = Comparison(*results)
    print(comparison.text())
    if out is not None:
        out.write_bytes(comparison_page(comparison).encode(errors="replace"))
    return 0
