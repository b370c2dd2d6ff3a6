"""Benchmark of the growth of time with the number of pixels, windows and classes.

    python benchmarks/growth.py

Each is measured at five sizes, fitted, and compared with theory. The network has random weights and runs on the GPU if
there is one. Sizes are interleaved, so that machine noise affects all of them equally; each row is a median. For the
growth with the number of ranks, see `python benchmarks/building.py`, which uses two processes.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from spar_lightning.backbones import Backbone, SigLIP2
from spar_lightning.evaluation.timing import now
from spar_lightning.formatting import markdown
from spar_lightning.segmentation.label_map import StoredMaps, Thresholds, label_map
from spar_lightning.sliding_window import SlidingWindow

SIDES = (256, 384, 512, 768, 1024)  # sides of square images in pixels
WINDOWS = (1, 2, 3, 4, 6)
CLASSES = (10, 50, 150, 400, 1000)
LABELS = (512, 1024)  # height and width of the segmentation map in pixels


def medians(work: Mapping[int, Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """Return the median seconds of each function. Runs are interleaved, the first repeat is a warm-up."""
    times: dict[int, list[float]] = {size: [] for size in work}
    for turn in range(rounds + 1):
        for size, run in work.items():
            start = now(device)
            run()
            if turn:
                times[size].append(now(device) - start)
    return [statistics.median(values) for values in times.values()]


def fit(columns: list[NDArray[np.float64]], seconds: list[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit coefficients of the columns by least squares of the relative error; return them and the fitted seconds."""
    matrix, target = np.stack(columns, axis=1), np.array(seconds)
    coefficients, *_ = np.linalg.lstsq(matrix / target[:, None], np.ones(len(target)), rcond=None)
    return coefficients, matrix @ coefficients


def table(name: str, sizes: tuple[int, ...], seconds: list[float], fitted: NDArray[np.float64]) -> str:
    """Return a Markdown table with one row per size."""
    rows = [
        [f"{size:,}", f"{1000 * s:,.0f}", f"{1000 * f:,.0f}"]
        for size, s, f in zip(sizes, seconds, fitted.tolist(), strict=True)
    ]
    return markdown([[name, "ms", "fit"], *rows])


def pixels(backbone: Backbone, rounds: int, device: torch.device) -> None:
    """Measure one pass over the whole image. Linear layers grow with the patches, attention with their square."""
    images = {side: torch.randn(1, 3, side, side, device=device) for side in SIDES}
    seconds = medians({side: partial(backbone, image) for side, image in images.items()}, rounds, device)
    patches = np.array([(side // backbone.patch_size) ** 2 for side in SIDES], np.float64)
    (linear, square), fitted = fit([patches, patches**2], seconds)
    print(f"\n{table('patches', tuple(patches.astype(int).tolist()), seconds, fitted)}")
    equal = 1 / (6 * backbone.embed_dim)  # per block: 4 N^2 D operations of attention, 24 N D^2 of linear layers
    print(
        f"ms = {1000 * linear:.3g} N + {1000 * square:.3g} N^2: attention costs as much as the rest at "
        f"{linear / square:,.0f} patches; theory, at equal rates: {1 / equal:,.0f}"
    )


def windows(backbone: Backbone, rounds: int, device: torch.device) -> None:
    """Measure the teacher, whose time grows with the number of windows."""
    teacher = SlidingWindow(backbone, stride=16, batch_size=1)  # one window per batch avoids partial batches
    images = {n: torch.randn(1, 3, teacher.window, teacher.window + 16 * (n - 1), device=device) for n in WINDOWS}
    seconds = medians({n: partial(teacher, image) for n, image in images.items()}, rounds, device)
    count = np.array(WINDOWS, np.float64)
    (rest, each), fitted = fit([np.ones_like(count), count], seconds)
    print(f"\n{table('windows', WINDOWS, seconds, fitted)}")
    print(f"ms = {1000 * rest:.3g} + {1000 * each:.4g} per window; theory: proportional to the windows")


def classes(rounds: int, device: torch.device) -> None:
    """Measure the step from similarities to labels, whose time grows with the number of similarity maps."""
    grid = (LABELS[0] // 16, LABELS[1] // 16)
    maps = {n: F.normalize(torch.randn(n, *grid, device=device), dim=0) for n in CLASSES}
    owners = {n: torch.arange(n, device=device) for n in CLASSES}
    work = {n: partial(label_map, StoredMaps(maps[n]), owners[n], LABELS, Thresholds()) for n in CLASSES}
    seconds = medians(work, rounds, device)
    count = np.array(CLASSES, np.float64)
    (rest, each), fitted = fit([np.ones_like(count), count], seconds)
    print(f"\n{table('classes', CLASSES, seconds, fitted)}")
    print(f"ms = {1000 * rest:.3g} + {1000 * each:.3g} per class, on {LABELS[0]} x {LABELS[1]} pixels")


@torch.no_grad()
def main() -> None:
    """Run all measurements and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16-SigLIP2-512")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = SigLIP2(given.model, pretrained=None).to(device)
    pixels(backbone, given.repeats, device)
    windows(backbone, given.repeats, device)
    classes(given.repeats, device)


if __name__ == "__main__":
    main()
