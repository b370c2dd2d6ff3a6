"""Evaluator: one network by one protocol on some benchmarks, on any number of ranks, resumable.

Every rank takes a share of the images that are not counted yet and writes its counts to disk every half minute. The
sum is that of one process, whatever the number of ranks and restarts.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from spar_lightning.backbones.base import Backbone
from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.environment import environment
from spar_lightning.evaluation.partial_counts import PartialCounts
from spar_lightning.evaluation.protocol import Protocol
from spar_lightning.evaluation.report import Report
from spar_lightning.evaluation.timing import timed
from spar_lightning.files.hashing import hash_json
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import TextClassifiers

SAVE_EVERY: Final = 30.0  # seconds


def count(
    segmenter: Segmenter,
    images: Iterable[LabelledImage],
    indices: Iterable[int],
    counts: ConfusionMatrix,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Iterator[None]:
    """Segment images and add each to the counts, one per step of the iterator.

    Args:
        segmenter: Its backbone is on the device.
        images: Of a benchmark.
        indices: Index of each.
        counts: Where they are added.
        device: Where the network runs.
        precision: Context of the network, such as autocast.
    """
    for image, index in zip(images, indices, strict=False):
        pixels = image.image.to(device)
        with precision():
            predicted, milliseconds = timed(partial(segmenter, pixels), device)
        counts.update(predicted, image.labels.to(device), index, milliseconds)
        yield


class Evaluator:
    """Measures networks on benchmarks; every rank calls the same.

    Args:
        fabric: Launched: device, precision, and the other ranks.
        benchmarks: Opened.
        num_workers: Loader processes.
        max_images: Number of images that the benchmarks were cut to; part of a result's name.
    """

    def __init__(self, fabric: Fabric, benchmarks: list[Benchmark], num_workers: int, max_images: int | None) -> None:
        self.fabric, self.benchmarks = fabric, benchmarks
        self.num_workers = num_workers
        self._max_images = max_images

    def run(
        self,
        backbone: Backbone,
        config: InferenceConfig,
        classifiers: TextClassifiers,
        parent: Path,
        folder: Path | None = None,
        area: int | None = None,
    ) -> Report:
        """Measure what is not measured yet, benchmark after benchmark, and return the report.

        Args:
            backbone: The network, on the device.
            config: How it segments.
            classifiers: Text embeddings of its classes.
            parent: Folder in which the result's folder, named after network and protocol, is created.
            folder: Another folder for the result.
            area: Side of a square whose area all images get, in pixels; None leaves it to the benchmarks.
        """
        fabric, protocol = self.fabric, self.protocol(backbone, config)
        network, content = protocol.model(), protocol.content()
        settings = [network, content, self._max_images, *([area] if area else [])]
        name = f"{type(backbone).__name__}-{config.inference}-{hash_json(settings, 12)}"
        report = Report(folder or parent / name, network, content, environment(fabric))
        self.say("\n".join(f"{key}: {value}" for key, value in {**network, **content}.items()))
        for whole in self.benchmarks:
            benchmark = whole if area is None else whole.resized(area)
            # One rank reads the label files for their hash.
            own = fabric.broadcast(protocol.of(benchmark) if fabric.is_global_zero else {})
            own["hash"] = hash_json([content, own], 12)
            self.say(f"\n{benchmark.name}: {', '.join(f'{k} {value}' for k, value in own.items() if k != 'labels')}")
            segmenter = benchmark.description.segmenter(backbone, config, classifiers)
            # A text encoder without an identity is represented by the embeddings themselves.
            text = None if network["text"] else segmenter.classifier.embeddings.cpu().numpy().tobytes().hex()
            key = fabric.broadcast(f"{benchmark.name}-{hash_json([network, own['hash'], text], 12)}")
            stored = PartialCounts(report.folder, key, len(benchmark.classes))
            counts = self.evaluate(segmenter, benchmark, stored)
            if fabric.is_global_zero:
                report.add(benchmark, own, counts)
        return report

    def evaluate(self, segmenter: Segmenter, benchmark: Benchmark, stored: PartialCounts) -> ConfusionMatrix:
        """Return the counts of all images of a benchmark, on every rank. Collective."""
        rank, device = self.fabric.global_rank, self.fabric.device
        # Only the first rank reads: the others may see another disk, or the shared one late.
        before: ConfusionMatrix = self.fabric.broadcast(
            stored.gather() if rank == 0 else ConfusionMatrix(stored.classes)
        )
        done = set(before.images)
        mine = [i for i in range(len(benchmark)) if i not in done][rank :: self.fabric.world_size]
        title = benchmark.name + (f" ({len(done)} counted before)" if done else "")
        share = ConfusionMatrix(stored.classes, device)
        loader = DataLoader(Subset(benchmark, mine), collate_fn=list, num_workers=self.num_workers)
        images = (image for batch in loader for image in batch)
        steps = count(segmenter, images, mine, share, device, self.fabric.autocast)
        saved = time.monotonic()
        for _ in tqdm(steps, title, len(mine), unit="image", disable=rank != 0):
            # Only here, between two images: what interrupts the loop elsewhere may find half an update.
            if time.monotonic() - saved > SAVE_EVERY or len(share.images) == len(mine):
                stored.write(share, rank)
                saved = time.monotonic()
        total = before.merge(share.all_ranks())
        assert len(set(total.images)) == len(total.images) == len(benchmark)
        if rank == 0:
            stored.write(total)
            stored.drop_parts()
        self.fabric.barrier()  # no rank begins with the next benchmark before this one is on disk
        return total

    def protocol(self, backbone: Backbone, config: InferenceConfig) -> Protocol:
        """Return how the network would be measured now."""
        # The precision that was asked for may not exist here.
        return Protocol(backbone, config, str(self.fabric.strategy.precision.precision))

    def say(self, text: str) -> None:
        """Print, on the first rank."""
        if self.fabric.is_global_zero:
            print(text)
