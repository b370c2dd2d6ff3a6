"""How cost grows with pixels, windows and classes: measured at five sizes, fitted, compared with theory.

    python benchmarks/growth.py

A network with random weights on this machine's CPU or GPU. Sizes take turns, so that the machine's moods fall on
all; a row is a median. With ranks it grows as `python benchmarks/building.py` shows for two processes.
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

SIDES = (256, 384, 512, 768, 1024)  # pixels of square images
WINDOWS = (1, 2, 3, 4, 6)
CLASSES = (10, 50, 150, 400, 1000)
LABELS = (512, 1024)  # pixels of the label map


def medians(work: Mapping[int, Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """Seconds of each, by turns; the first round does not count."""
    times: dict[int, list[float]] = {size: [] for size in work}
    for turn in range(rounds + 1):
        for size, run in work.items():
            start = now(device)
            run()
            if turn:
                times[size].append(now(device) - start)
    return [statistics.median(values) for values in times.values()]


def fit(columns: list[NDArray[np.float64]], seconds: list[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients that are least wrong in relative terms, and what they say."""
    matrix, target = np.stack(columns, axis=1), np.array(seconds)
    coefficients, *_ = np.linalg.lstsq(matrix / target[:, None], np.ones(len(target)), rcond=None)
    return coefficients, matrix @ coefficients


def table(name: str, sizes: tuple[int, ...], seconds: list[float], fitted: NDArray[np.float64]) -> str:
    """A row for each size."""
    rows = [
        [f"{size:,}", f"{1000 * s:,.0f}", f"{1000 * f:,.0f}"]
        for size, s, f in zip(sizes, seconds, fitted.tolist(), strict=True)
    ]
    return markdown([[name, "ms", "fit"], *rows])


def pixels(backbone: Backbone, rounds: int, device: torch.device) -> None:
    """One pass over the whole image: linear layers grow with the patches, attention with their square."""
    images = {side: torch.randn(1, 3, side, side, device=device) for side in SIDES}
    seconds = medians({side: partial(backbone, image) for side, image in images.items()}, rounds, device)
    patches = np.array([(side // backbone.patch_size) ** 2 for side in SIDES], np.float64)
    (linear, square), fitted = fit([patches, patches**2], seconds)
    print(f"\n{table('patches', tuple(patches.astype(int).tolist()), seconds, fitted)}")
    equal = 1 / (6 * backbone.embed_dim)  # 4 N^2 D against 24 N D^2 operations of a block
    print(
        f"ms = {1000 * linear:.3g} N + {1000 * square:.3g} N^2: attention costs as much as the rest at "
        f"{linear / square:,.0f} patches; at the same rate it would at {1 / equal:,.0f}"
    )


def windows(backbone: Backbone, rounds: int, device: torch.device) -> None:
    """The teacher: so many times one window."""
    teacher = SlidingWindow(backbone, stride=16, batch_size=1)  # a batch of its own for each: no partial ones
    images = {n: torch.randn(1, 3, teacher.window, teacher.window + 16 * (n - 1), device=device) for n in WINDOWS}
    seconds = medians({n: partial(teacher, image) for n, image in images.items()}, rounds, device)
    count = np.array(WINDOWS, np.float64)
    (rest, each), fitted = fit([np.ones_like(count), count], seconds)
    print(f"\n{table('windows', WINDOWS, seconds, fitted)}")
    print(f"ms = {1000 * rest:.3g} + {1000 * each:.4g} per window; theory: nothing but the windows")


def classes(rounds: int, device: torch.device) -> None:
    """From cosines to labels: so many maps of the size of the image."""
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
    """Measure and print."""
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
