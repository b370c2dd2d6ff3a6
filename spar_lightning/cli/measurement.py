"""One network by one protocol on some benchmarks: what is counted, written and printed."""

from pathlib import Path

import torch
from lightning.fabric import Fabric

from spar_lightning.datamodules.benchmark import Benchmark
from spar_lightning.distillation import Distillation
from spar_lightning.evaluation.counts import CountsFolder
from spar_lightning.evaluation.environment import environment
from spar_lightning.evaluation.evaluator import Evaluator
from spar_lightning.evaluation.protocol import Protocol, digest
from spar_lightning.evaluation.report import Report
from spar_lightning.evaluation.score import Result


class Measurement:
    """Measures models on benchmarks; every process calls the same.

    Args:
        fabric: Launched: device, precision, and the other processes.
        benchmarks: Opened.
        num_workers: Loader processes.
        max_images: What the benchmarks were cut to; part of a result's name.
    """

    def __init__(self, fabric: Fabric, benchmarks: list[Benchmark], num_workers: int, max_images: int | None) -> None:
        self.fabric = fabric
        self.benchmarks = benchmarks
        self._evaluator = Evaluator(fabric, num_workers)
        self._max_images = max_images

    def run(self, model: Distillation, parent: Path, folder: Path | None = None, area: int | None = None) -> Report:
        """Measure what is not measured yet, benchmark after benchmark, with a report that grows.

        Args:
            model: On the device; inference and stride as they are to be measured.
            parent: Where the folder lies that is named after network and protocol.
            folder: Another than that.
            area: Side of a square whose area all images get, in pixels; None leaves it to the benchmarks.
        """
        fabric = self.fabric
        protocol = self.protocol(model)
        network, content = protocol.model(), protocol.content()
        name = f"{type(model.student).__name__}-{model.inference}"
        settings = [network, content, self._max_images, *([area] if area else [])]
        report = Report(folder or parent / f"{name}-{digest(settings)}", network, content, environment(fabric))
        self.say("\n".join(f"{key}: {value}" for key, value in {**network, **content}.items()))
        for whole in self.benchmarks:
            benchmark = whole if area is None else whole.resized(area)
            # One process reads the label maps for their hash.
            own = fabric.broadcast(protocol.of(benchmark) if fabric.is_global_zero else {})
            own["hash"] = digest([content, own])
            self.say(f"\n{benchmark.name}: {', '.join(f'{k} {value}' for k, value in own.items() if k != 'labels')}")
            segmenter = model.segmenter(benchmark.description)
            # Of a text encoder that does not say what it is, the embeddings themselves belong to the key.
            text = None if network["text"] else segmenter.classifier.embeddings.numpy().tobytes().hex()
            key = fabric.broadcast(f"{benchmark.name}-{digest([network, own['hash'], text])}")
            counts = self._evaluator.evaluate(
                segmenter, benchmark, CountsFolder(report.folder, key, len(benchmark.classes))
            )
            if fabric.is_global_zero:
                report.add(benchmark, own, counts, Result.of(torch.from_numpy(counts.matrix), len(counts.images)))
        return report

    def protocol(self, model: Distillation) -> Protocol:
        """How the model would be measured now."""
        return model.protocol(str(self.fabric.strategy.precision.precision))  # what was asked for may not exist here

    def say(self, text: str) -> None:
        """Print, on the first process."""
        if self.fabric.is_global_zero:
            print(text)
