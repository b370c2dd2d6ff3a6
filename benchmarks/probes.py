"""Benchmark of the growth of the probes' time and memory with the number of images and of patches.

    python -m benchmarks.probes                # about 30 minutes on two cores
    python -m benchmarks.probes --repeats 1

Whole `spar probe` commands with `Tiny` and windowed attention on synthetic images, each at five sizes. Sizes are
interleaved, so that machine noise affects all of them equally; each row is a median. Start-up is part of the time. The
search for nearest neighbors is measured alone, too, with features as wide as those of a ViT-B.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.growth import fit
from scripts.measure_probes import render_benchmark
from spar_lightning.evaluation.timing import Peak
from spar_lightning.formatting import bytes_text, markdown
from spar_lightning.probes.memory_bank import MemoryBank

IMAGES, SIDE = (64, 128, 256, 512, 1024), 128  # images of SIDE x SIDE pixels
SIDES, FEW = (64, 128, 256, 512, 768), 8  # FEW images of each side in pixels
FIXED = 8  # images that are evaluated after training, or after the memory bank is filled
PATCH = 8

BANKS = (62_500, 125_000, 250_000, 500_000, 1_000_000)  # patches in the memory bank
WIDTH, NAMES = 768, 150  # ViT-B on ADE20K
QUERIES = 2352  # patches of an image of 672 x 896 pixels
MEASURED = """import sys
import torch
from spar_lightning.cli import main
from spar_lightning.evaluation.timing import Peak
peak = Peak(torch.device("cpu"))
status = main()
print(peak.mebibytes())
sys.exit(status)"""


def run(probe: str, images: int, side: int) -> tuple[float, int]:
    """Run a probe on some images; return seconds and the peak memory of its process in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, val = (0, images) if probe == "panoptic" else (images, FIXED)
        path = render_benchmark(folder, 0, 0, train, val, side)
        options = ["--weights", "tiny", "--attention", "windowed", "--benchmark", str(path), "--num_workers", "0"]
        if probe == "linear":  # every training image once
            steps = str(images // 8)
            options += ["--batch_size", "8", "--steps", steps, "--check_every", steps]
        command = ["probe", probe, *options, "--out", str(folder / "out")]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", MEASURED, *command], stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"spar {' '.join(command)} failed with status {done.returncode}.")
        return seconds, round(2**20 * float(done.stdout.split()[-1]))


def growth(probe: str, unit: str, sizes: dict[int, tuple[int, int]], repeats: int, power: int) -> None:
    """Print time and memory of a probe by size; `sizes` has the number and the side of the images of each."""
    found: dict[int, list[tuple[float, int]]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size, arguments in sizes.items():
            found[size].append(run(probe, *arguments))
    seconds = [statistics.median(time for time, _ in rows) for rows in found.values()]
    memory = [max(peak for _, peak in rows) for rows in found.values()]
    count = np.array(list(sizes), np.float64)
    columns = [np.ones_like(count), *(count**exponent for exponent in range(1, power + 1))]
    coefficients, fitted = fit(columns, seconds)
    rows = [
        [f"{size:,}", f"{spent:.1f}", f"{expected:.1f}", bytes_text(peak)]
        for size, spent, expected, peak in zip(sizes, seconds, fitted.tolist(), memory, strict=True)
    ]
    print(f"\n{probe}\n\n{markdown([[unit, 'seconds', 'fit', 'peak memory'], *rows])}")
    names = ("", f" per 1,000 {unit}", f" per 1,000,000 {unit} squared")
    terms = (f"{1000**i * value:.3g} s{names[i]}" for i, value in enumerate(coefficients))
    print(f"fit: {' + '.join(terms)}", flush=True)


def search(patches: int) -> None:
    """Fill a memory bank with random patches and label an image; print seconds and the peak memory of that in bytes."""
    generator = torch.Generator().manual_seed(0)
    memory = Peak(torch.device("cpu"))
    before = memory.mebibytes()
    bank = MemoryBank(patches, WIDTH, NAMES)
    for start in range(0, patches, QUERIES):
        count = min(QUERIES, patches - start)
        counts = torch.zeros(count, NAMES, dtype=torch.long)
        counts[:, start % NAMES] = 256
        bank.add(torch.randn(count, WIDTH, generator=generator), counts)
    queries = torch.randn(QUERIES, WIDTH, generator=generator)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        bank.label(queries, 30, 0.02)
        times.append(time.perf_counter() - started)
    after = memory.mebibytes()
    assert before is not None
    assert after is not None
    print(statistics.median(times), round(2**20 * (after - before)))


def banks() -> None:
    """Print time and memory of the search by the size of the memory bank, each size in a process of its own."""
    lines = [["patches", "bank", "peak memory", "seconds per image", "seconds per image and million patches"]]
    for patches in BANKS:
        command = [sys.executable, "-m", "benchmarks.probes", "--search", str(patches)]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds, peak = (float(number) for number in text.split())
        memory = [bytes_text(MemoryBank.bytes_of(patches, WIDTH, NAMES)), bytes_text(round(peak))]
        lines.append([f"{patches:,}", *memory, f"{seconds:.1f}", f"{1e6 * seconds / patches:.1f}"])
    print(f"\nsearch for nearest neighbors\n\n{markdown(lines)}", flush=True)


def main() -> None:
    """Run all measurements and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probes", nargs="+", default=["linear", "knn", "panoptic"])
    parser.add_argument("--search", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.search:
        search(given.search)
        return
    banks()
    for probe in given.probes:
        growth(probe, "images", {n: (n, SIDE) for n in IMAGES}, given.repeats, 1)
        # Each patch of an image is compared with all patches of the bank.
        power = 2 if probe == "knn" else 1
        growth(probe, "patches", {FEW * (side // PATCH) ** 2: (FEW, side) for side in SIDES}, given.repeats, power)


if __name__ == "__main__":
    main()
