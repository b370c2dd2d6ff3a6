"""Evaluation of a network on benchmarks, on any number of ranks, resumable.

Each rank evaluates a share of the images that are not counted yet and writes its counts to disk every 30 seconds. The
sum equals that of a single process, for any number of ranks and restarts.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from spar_lightning.backbones.base import Backbone
from spar_lightning.datasets.loader import one_by_one
from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.environment import environment
from spar_lightning.evaluation.gallery import choose, pictures
from spar_lightning.evaluation.html_report import evaluation_page, pictures_file, stored_pictures
from spar_lightning.evaluation.partial_counts import PartialCounts
from spar_lightning.evaluation.protocol import Protocol
from spar_lightning.evaluation.report import Report, draw_seed, read_counts
from spar_lightning.evaluation.timing import timed
from spar_lightning.files.atomic import replace
from spar_lightning.files.hashing import hash_json
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import TextClassifiers

SAVE_EVERY: Final = 30.0  # seconds


def count(
    segmenter: Callable[[Tensor], Tensor],
    images: Iterable[LabelledImage],
    indices: Iterable[int],
    counts: ConfusionMatrix,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Iterator[None]:
    """Segment images and add them to the counts, one image per step of the iterator.

    Args:
        segmenter: Segmenter, or another function from pixels to a segmentation map, on `device`.
        images: Images of a benchmark.
        indices: Index of each image in the benchmark.
        counts: Confusion matrix that is updated in place.
        device: Device of the network.
        precision: Function that returns the precision context of the network, such as autocast.
    """
    for image, index in zip(images, indices, strict=False):
        pixels = image.image.to(device)
        with precision():
            predicted, milliseconds = timed(partial(segmenter, pixels), device)
        counts.update(predicted, image.labels.to(device), index, milliseconds)
        yield


class Evaluator:
    """Evaluator of networks on benchmarks.

    All ranks must make the same calls.

    Args:
        fabric: Launched Fabric with device, precision and ranks.
        benchmarks: Opened benchmarks.
        num_workers: Number of loader processes per rank.
        max_images: Number of images that each benchmark was limited to, or None; part of the folder name.
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
        gallery: int | None = None,
    ) -> Report:
        """Evaluate the images of all benchmarks that are not counted yet, and return the report.

        Args:
            backbone: Network to evaluate, on the device.
            config: Inference settings.
            classifiers: Text embeddings of class names for this backbone.
            parent: Folder in which the result folder, named after network and protocol, is created.
            folder: Result folder to use instead.
            area: Side of a square in pixels: all images are resized to its area. None uses the benchmark's `resize`.
            gallery: Number of images in each group of report.html; None writes no report.html.
        """
        fabric, protocol = self.fabric, self.protocol(backbone, config)
        network, content = protocol.model(), protocol.content()
        settings = [network, content, self._max_images, *([area] if area else [])]
        name = f"{type(backbone).__name__}-{config.inference}-{hash_json(settings, 12)}"
        report = Report(folder or parent / name, network, content, environment(fabric))
        self.say("\n".join(f"{key}: {value}" for key, value in {**network, **content}.items()))
        for whole in self.benchmarks:
            benchmark = whole if area is None else whole.resized(area)
            # Only rank 0 reads the label files, to hash them.
            own = fabric.broadcast(protocol.of(benchmark) if fabric.is_global_zero else {})
            own["hash"] = hash_json([content, own], 12)
            self.say(f"\n{benchmark.name}: {', '.join(f'{k} {value}' for k, value in own.items() if k != 'labels')}")
            segmenter = benchmark.description.segmenter(backbone, config, classifiers)
            # If the text encoder has no cache key, the embeddings themselves become part of the key.
            text = None if network["text"] else segmenter.classifier.embeddings.cpu().numpy().tobytes().hex()
            key = fabric.broadcast(f"{benchmark.name[:100]}-{hash_json([network, own['hash'], text], 12)}")
            stored = PartialCounts(report.folder, key, len(benchmark.classes))
            counts = self.evaluate(segmenter, benchmark, stored)
            if fabric.is_global_zero:
                report.add(benchmark, own, counts, stored.path)
                if gallery is not None:
                    self._write_page(report, benchmark, segmenter, gallery)
        return report

    def _write_page(self, report: Report, benchmark: Benchmark, segmenter: Segmenter, count: int) -> None:
        """Write report.html, and first the pictures of a benchmark unless they exist."""
        row, private = report.content["benchmarks"][benchmark.name], report.folder / "counts" / "tmp"
        if count and stored_pictures(report.folder, row)["count"] != count:
            counts = read_counts(report.folder, row)[..., :3]
            chosen = choose(counts, count, draw_seed(row))
            found = pictures(benchmark, segmenter, counts, chosen, self.fabric.device, self.fabric.autocast)
            path = pictures_file(report.folder, row)
            path.parent.mkdir(exist_ok=True)
            replace(path, json.dumps({"count": count, "images": found}).encode(errors="replace"), private)
        report.refresh()  # drawing takes time
        page = evaluation_page(report.folder, report.content, with_pictures=count > 0)
        replace(report.folder / "report.html", page.encode(errors="replace"), private)

    def evaluate(self, segmenter: Segmenter, benchmark: Benchmark, stored: PartialCounts) -> ConfusionMatrix:
        """Return the counts of all images of a benchmark, on every rank.

        All ranks must call this method.

        Args:
            segmenter: Segmenter with its backbone on the device.
            benchmark: Opened benchmark.
            stored: Counts on disk: read first, and updated during the evaluation.
        """
        rank, device = self.fabric.global_rank, self.fabric.device
        # Only rank 0 reads: other ranks may have another disk, or see a shared disk with a delay.
        before: ConfusionMatrix = self.fabric.broadcast(
            stored.gather() if rank == 0 else ConfusionMatrix(stored.classes)
        )
        done = set(before.images)
        mine = [i for i in range(len(benchmark)) if i not in done][rank :: self.fabric.world_size]
        title = benchmark.name + (f" ({len(done)} already counted)" if done else "")
        share = ConfusionMatrix(stored.classes, device)
        images = chain.from_iterable(one_by_one(benchmark, self.num_workers, mine))
        steps = count(segmenter, images, mine, share, device, self.fabric.autocast)
        saved = time.monotonic()
        for _ in tqdm(steps, title, len(mine), unit="image", disable=rank != 0):
            # Save only between two images: if the loop is interrupted elsewhere, an update may be incomplete.
            if time.monotonic() - saved > SAVE_EVERY or len(share.images) == len(mine):
                stored.write(share, rank)
                saved = time.monotonic()
        total = before.merge(share.all_ranks())
        assert len(set(total.images)) == len(total.images) == len(benchmark)
        if rank == 0:
            stored.write(total)
            stored.drop_parts()
        self.fabric.barrier()  # no rank starts the next benchmark before this one is on disk
        return total

    def protocol(self, backbone: Backbone, config: InferenceConfig) -> Protocol:
        """Return the protocol of an evaluation of this backbone with these settings."""
        # The effective precision; the requested one may not be available on this device.
        return Protocol(backbone, config, str(self.fabric.strategy.precision.precision))

    def say(self, text: str) -> None:
        """Print a text on rank 0."""
        if self.fabric.is_global_zero:
            print(text)
