"""`spar speed segment`: an image and class names to a label map, against the network's one forward pass."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch
import torch.nn.functional as F

from spar_lightning.segmentation.prompts import TextClassifier
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.speed.bench import Bench, operations
from spar_lightning.speed.comparison import Comparison

CLASSES: Final = 150


def classifier(bench: Bench, classes: int = CLASSES) -> TextClassifier:
    """Random names: no text encoder is needed to take the time."""
    embeddings = F.normalize(torch.randn(classes, bench.module.student.embed_dim, device=bench.device), dim=-1)
    return TextClassifier(tuple(map(str, range(classes))), embeddings, torch.arange(classes, device=bench.device))


def segment(bench: Bench) -> Iterator[Comparison]:
    """The network alone is the base; on an accelerator its sliding window as well, without stitching."""
    module, (height, width) = bench.module, bench.size
    image = bench.noise(height, width)
    single = Segmenter(module.student, classifier(bench))
    pixels = single.pixels(image)
    with torch.no_grad():
        flops = operations(module.student, lambda net, meta: net(torch.zeros(1, *pixels.shape, device=meta)))
    ours, bare = f"Segmenter with {CLASSES} classes", f"network alone, {bench.precision}"
    ways = {
        bare: bench.way(lambda: single.run_network(pixels), flops),
        ours: bench.way(lambda: single(image), flops),
    }
    if bench.device.type != "cpu":  # a CPU would take an hour
        sliding = Segmenter(module.student, single.classifier, replace(module.config, inference="sliding"))
        assert sliding.windows is not None
        count = sliding.windows.count(height, width)
        ways[f"network alone, {count} windows"] = bench.way(lambda: sliding.run_network(pixels))
    yield bench.compare(f"label map of {height} x {width}", "images", 1, ways, (ours, bare))
