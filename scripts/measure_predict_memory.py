"""Measure the memory of `spar predict` and `spar index` for a very large image, and of a segmenter over many calls.

    python scripts/measure_predict_memory.py [--side 20000] [--calls 1800]

1. `spar predict --max_side 1024` segments a small image and a square one of `side` pixels in processes of their own.
   The peak resident memory is compared with the decoded image, 3 bytes per pixel.
2. `spar predict` and `spar index` process an image of one block and the large image, both with `--block_size 1024`. The
   difference of the peaks is what a large image takes above the network.
3. One segmenter segments images of 60 sizes in turn, and then as many of new sizes. Resident memory is read after each
   tenth of the calls. New sizes leave gaps in the memory that malloc keeps, so it is also read after malloc_trim.

The script exits with status 1 if the large image takes more than 2 GiB above the decoded image (1) or above the network
(2), or if memory grows by more than 5 % after the first tenth of the calls (with new sizes: after malloc_trim).
"""

import argparse
import ctypes
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import spar_lightning as spar
from spar_lightning.formatting import bytes_text, markdown

ALLOWED = 2 * 2**30  # bytes
GROWTH = 1.05
CLASSES = ("--classes", "red dot; blue dot; plain")
RUN = """
import sys
from pathlib import Path
from spar_lightning.cli import main
assert main(sys.argv[1:]) == 0
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""  # ru_maxrss would also cover the parent process


def write(path: Path, side: int) -> None:
    """Write a square image with gradients and stripes."""
    row, column = np.ogrid[:side, :side]
    channels = [(row % 251).astype(np.uint8), (column % 241).astype(np.uint8), ((row // 64 + column // 64) % 2) * 200]
    Image.MAX_IMAGE_PIXELS = None
    pixels = np.empty((side, side, 3), np.uint8)
    for i, channel in enumerate(channels):
        pixels[..., i] = channel
    Image.fromarray(pixels).save(path)


def peak(command: str, images: Path, *options: str) -> int:
    """Return the peak resident memory in bytes of `spar predict` or `spar index` on an image or a folder."""
    args = [command, str(images), "--weights", "tiny", *options]
    said = subprocess.run([sys.executable, "-c", RUN, *args], check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(said.split()[-2]) * 1024


def shrunk(folder: Path, side: int) -> tuple[list[list[str]], list[int]]:
    """Measure `--max_side` and return the rows of a table, and the excess over the decoded images in bytes."""
    rows, excess = [["predict --max_side 1024", "decoded", "peak", "above the decoded image"]], []
    for length in (256, side):
        for suffix in ("jpg", "png"):
            image, out = folder / f"{length}.{suffix}", folder / f"out-{length}-{suffix}"
            write(image, length)
            found = peak("predict", image, *CLASSES, "--max_side", "1024", "--out", str(out))
            assert Image.open(out / "labels" / f"{length}.png").size == (length, length)
            excess.append(found - 3 * length**2)
            name = f"{length} x {length}, {suffix}"
            rows.append([name, *map(bytes_text, (3 * length**2, found, excess[-1]))])
            print(rows[-1], flush=True)
    return rows, excess


def divided(folder: Path, side: int) -> tuple[list[list[str]], list[int]]:
    """Measure `--block_size` and return the rows of a table, and the excess over the network in bytes."""
    rows, excess = [["--block_size 1024", "network", "peak", "above the network"]], []
    options = ("--attention", "windowed", "--block_size", "1024")
    for command, suffix in (("predict", "png"), ("predict", "tif"), ("index", "tif")):
        found = []
        for length in (1024, side):
            images, out = folder / f"{length}-{suffix}", folder / f"out-{command}-{length}-{suffix}"
            images.mkdir(exist_ok=True)
            write(images / f"{length}.{suffix}", length)
            classes = CLASSES if command == "predict" else ()
            found.append(peak(command, images, *classes, *options, "--out", str(out)))
        excess.append(found[1] - found[0])
        rows.append([f"{command}, {side} x {side}, {suffix}", *map(bytes_text, (*found, excess[-1]))])
        print(rows[-1], flush=True)
    return rows, excess


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def calls(count: int, sizes: int) -> tuple[list[int], int]:
    """Segment `count` images of `sizes` sizes.

    Returns:
        Resident memory after each tenth of the calls, and at the end after malloc has returned what it does not use.
    """
    segmenter = spar.load("tiny", classes=["red dot", "blue dot", "plain"])
    generator, found = torch.Generator().manual_seed(sizes), []
    shapes = torch.randint(32, 400, (sizes, 2), generator=generator).tolist()
    for i in range(count):
        height, width = shapes[i % sizes]
        segmenter(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))
        if (i + 1) % (count // 10) == 0:
            found.append(resident())
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return found, resident()


def main() -> int:
    """Print both tables and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=20000, help="side of the large image; 0: only the calls")
    parser.add_argument("--calls", type=int, default=1800, help="calls of the segmenter")
    given = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    excess = []
    if given.side:
        with tempfile.TemporaryDirectory() as folder:
            for measure in (shrunk, divided):
                rows, found = measure(Path(folder), given.side)
                excess += found
                print(markdown(rows))
    fixed, trimmed = calls(given.calls, 60)
    print(f"\n{given.calls} calls, 60 sizes: {', '.join(map(bytes_text, fixed))}; trimmed {bytes_text(trimmed)}")
    new, after = calls(given.calls, given.calls)
    print(f"{given.calls} calls, new sizes: {', '.join(map(bytes_text, new))}; trimmed {bytes_text(after)}")
    grown = max(fixed[1:]) > GROWTH * fixed[0] or after > GROWTH * max(trimmed, fixed[0])
    return int(max(excess, default=0) > ALLOWED or grown)


if __name__ == "__main__":
    sys.exit(main())
