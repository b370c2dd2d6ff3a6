"""Measure time and peak memory of segmentation and metrics beyond those of the network.

    python scripts/measure_label_map.py                      # 150 classes, 2048 x 2048, single-pass and sliding
    python scripts/measure_label_map.py --classes 21 59 150 459 847 --stride 256
    python scripts/measure_label_map.py --side 256 512 1024 1536 2048 --stride 256
    python scripts/measure_label_map.py --images 500 1000 2000 5000 10000 --classes 171

Each number is that of a separate process. One process runs the network alone, with the same windows and batches as the
segmentation; the other segments an image and adds it to the metrics. The network is a convolution with the dimensions
of SigLIP2 ViT-B/16 at 512 px (patch 16, 768 channels), so that segmentation dominates the measurement.

With --images, no network runs: label maps of 64 x 64 pixels with 8 classes each are added to the metrics, and the
results with their intervals are computed.
"""

import argparse
import subprocess
import sys
import time
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from spar_lightning.backbones import Tiny
from spar_lightning.evaluation import bootstrap
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.timing import Peak
from spar_lightning.formatting import markdown
from spar_lightning.segmentation.config import Inference, InferenceConfig
from spar_lightning.segmentation.prompts import TextClassifier
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.sliding_window import SlidingWindow


class Convolution(Tiny):
    """Convolution from patches of 16 x 16 pixels to 768 channels, with a window of 512 pixels."""

    patch_size, window, embed_dim = 16, 512, 768

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.conv = nn.Conv2d(3, 768, 16, stride=16)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, h, w, 768) of images (B, 3, H, W)."""
        features: Tensor = self.conv(images).permute(0, 2, 3, 1)
        return features


@torch.no_grad()
def work(what: str, inference: Inference, classes: int, side: int, stride: int) -> None:
    """Segment, or run the network alone, and print the peak memory in MiB and the seconds."""
    torch.manual_seed(0)
    network = Convolution()
    image = torch.randint(256, (3, side, side), dtype=torch.uint8)
    text = nn.functional.normalize(torch.randn(classes, 768), dim=-1)
    classifier = TextClassifier(tuple(map(str, range(classes))), text, torch.arange(classes))
    segmenter = Segmenter(network, classifier, InferenceConfig(inference, stride))
    memory, start = Peak(torch.device("cpu")), time.perf_counter()
    if what == "segment":
        labels = torch.randint(classes, (side, side), dtype=torch.int16)
        ConfusionMatrix(classes).update(segmenter(image), labels, 0)
    elif inference == "single":
        network(segmenter.pixels(image)[None])
    else:
        for _ in SlidingWindow(network, stride).maps(segmenter.pixels(image)):
            pass
    print(memory.mebibytes(), time.perf_counter() - start)


def count(images: int, classes: int) -> None:
    """Add images to the metrics, compute the results, and print the peak memory in MiB and the seconds of both."""
    rng = np.random.default_rng(0)
    counts, memory, start = ConfusionMatrix(classes), Peak(torch.device("cpu")), time.perf_counter()
    for i in range(images):
        present = rng.integers(0, classes, 8)
        predicted, labels = (torch.from_numpy(present[rng.integers(0, 8, (64, 64))]) for _ in range(2))
        counts.update(predicted, labels.short(), i)
    counted = time.perf_counter()
    result = counts.results()
    dense = bootstrap.dense(torch.cat(counts.per_image).numpy(), images, classes)[..., :3]
    bootstrap.Interval.of_miou(result.miou, bootstrap.miou_draws(dense, 0))
    print(memory.mebibytes(), counted - start, time.perf_counter() - counted)


def run(*work: str) -> list[float]:
    """Return what a process of this script prints."""
    command = [sys.executable, __file__, "--work", *work]
    return [float(n) for n in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def main() -> None:
    """Measure all cases in separate processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[150])
    parser.add_argument("--side", type=int, nargs="+", default=[2048], help="side of the square image in pixels")
    parser.add_argument("--stride", type=int, default=24, help="stride of the sliding windows in pixels")
    parser.add_argument("--images", type=int, nargs="+", default=[], help="measure the metrics of so many images")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        what, *sizes = args.work
        if what == "count":
            count(*map(int, sizes))
        else:
            inference, *numbers = sizes
            work(what, inference, *map(int, numbers))
        return
    if args.images:
        base, *_ = run("count", "1", str(args.classes[0]))
        lines = [["images", "MiB above one image", "ms per image", "results and interval, s"]]
        for images in args.images:
            peak, counting, results = run("count", str(images), str(args.classes[0]))
            lines.append([str(images), f"{peak - base:.0f}", f"{1000 * counting / images:.2f}", f"{results:.2f}"])
        print(f"{args.classes[0]} classes\n\n{markdown(lines)}")
        return
    head = ["classes", "pixels", "inference", "network alone, MiB", "with segmentation, MiB", "above the network, MiB"]
    lines = [[*head, "network alone, s", "with segmentation, s"]]
    for classes, side in product(args.classes, args.side):
        for inference in ("single", "sliding"):
            sizes = (inference, str(classes), str(side), str(args.stride))
            (alone, network), (peak, seconds) = (run(what, *sizes) for what in ("network", "segment"))
            memory = [f"{alone:.0f}", f"{peak:.0f}", f"{peak - alone:.0f}"]
            lines.append([str(classes), f"{side} x {side}", inference, *memory, f"{network:.1f}", f"{seconds:.1f}"])
    print(f"stride {args.stride}\n\n{markdown(lines)}")


if __name__ == "__main__":
    main()
