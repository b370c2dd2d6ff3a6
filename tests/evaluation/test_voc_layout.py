"""Test that the counts of PASCAL VOC files, as labelme exports them, equal a plain count with numpy."""

from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.fabric import Fabric
from PIL import Image

from spar_lightning.backbones import Tiny
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.evaluator import Evaluator
from spar_lightning.evaluation.partial_counts import PartialCounts
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.text_embeddings import TextClassifiers
from tests import fake_benchmarks

NAMES = ("plain", "grain", "checks", "red dot")
SIZES = ((40, 56), (48, 32), (33, 47))


def tree(root: Path) -> Path:
    """Write JPEGImages/ and SegmentationClassPNG/ with palette PNGs and 255 for void; return the benchmark."""
    for i, (height, width) in enumerate(SIZES):
        fake_benchmarks.jpg(root / "JPEGImages" / f"2011_{i:06d}.jpg", fake_benchmarks.image(i, height, width))
        labels = fake_benchmarks.labels(i, height, width, [0, 1, 3, 255])
        labels[:5] = 255
        fake_benchmarks.palette_png(root / "SegmentationClassPNG" / f"2011_{i:06d}.png", labels)
    description = {
        "images": "JPEGImages/{}.jpg",
        "labels": [{"file": "SegmentationClassPNG/{}.png"}],
        "classes": [{"label": name, "names": [name]} for name in NAMES],
    }
    (root / "voc.yaml").write_text(yaml.safe_dump(description))
    return root / "voc.yaml"


def test_counts_equal_those_of_numpy(tmp_path: Path) -> None:
    benchmark = Benchmark(str(tree(tmp_path)))
    benchmark.open()
    torch.manual_seed(0)
    backbone = Tiny().requires_grad_(False)
    config = InferenceConfig(inference="single", templates=["{}"])
    segmenter = benchmark.description.segmenter(backbone, config, TextClassifiers(backbone, config.templates))
    evaluator = Evaluator(Fabric(accelerator="cpu", devices=1), [benchmark], 0, None)
    found = evaluator.evaluate(segmenter, benchmark, PartialCounts(tmp_path / "out", "voc", len(NAMES)))
    expected = np.zeros((len(NAMES), len(NAMES)), np.int64)
    for path in sorted((tmp_path / "JPEGImages").iterdir()):
        with Image.open(path) as file:
            image = torch.from_numpy(np.array(file)).permute(2, 0, 1)
        with Image.open(tmp_path / "SegmentationClassPNG" / f"{path.stem}.png") as file:
            labels = np.array(file)
        counted = labels != 255
        np.add.at(expected, (labels[counted], segmenter(image).numpy()[counted]), 1)
    assert (expected.sum(0) > 0).sum() > 1  # more than one class is predicted
    assert np.array_equal(found.matrix.numpy(), expected) and sorted(found.images) == [0, 1, 2]
