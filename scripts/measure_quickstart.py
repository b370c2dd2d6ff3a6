"""Run the quickstart with several seeds of images and distillation, and write docs/quickstart.md.

    python scripts/measure_quickstart.py                       # seeds 101 102 103, about eight minutes each
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
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from spar_lightning.callbacks.mean_iou import TITLES
from spar_lightning.evaluation.report import read
from spar_lightning.formatting import markdown

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "spar_lightning" / "configs" / "quickstart.yaml"
SIZES = ("scenes_64", "scenes_192", "scenes_320")
SMALL, LARGER = SIZES[0], SIZES[1:]
PAPER = "sliding window, equal weights (the paper's teacher)"
FIVE_TIMES = ("--data.val_sizes", "[64,192,320]")  # in addition to the sizes of the quickstart


def measure(seed: int, runs: Path, threads: int, reuse: bool, *more: str) -> dict[str, Any]:
    """Run one seed and return its results by stage, with the seconds between its first and its last file."""
    folder = runs / f"quickstart-seed-{seed}"
    if not (reuse and (folder / "results.json").exists()):
        run(seed, runs, folder, threads, *more)
    seconds = (folder / "results.json").stat().st_mtime - (folder / "config.yaml").stat().st_mtime
    rows = {row["stage"]: row for row in json.loads((folder / "results.json").read_text())}
    rows["paper"] = {"miou": teacher_of_the_paper(folder, threads)}
    return {"seed": seed, "seconds": seconds, "folder": folder, **rows}


def run(seed: int, runs: Path, folder: Path, threads: int, *more: str) -> None:
    """Run `spar fit` with a seed, as a user does, on newly rendered images."""
    shutil.rmtree(runs / "scenes" / f"seed-{seed}", ignore_errors=True)  # rendering and caching are part of the time
    command = [
        *(sys.executable, "-m", "spar_lightning", "fit", "--config", str(CONFIG)),
        *("--seed_everything", str(seed), "--data.seed", str(seed)),
        *("--run_dir", str(folder), "--data.root", str(runs / "scenes"), "--overwrite"),
        *more,
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def teacher_of_the_paper(folder: Path, threads: int) -> dict[str, float]:
    """Return the mIoU by size of a sliding window in which all windows have the same weight."""
    out = folder / "equal-weights"
    if not (out / "results.json").exists():
        command = [sys.executable, "-m", "spar_lightning", "evaluate", "--config", str(folder / "config.yaml")]
        command += ["--inference", "sliding", "--blend", "mean", "--out", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return {name: found["mIoU"] for name, found in read(out)["benchmarks"].items()}


def lead(run: dict[str, Any], over: str) -> list[float]:
    """Return by how many points the student is above another row, at three and at five times the window."""
    return [run["after"]["miou"][size] - run[over]["miou"][size] for size in LARGER]


def aims(run: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Return for each aim what was measured, and whether it is reached."""
    loss = run["after"]["miou"][SMALL] - run["before"]["miou"][SMALL]
    time = run["after"]["ms"] / run["tiling"]["ms"]
    found = {name: lead(run, name) for name in ("before", "full", "teacher", "paper", "tiling")}
    text = {name: " / ".join(f"{value:+.1f}" for value in values) for name, values in found.items()}
    return {
        "student - its own start, above 0": (text["before"], min(found["before"]) > 0),
        "student - full attention before, above 0": (text["full"], min(found["full"]) > 0),
        "student - the paper's teacher, at least -1": (text["paper"], min(found["paper"]) >= -1),
        "student - its teacher, at least -1": (text["teacher"], min(found["teacher"]) >= -1),
        "student - tiling, at least +2": (text["tiling"], min(found["tiling"]) >= 2),
        "time of student / tiling, at most 1": (f"{time:.2f}", time <= 1),
        "at the window's size, student - its own start, at least -1": (f"{loss:+.1f}", loss >= -1),
    }


def verdict(runs: list[dict[str, Any]]) -> str:
    """Return a table of the aims, with what was measured for each seed; a reached aim is bold."""
    lines = [["aim", *(f"seed {run['seed']}" for run in runs)]]
    for name in aims(runs[0]):
        cells = [aims(run)[name] for run in runs]
        lines.append([name, *(f"**{text}**" if reached else text for text, reached in cells)])
    return markdown(lines)


def results(runs: list[dict[str, Any]], sizes: Sequence[str]) -> str:
    """Return the table of all rows of some runs: mIoU by size, and milliseconds for the last size."""
    head = ["seed", "inference", *(f"{title(size)}, mIoU" for size in sizes), f"{title(sizes[-1])}, ms per image"]
    lines = [head]
    for run in runs:
        for stage, name in [*TITLES.items(), ("paper", PAPER)]:
            if stage in run:
                miou = [f"{run[stage]['miou'][size]:.1f}" for size in sizes]
                lines.append([str(run["seed"]), name, *miou, f"{run[stage]['ms']:.1f}" if "ms" in run[stage] else "-"])
    return markdown(lines)


def title(benchmark: str) -> str:
    """Return the size of the images of a benchmark as text."""
    return f"{benchmark.removeprefix('scenes_')} px"


def page(users: dict[str, Any], runs: list[dict[str, Any]], jobs: int, threads: int) -> str:
    """Return the text of docs/quickstart.md."""
    ratio = users["teacher"]["ms"] / users["before"]["ms"]
    minutes = ", ".join(f"{run['seconds'] / 60:.1f}" for run in [users, *runs])
    images = runs[0]["after"]["images"]
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning"))
    config = yaml.safe_load(CONFIG.read_text())
    template = (ROOT / "scripts" / "quickstart_page.md").read_text()
    return template.format(
        users=results([users], SIZES[:2]),
        rows=results(runs, SIZES),
        verdict=verdict(runs),
        ratio=f"{ratio:.1f}",
        minutes=minutes,
        train=config["data"]["init_args"]["train_scenes"],
        epochs=config["trainer"]["max_epochs"],
        images=images[SMALL],
        hardware=f"{platform.machine()}, {os.cpu_count()} CPU cores ({_processor()}), no GPU",
        packages=packages,
        seeds=" ".join(str(run["seed"]) for run in runs),
        jobs=jobs,
        threads=threads,
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
        runs = list(pool.map(lambda seed: measure(seed, args.runs, threads, args.reuse, *FIVE_TIMES), args.seeds))
    # The run of a user on the whole machine, whose numbers the README has.
    users = measure(0, args.runs, os.cpu_count() or 1, reuse=True)
    args.out.write_text(page(users, runs, args.jobs, threads), encoding="utf-8")
    for name in ("predictions", "curves"):
        shutil.copy(users["folder"] / "plots" / f"{name}.png", args.out.with_name(f"quickstart_{name}.png"))
    print(f"wrote {args.out}\n{verdict(runs)}")


if __name__ == "__main__":
    main()
