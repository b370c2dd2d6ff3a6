"""Measure queries of stored features against running the network: 1,000 images and 50 classes.

    python scripts/measure_query.py            # 10 minutes on two cores
    python scripts/measure_query.py --images 100

The network is a ViT-B/16 of open_clip at 448 x 448 pixels with random weights, and the classes are random directions:
their values do not matter for the speed. All implementations process the same images in alternation.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

from spar_lightning.backbones import OpenCLIP
from spar_lightning.datasets.shard_index import scan_all
from spar_lightning.feature_index import FeatureIndex, Origin, WritableIndex
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.prompts import TextClassifier
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.speed.comparison import Comparison, Way
from spar_lightning.student import Student

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIDE, CLASSES, COMPARED, REPEATS = 448, 50, 10, 5


def draw(folder: Path, images: int) -> list[Path]:
    """Write different parts of photographs as images, and return their paths."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(getattr(data, name)()).resize((900, 700)) for name in PHOTOGRAPHS]
    paths = [folder / f"{i:04d}.jpg" for i in range(images)]
    for i, path in enumerate(paths):
        left, top = rng.integers(0, (900 - SIDE, 700 - SIDE)).tolist()
        photographs[i % 4].crop((left, top, left + SIDE, top + SIDE)).save(path, quality=95)
    return paths


def main() -> None:
    """Build an index, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    given = parser.parse_args()
    torch.manual_seed(0)
    network, config = OpenCLIP("ViT-B-16", pretrained=None).requires_grad_(False), InferenceConfig()
    classes = TextClassifier(
        tuple(f"class {i}" for i in range(CLASSES)),
        F.normalize(torch.randn(CLASSES, network.embed_dim), dim=-1),
        torch.arange(CLASSES),
    )
    segmenter = Segmenter(network, classes, config)
    with tempfile.TemporaryDirectory(prefix="query-") as place:
        folder, root = Path(place) / "photos", Path(place) / "index"
        folder.mkdir()
        paths = draw(folder, given.images)
        WritableIndex(root, segmenter, "float16", Origin("openclip")).add(scan_all([str(folder)], root))
        index = FeatureIndex(root)
        index.__dict__["student"] = Student(network, config, {}, {}, None)  # the recorded name has no random weights
        chosen = np.linspace(0, given.images - 1, COMPARED).astype(int).tolist()
        ways = {
            "network and segmentation map": Way(lambda: [segmenter(paths[i]) for i in chosen]),
            "query, segmentation map": Way(lambda: [index.labels(i, classes) for i in chosen]),
            "query, areas only": Way(lambda: list(index.areas(classes, chosen))),
        }
        title = f"{given.images:,} images of {SIDE} x {SIDE} pixels, {CLASSES} classes"
        print(Comparison(title, "images", COMPARED, ways).measure(REPEATS, torch.device("cpu")).table())
        start = time.perf_counter()
        areas = list(index.areas(classes))
        print(f"\nareas of all {len(areas):,} images: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
