"""Measure the peak memory of segmentation beyond that of the network, for many classes and a large image.

    python scripts/measure_label_map.py                      # 150 classes, 2048 x 2048, single-pass and sliding
    python scripts/measure_label_map.py --classes 1000 --stride 128

Each number is the peak of a separate process. One process runs the network alone, with the same windows and batches as
the segmentation; the other segments. The network is a convolution with the dimensions of SigLIP2 ViT-B/16 at 512 px
(patch 16, 768 channels), so that segmentation dominates the measurement.
"""

import argparse
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

from spar_lightning.backbones import Tiny
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
        segmenter(image)
    elif inference == "single":
        network(segmenter.pixels(image)[None])
    else:
        for _ in SlidingWindow(network, stride).maps(segmenter.pixels(image)):
            pass
    print(memory.mebibytes(), time.perf_counter() - start)


def main() -> None:
    """Measure all cases in separate processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--side", type=int, default=2048, help="side of the square image in pixels")
    parser.add_argument("--stride", type=int, default=24, help="stride of the sliding windows in pixels")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = ["--classes", str(args.classes), "--side", str(args.side), "--stride", str(args.stride)]
    if args.work:
        work(args.work[0], args.work[1], args.classes, args.side, args.stride)
        return
    lines = [["inference", "network alone, MiB", "segmentation, MiB", "above the network, MiB", "seconds"]]
    for inference in ("single", "sliding"):
        measured = []
        for what in ("network", "segment"):
            command = [sys.executable, __file__, "--work", what, inference, *sizes]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured.append([float(number) for number in out.split()])
        (alone, _), (peak, seconds) = measured
        lines.append([inference, f"{alone:.0f}", f"{peak:.0f}", f"{peak - alone:.0f}", f"{seconds:.1f}"])
    print(f"{args.classes} classes, {args.side} x {args.side} pixels, stride {args.stride}\n\n{markdown(lines)}")


if __name__ == "__main__":
    main()
