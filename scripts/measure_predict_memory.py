"""Measure the memory of `spar predict` for a very large image, and of a segmenter over many calls.

    python scripts/measure_predict_memory.py [--side 20000] [--calls 1800]

1. `spar predict --max_side 1024` segments a small image and a square one of `side` pixels in processes of their own.
   The peak resident memory is compared with the decoded image, 3 bytes per pixel.
2. One segmenter segments images of 60 sizes in turn, and then as many of new sizes. Resident memory is read after each
   tenth of the calls. New sizes leave gaps in the memory that malloc keeps, so it is also read after malloc_trim.

The script exits with status 1 if the large image takes more than 2 GiB above the decoded image, or if memory grows by
more than 5 % after the first tenth of the calls (with new sizes: after malloc_trim).
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
FORMATS = ("jpg", "png")
PREDICT = """
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


def peak(image: Path, out: Path) -> int:
    """Return the peak resident memory in bytes of `spar predict` on one image."""
    args = ["predict", str(image), "--weights", "tiny", "--classes", "red dot; blue dot; plain", "--max_side", "1024"]
    command = [sys.executable, "-c", PREDICT, *args, "--out", str(out)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert Image.open(out / "labels" / f"{image.stem}.png").size == Image.open(image).size
    return int(said.split()[-2]) * 1024


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
    rows, excess = [["image", "decoded", "peak", "above the decoded image"]], []
    with tempfile.TemporaryDirectory() as folder:
        for side in (256, given.side) if given.side else ():
            for suffix in FORMATS:
                image, decoded = Path(folder) / f"{side}.{suffix}", 3 * side**2
                write(image, side)
                found = peak(image, Path(folder) / f"out-{side}-{suffix}")
                excess.append(found - decoded)
                name = f"{side} x {side}, {suffix}"
                rows.append([name, bytes_text(decoded), bytes_text(found), bytes_text(found - decoded)])
                print(rows[-1], flush=True)
    print(markdown(rows))
    fixed, trimmed = calls(given.calls, 60)
    print(f"\n{given.calls} calls, 60 sizes: {', '.join(map(bytes_text, fixed))}; trimmed {bytes_text(trimmed)}")
    new, after = calls(given.calls, given.calls)
    print(f"{given.calls} calls, new sizes: {', '.join(map(bytes_text, new))}; trimmed {bytes_text(after)}")
    grown = max(fixed[1:]) > GROWTH * fixed[0] or after > GROWTH * max(trimmed, fixed[0])
    return int(max(excess, default=0) > ALLOWED or grown)


if __name__ == "__main__":
    sys.exit(main())
