"""Run the quickstart with several seeds of images and distillation, and write docs/quickstart.md.

    python scripts/measure_quickstart.py                       # seeds 101 102 103, about six minutes each
    python scripts/measure_quickstart.py --jobs 2              # two seeds at once, which share the cores
    python scripts/measure_quickstart.py --jobs 2 --reuse      # write the page again from finished runs
    python scripts/measure_quickstart.py --seeds 7 8 --out /tmp/page.md

Each seed is a separate process that runs the same command as a user.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "spar_lightning" / "configs" / "quickstart.yaml"
SMALL, LARGE = "scenes_64", "scenes_192"
TEACHER_LEAD, STUDENT_LEAD, STUDENT_SHARE = 5.0, 4.0, 0.6  # mIoU points, mIoU points, share of the teacher's lead


def measure(seed: int, runs: Path, threads: int, reuse: bool) -> dict[str, Any]:
    """Run one seed and return its results by stage, with the seconds between its first and its last file."""
    folder = runs / f"quickstart-seed-{seed}"
    if not (reuse and (folder / "results.json").exists()):
        run(seed, runs, folder, threads)
    seconds = (folder / "results.json").stat().st_mtime - (folder / "config.yaml").stat().st_mtime
    rows = {row["stage"]: row for row in json.loads((folder / "results.json").read_text())}
    return {"seed": seed, "seconds": seconds, "folder": folder, **rows}


def run(seed: int, runs: Path, folder: Path, threads: int) -> None:
    """Run `spar fit` with a seed, as a user does, on newly rendered images."""
    shutil.rmtree(runs / "scenes" / f"seed-{seed}", ignore_errors=True)  # rendering and caching are part of the time
    command = [
        *(sys.executable, "-m", "spar_lightning", "fit", "--config", str(CONFIG)),
        *("--seed_everything", str(seed), "--data.seed", str(seed)),
        *("--run_dir", str(folder), "--data.root", str(runs / "scenes"), "--overwrite"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def leads(run: dict[str, Any]) -> tuple[float, float, float]:
    """Return three values at three times the window: lead of the teacher, lead of the student, and their ratio."""
    before, teacher, after = (run[stage]["miou"][LARGE] for stage in ("before", "teacher", "after"))
    return teacher - before, after - before, (after - before) / (teacher - before)


def verdict(runs: list[dict[str, Any]]) -> str:
    """Return table rows that show for each seed whether it reaches all three targets."""
    rows = []
    for run in runs:
        teacher, student, share = leads(run)
        reached = teacher >= TEACHER_LEAD and student >= STUDENT_LEAD and share >= STUDENT_SHARE
        rows.append(f"| {run['seed']} | {teacher:.1f} | {student:.1f} | {share:.0%} | {'yes' if reached else 'no'} |")
    return "\n".join(rows)


def page(runs: list[dict[str, Any]], jobs: int, threads: int) -> str:
    """Return the text of docs/quickstart.md."""
    rows = []
    for run in runs:
        for stage, title in (
            ("before", "single pass, before"),
            ("teacher", "sliding window (teacher)"),
            ("after", "single pass, after (SPAR)"),
        ):
            small, large = (run[stage]["miou"][name] for name in (SMALL, LARGE))
            rows.append(f"| {run['seed']} | {title} | {small:.1f} | {large:.1f} | {run[stage]['ms']:.1f} |")
    # Both single passes cost the same. The first is timed right before the teacher, so the machine load is similar.
    ratio = statistics.median(run["teacher"]["ms"] / run["before"]["ms"] for run in runs)
    minutes = ", ".join(f"{run['seconds'] / 60:.1f}" for run in runs)
    images = runs[0]["after"]["images"]
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning"))
    template = (ROOT / "scripts" / "quickstart_page.md").read_text()
    return template.format(
        rows="\n".join(rows),
        verdict=verdict(runs),
        ratio=f"{ratio:.1f}",
        minutes=minutes,
        train=yaml.safe_load(CONFIG.read_text())["data"]["init_args"]["train_scenes"],
        small=images[SMALL],
        large=images[LARGE],
        hardware=f"{platform.machine()}, {os.cpu_count()} CPU cores ({_processor()}), no GPU",
        packages=packages,
        seeds=" ".join(str(run["seed"]) for run in runs),
        jobs=jobs,
        threads=threads,
        teacher_lead=TEACHER_LEAD,
        student_lead=STUDENT_LEAD,
        student_share=f"{STUDENT_SHARE:.0%}",
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Run all seeds and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "measured")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quickstart.md")
    args = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda seed: measure(seed, args.runs, threads, args.reuse), args.seeds))
    args.out.write_text(page(runs, args.jobs, threads), encoding="utf-8")
    pictured = measure(0, args.runs, threads, reuse=True)["folder"]  # the run of a user, whose numbers the README has
    for name in ("predictions", "curves"):
        shutil.copy(pictured / "plots" / f"{name}.png", args.out.with_name(f"quickstart_{name}.png"))
    print(f"wrote {args.out}\n{verdict(runs)}")


if __name__ == "__main__":
    main()
