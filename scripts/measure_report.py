"""Measure report.html with many images: size, memory, and time to first paint in headless Chromium.

    python scripts/measure_report.py            # 12, 50, 125, 250 and 500 images of 640 x 480 pixels
    python scripts/measure_report.py --images 1000

Needs playwright and the Chromium of the system. Images are photographs of scikit-image, labels are 21 classes in bands.
First paint is the first content that is visible, counted from the start of navigation.
"""

import argparse
import json
import resource
import shutil
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from playwright.sync_api import sync_playwright
from skimage import data
from torch import Tensor

from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.gallery import pictures
from spar_lightning.evaluation.html_report import evaluation_page
from spar_lightning.formatting import bytes_text, markdown

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
CLASSES = [f"class {i}" for i in range(21)]
REPEATS = 3


def benchmark(folder: Path, images: int) -> Benchmark:
    """Return a benchmark of different parts of photographs."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    photographs = [Image.fromarray(getattr(data, name)()).resize((900, 700)) for name in PHOTOGRAPHS]
    for i in range(images):
        left, top = rng.integers(0, 200, 2)
        photographs[i % 4].crop((left, top, left + 640, top + 480)).save(folder / "images" / f"{i}.jpg")
        cells = rng.integers(0, 21, (12, 16)).astype(np.uint8)
        Image.fromarray(np.kron(cells, np.ones((40, 40), np.uint8))).save(folder / "labels" / f"{i}.png")
    classes = [{"label": label, "names": [label]} for label in CLASSES]
    (folder / "benchmark.yaml").write_text(yaml.safe_dump({"classes": classes}))
    made = Benchmark(str(folder))
    made.open()
    return made


def segmented(pixels: Tensor) -> Tensor:
    """Return 21 classes by brightness, with as many small regions as a real segmentation map has."""
    gray = torch.nn.functional.avg_pool2d(pixels.float().mean(0)[None], 9, 1, 4)[0]
    return (gray * 21 / 256).long()


def main() -> None:
    """Measure all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[12, 50, 125, 250, 500])
    args = parser.parse_args()
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    lines = [["images", "page", "Python, peak MiB", "first paint, ms", "complete, ms", "JavaScript heap, MiB"]]
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        whole = benchmark(folder / "mine", max(args.images))
        counts = np.ones((len(whole), 21, 3))
        groups = {"best": list(range(len(whole)))}
        drawn = pictures(whole, segmented, counts, groups, torch.device("cpu"), nullcontext)
        row: dict[str, Any] = {
            "mIoU": 50.0, "mIoU_interval": [45.0, 55.0], "pixel_accuracy": 70.0, "ms_per_image": 2.0, "shipped": False,
            "IoU": dict.fromkeys(CLASSES, 50.0), "counts": "counts/mine.npz", "protocol": {"hash": ""},
        }  # fmt: skip
        (folder / "gallery").mkdir()
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for images in sorted(args.images):
            (folder / "gallery" / "mine.json").write_text(json.dumps({"count": images, "images": drawn[:images]}))
            content = {"model": {"family": "Tiny"}, "protocol": {"inference": "single"}}
            text = evaluation_page(folder, {**content, "benchmarks": {"mine": {**row, "images": images}}})
            path = folder / "report.html"
            path.write_text(text)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            found = []
            for _ in range(REPEATS):
                page = browser.new_page()
                page.goto(path.as_uri())
                page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
                found.append(page.evaluate(
                    "[performance.getEntriesByName('first-contentful-paint')[0].startTime,"
                    " performance.timing.loadEventEnd - performance.timing.navigationStart,"
                    " performance.memory.usedJSHeapSize / 2**20]"
                ))  # fmt: skip
                page.close()
            medians = [f"{statistics.median(values):.0f}" for values in zip(*found, strict=True)]
            lines.append([str(images), bytes_text(path.stat().st_size), f"{peak:.0f}", *medians])
        print(f"Chromium {browser.version}, median of {REPEATS}\n\n{markdown(lines)}")


if __name__ == "__main__":
    main()
