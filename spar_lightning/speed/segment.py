"""`spar speed segment`: segmentation of an image, compared with one forward pass of the network alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch
import torch.nn.functional as F

from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.prompts import TextClassifier
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.speed.bench import Bench, operations
from spar_lightning.speed.comparison import Comparison

CLASSES: Final = 150


def classifier(bench: Bench, classes: int = CLASSES) -> TextClassifier:
    """Return a classifier with random text embeddings, since timing does not need a text encoder."""
    embeddings = F.normalize(torch.randn(classes, bench.module.student.embed_dim, device=bench.device), dim=-1)
    return TextClassifier(tuple(map(str, range(classes))), embeddings, torch.arange(classes, device=bench.device))


def segment(bench: Bench) -> Iterator[Comparison]:
    """Compare the segmenter with the network alone, on accelerators also in sliding windows without stitching."""
    module, (height, width) = bench.module, bench.size
    image = bench.noise(height, width)
    config = InferenceConfig(attention=module.config.attention)
    single = Segmenter(module.student, classifier(bench), config)
    pixels = single.pixels(image)
    with torch.no_grad():
        flops = operations(module.student, lambda net, meta: net(torch.zeros(1, *pixels.shape, device=meta)))
    ours, bare = f"Segmenter with {CLASSES} classes", f"network alone, {bench.precision}"
    ways = {
        bare: bench.way(lambda: single.run_network(pixels), flops),
        ours: bench.way(lambda: single(image), flops),
    }
    if bench.device.type != "cpu":  # would take an hour on a CPU
        sliding = Segmenter(module.student, single.classifier, replace(module.config, inference="sliding"))
        assert sliding.windows is not None
        count = sliding.windows.count(height, width)
        ways[f"network alone, {count} windows"] = bench.way(lambda: sliding.run_network(pixels))
    yield bench.compare(f"segmentation map of {height} x {width}", "images", 1, ways, (ours, bare))
