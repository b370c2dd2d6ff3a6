"""Run the catalogue of files: each case gives the right result or a clear error in one line.

    python -m scripts.file_catalogue --group images --group labels

The script prints counts per group and the bad cases, and exits with status 1 if there is a bad one.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from scripts.file_catalogue import GROUPS
from scripts.file_catalogue.case import GOOD, Finding, Verdict, run


def table(findings: Sequence[Finding]) -> str:
    """Return counts of verdicts per group as a Markdown table."""
    verdicts = get_args(Verdict)
    groups = list(dict.fromkeys(finding.group for finding in findings))
    rows = ["| group | cases | " + " | ".join(verdicts) + " |", "| --- |" + " --- |" * (1 + len(verdicts))]
    for group in [*groups, "all"]:
        counts = Counter(finding.verdict for finding in findings if group in ("all", finding.group))
        rows.append(f"| {group} | {counts.total()} | " + " | ".join(str(counts[name]) for name in verdicts) + " |")
    return "\n".join(rows)


def main() -> int:
    """Run the chosen groups and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="run only this group; repeatable")
    parser.add_argument("--name", default="", help="run only cases whose name contains this text")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random damage")
    parser.add_argument("--keep", type=Path, help="folder for the files, which are kept")
    parser.add_argument("--show", action="store_true", help="also print the error messages of good cases")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with ExitStack() as stack:
        root = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="catalogue_")))
        root.mkdir(parents=True, exist_ok=True)
        findings = run_all(root.resolve(), given.group or list(GROUPS), given.name, given.seed)
    bad = [finding for finding in findings if finding.verdict not in GOOD]
    print(table(findings))
    for finding in findings if given.show else bad:
        print(f"{finding.verdict}: {finding.group}: {finding.name!r}: {finding.detail}")
    return 1 if bad else 0


def run_all(root: Path, groups: Sequence[str], name: str, seed: int) -> list[Finding]:
    """Run the cases of some groups, each in an empty folder below `root`."""
    os.environ.update(SPAR_CACHE=str(root / "text"), HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)  # the images are tiny
    os.chdir(root)
    # Cases are made one at a time: the contents of all files take gigabytes.
    chosen = (case for group in groups for case in GROUPS[group](seed) if name in case.name)
    findings = []
    for number, case in enumerate(tqdm(chosen, "catalogue", unit="case", disable=None)):
        folder = root / case.group / f"{number:04d}"
        folder.mkdir(parents=True)
        findings.append(run(case, folder))
        os.chdir(root)
    return findings


if __name__ == "__main__":
    sys.exit(main())
