"""Measure the probes on synthetic images, their cost and their memory, and write docs/probes.md.

    python scripts/measure_probes.py                     # after scripts/measure_quickstart.py, whose students it uses
    python scripts/measure_probes.py --reuse             # write the page again from finished results

Each row of the accuracy table is one `spar probe` command. Cost and peak memory are measured in separate processes.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
import yaml
from PIL import Image

from spar_lightning.datasets.scene_renderer import CLASSES, render
from spar_lightning.formatting import bytes_text, markdown
from spar_lightning.probes.memory_bank import MemoryBank

ROOT = Path(__file__).parents[1]
FIRST = 3_000_000  # index of the first image; training and validation of the quickstart use others
SIDE, TRAIN, VAL = 192, 50, 40
WIDTH, NAMES = 768, 150  # ViT-B on ADE20K
SIZES = (62_500, 125_000, 250_000, 500_000, 1_000_000)
QUERIES = 2352  # patches of an image of 672 x 896 pixels


COLUMNS = {
    "kNN, trunk": ("knn",),
    "kNN, dense": ("knn", "--features", "dense"),
    "linear, trunk": ("linear", "--steps", "60", "--check_every", "60", "--batch_size", "8", "--lr", "1e-2"),
    "panoptic, PQ": ("panoptic",),
}


def rows(student: Path) -> dict[str, str]:
    """Return the arguments of each row."""
    return {
        "single pass, before": "--weights tiny",
        "single pass with windowed attention, before": "--weights tiny --attention windowed",
        "sliding window (teacher)": "--weights tiny --inference sliding --stride 16",
        "single pass, after (SPAR)": f"--weights {student}",
    }


def render_benchmark(seed: int, folder: Path) -> Path:
    """Write training and validation images with labels, and the YAML file, unless they exist."""
    path = folder / "benchmark.yaml"
    if path.exists():
        return path
    for split, count in (("train", TRAIN), ("val", VAL)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            scene = render(seed, FIRST + i + TRAIN * (split == "val"), SIDE, SIDE)
            for kind, pixels in (("images", scene.image), ("labels", scene.labels)):
                Image.fromarray(pixels).save(folder / split / kind / f"{i:04d}.png", compress_level=1)
    content = {
        "classes": [{"label": name, "names": [name]} for name in CLASSES],
        "images": "val/images/{}.png",
        "labels": [{"file": "val/labels/{}.png"}],
        "train": {"val/": "train/"},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def accuracy(seed: int, runs: Path) -> list[list[str]]:
    """Return the mIoU of all rows for a seed."""
    student = runs / f"quickstart-seed-{seed}"
    benchmark = render_benchmark(seed, runs / f"probe-scenes-{seed}")
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


def cost(patches: int) -> dict[str, float]:
    """Fill a memory bank with random patches and label an image; return seconds and bytes."""
    torch.set_num_threads(os.cpu_count() or 1)
    generator = torch.Generator().manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bank = MemoryBank(patches, WIDTH, NAMES)
    for start in range(0, patches, QUERIES):
        count = min(QUERIES, patches - start)
        counts = torch.zeros(count, NAMES, dtype=torch.long)
        counts[:, start % NAMES] = 256
        bank.add(torch.randn(count, WIDTH, generator=generator), counts)
    queries = torch.randn(QUERIES, WIDTH, generator=generator)
    times = []
    for _ in range(3):
        start_time = time.perf_counter()
        bank.label(queries, 30, 0.02)
        times.append(time.perf_counter() - start_time)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    size = MemoryBank.bytes_of(patches, WIDTH, NAMES)
    return {"seconds": statistics.median(times), "peak": peak, "size": size}


def costs(runs: Path) -> list[list[str]]:
    """Return the table of cost by the size of the memory bank, each size in a process of its own."""
    path = runs / "probe-cost.json"
    if not path.exists():
        found = {}
        for patches in SIZES:
            code = f"import json; from scripts.measure_probes import cost; print(json.dumps(cost({patches})))"
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.PIPE, text=True
            )
            found[patches] = json.loads(done.stdout)
        path.write_text(json.dumps(found))
    lines = [["patches", "bank", "peak memory", "seconds per image", "seconds per image and million patches"]]
    for patches, row in json.loads(path.read_text()).items():
        memory = [bytes_text(row["size"]), bytes_text(row["peak"])]
        lines.append(
            [f"{int(patches):,}", *memory, f"{row['seconds']:.1f}", f"{1e6 * row['seconds'] / int(patches):.1f}"]
        )
    return lines


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
        (args.runs / "probe-cost.json").unlink(missing_ok=True)
    head = ["seed", "inference", *COLUMNS]
    table = markdown([head, *(row for seed in args.seeds for row in accuracy(seed, args.runs))])
    template = (ROOT / "scripts" / "probes_page.md").read_text()
    text = template.format(
        accuracy=table,
        cost=markdown(costs(args.runs)),
        train=TRAIN,
        val=VAL,
        side=SIDE,
        queries=QUERIES,
        width=WIDTH,
        names=NAMES,
        hardware=f"{platform.machine()}, {os.cpu_count()} CPU cores, CUDA devices: {torch.cuda.device_count()}",
        packages=", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning")),
    )
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
