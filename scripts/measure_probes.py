"""Measure the probes on synthetic images, and write docs/probes.md.

    python scripts/measure_probes.py                     # after scripts/measure_quickstart.py, whose students it uses
    python scripts/measure_probes.py --reuse             # write the page again from finished results

Each cell of the table is one `spar probe` command. `python -m benchmarks.probes` measures time and memory.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
import yaml
from PIL import Image

from spar_lightning.callbacks.mean_iou import TITLES
from spar_lightning.datasets.scene_renderer import CLASSES, render
from spar_lightning.formatting import markdown

ROOT = Path(__file__).parents[1]
FIRST = 3_000_000  # index of the first image; training and validation of the quickstart use others
SIDE, TRAIN, VAL = 192, 50, 40


COLUMNS = {
    "kNN, trunk": ("knn",),
    "kNN, dense": ("knn", "--features", "dense"),
    "linear, trunk": ("linear", "--steps", "60", "--check_every", "60", "--batch_size", "8", "--lr", "1e-2"),
    "panoptic, PQ": ("panoptic",),
}


def rows(student: Path) -> dict[str, str]:
    """Return the arguments of each row."""
    return {
        TITLES["full"]: "--weights tiny",
        TITLES["before"]: "--weights tiny --attention windowed",
        TITLES["teacher"]: "--weights tiny --inference sliding --stride 16 --blend hann",
        TITLES["after"]: f"--weights {student}",
    }


def render_benchmark(folder: Path, seed: int, first: int, train: int, val: int, side: int) -> Path:
    """Write training and validation images with labels, from the index `first` on, and return their YAML file."""
    for split, count, start in (("train", train, first), ("val", val, first + train)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            scene = render(seed, start + i, side, side)
            for kind, pixels in (("images", scene.image), ("labels", scene.labels)):
                Image.fromarray(pixels).save(folder / split / kind / f"{i:04d}.png", compress_level=1)
    content = {
        "classes": [{"label": name, "names": [name]} for name in CLASSES],
        "images": "val/images/{}.png",
        "labels": [{"file": "val/labels/{}.png"}],
        "train": {"val/": "train/"},
    }
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def accuracy(seed: int, runs: Path) -> list[list[str]]:
    """Return the mIoU of all rows for a seed."""
    student = runs / f"quickstart-seed-{seed}"
    benchmark = render_benchmark(runs / f"probe-scenes-{seed}", seed, FIRST, TRAIN, VAL, SIDE)
    found = []
    for i, (name, arguments) in enumerate(rows(student).items()):
        cells = [str(seed), name]
        for column, (probe, *more) in COLUMNS.items():
            out = runs / f"probes-{seed}" / f"{i}-{column.replace(', ', '-')}"
            own = ["--benchmark", str(benchmark), "--num_workers", "0", "--out", str(out), *more]
            if not (out / "results.json").exists():
                command = [sys.executable, "-m", "spar_lightning", "probe", probe, *shlex.split(arguments), *own]
                subprocess.run(command, check=True)
            content = json.loads((out / "results.json").read_text())
            value = content["sizes"]["native"]["PQ"] if probe == "panoptic" else content["mean"]["mIoU"]
            cells.append(f"{value:.1f}")
        found.append(cells)
    return found


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "measured")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "probes.md")
    args = parser.parse_args()
    if not args.reuse:
        for path in args.runs.glob("probes-*"):
            shutil.rmtree(path)
    head = ["seed", "inference", *COLUMNS]
    table = markdown([head, *(row for seed in args.seeds for row in accuracy(seed, args.runs))])
    template = (ROOT / "scripts" / "probes_page.md").read_text()
    text = template.format(
        accuracy=table,
        train=TRAIN,
        val=VAL,
        side=SIDE,
        hardware=f"{platform.machine()}, {os.cpu_count()} CPU cores, CUDA devices: {torch.cuda.device_count()}",
        packages=", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning")),
    )
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
