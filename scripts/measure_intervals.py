"""Measure how often confidence intervals contain the true value, on simulated benchmarks (docs/evaluation.md).

    python scripts/measure_intervals.py            # 500 benchmarks for each case

The simulated images are those of tests/evaluation/test_bootstrap.py: 5 common classes, or many classes of which class k
occurs in a fraction of 1.2 / k of the images. The true value is that of all 8000 images.
"""

import argparse

import numpy as np

from spar_lightning.evaluation.bootstrap import Interval, iou, resampled
from spar_lightning.formatting import markdown
from tests.evaluation.test_bootstrap import population, rare

CASES = [(classes, images) for classes in (5, 60, 150) for images in (50, 200, 1000)]
DRAWS = 500


def main() -> None:
    """Simulate all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", type=int, default=500, help="simulated benchmarks for each case")
    args = parser.parse_args()
    lines = [["classes", "images", "difference", "single result"]]
    for classes, images in CASES:
        rng = np.random.default_rng(classes)
        everything = np.stack(population(8000, rng) if classes == 5 else rare(8000, rng, classes), axis=1)
        truth = np.nanmean(iou(everything.sum(0)), axis=-1)  # (2,)
        covered = np.zeros(2)
        for seed in range(args.benchmarks):
            counts = everything[rng.integers(0, len(everything), images)]
            miou = np.nanmean(iou(counts.sum(0)), axis=-1)
            draws = np.nanmean(resampled(counts, seed, DRAWS), axis=-1)  # (DRAWS, 2)
            difference = Interval.of(miou[1] - miou[0], draws[:, 1] - draws[:, 0])
            assert difference is not None
            single = Interval.of_miou(miou[0], draws[:, 0])
            values = (truth[1] - truth[0], truth[0])
            covered += [
                interval.low <= value <= interval.high
                for value, interval in zip(values, (difference, single), strict=True)
            ]
        shares = [f"{100 * share:.1f} %" for share in covered / args.benchmarks]
        lines.append([str(classes), str(images), *shares])
        print(" | ".join(lines[-1]), flush=True)
    print(f"\n{args.benchmarks} simulated benchmarks, {DRAWS} draws\n\n{markdown(lines)}")


if __name__ == "__main__":
    main()
