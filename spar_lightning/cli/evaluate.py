"""`spar evaluate`: mIoU on benchmarks, with the protocol that made it; resumable, on any number of processes.

The same configuration file as `spar fit`, of which the model counts. A result lies in a folder that is
named after its protocol: the same command goes on there, another protocol gets another folder.
"""

import logging
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.cli.benchmark_folders import check, prepare
from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.cli.student_weights import load
from spar_lightning.datamodules.benchmark import Benchmark, opened_later
from spar_lightning.datamodules.benchmark_description import SHIPPED, BenchmarkError
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.counts import CountsFolder
from spar_lightning.evaluation.evaluator import Evaluator
from spar_lightning.evaluation.protocol import Protocol, digest
from spar_lightning.evaluation.report import Report, comparison, table
from spar_lightning.evaluation.score import Result
from spar_lightning.processes import is_first_process, world_size
from spar_lightning.segmenter import Inference

log = logging.getLogger("spar_lightning")

OUT = Path("runs") / "evaluate"
NOTE = "mIoU and pixel accuracy in percent over all images; ms: median, segmentation alone, one image at a time."


class EvaluateTrainer(Trainer):
    """Gives the verb its place in the parser; the loop is the Evaluator's."""

    def evaluate(self, model: Distillation, datamodule: SA1B) -> None:
        """Measure mIoU on benchmarks.

        `spar evaluate --check ROOT` says which benchmarks are found below a folder and where the others should lie,
        `spar evaluate --prepare context --root ROOT` makes the labels of PASCAL Context, `spar evaluate --compare A B`
        compares two results.
        """


class EvaluateCLI(SparCLI):
    """The model of a configuration, on benchmarks."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, trainer_class=EvaluateTrainer)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"evaluate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        options: dict[str, tuple[Any, Any, str]] = {
            "weights": (str | None, None, "Run folder, checkpoint of fit, or weight file; null: as configured."),
            "benchmarks": (str | None, None, f"all, or names, YAML files and folders with commas between; all are "
                           f"{', '.join(SHIPPED)}; null: data.benchmarks."),
            "root": (str | None, None, "Folder in which the benchmarks lie; null: data.benchmark_root."),
            "inference": (Inference | None, None, "single pass or sliding window; null: model.inference."),
            "stride": (int | None, None, "Step between windows in pixels; null: model.stride."),
            "precision": (Literal["32-true", "16-mixed", "bf16-mixed"], "32-true",
                          "Of the network's arithmetic; trainer.precision is that of training."),
            "max_images": (int | None, None, "Images of each benchmark, spread evenly over it; null: all."),
            "out": (str | None, None, f"Folder of the results; null: {OUT}/NAME-PROTOCOL."),
        }  # fmt: skip
        for name, (kind, default, text) in options.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def before_instantiate_classes(self) -> None:
        config = self.config.evaluate
        data = config.data.init_args
        named = [name.strip() for name in (config.benchmarks or "").split(",") if name.strip()]
        sources = SHIPPED if named == ["all"] else named
        check_at_least(1, **{"--max_images": config.max_images, "--stride": config.stride})
        # Before the weights are loaded: a folder that is not there should cost no minutes.
        listed = opened_later(sources or data.get("benchmarks") or (), config.root or data.get("benchmark_root"))
        self.benchmarks = opened(listed, config.max_images)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)
        if world_size() not in (1, trainer.world_size):
            raise UserError(
                f"The launcher has started {world_size()} processes, but the Trainer's settings ask for "
                f"{trainer.world_size}. Give --trainer.devices for each machine and --trainer.num_nodes."
            )
        return trainer

    def evaluate(self, model: Distillation, datamodule: SA1B) -> None:
        """Measure what is not measured yet, and write the report."""
        config = self.config.evaluate
        fabric = self._fabric()
        fabric.launch()
        try:
            if not self.benchmarks:
                datamodule.prepare_data()  # rendered scenes bring their own
                self.benchmarks = opened(datamodule.benchmarks, config.max_images)
            if not self.benchmarks:
                raise UserError("There is nothing to evaluate on: give --benchmarks all, or names, files and folders.")
            if config.weights is not None:
                load(model, config.weights)
            model.to(fabric.device)
            model.stride, model.inference = config.stride or model.stride, config.inference or model.inference
            self._measure(model, fabric, Evaluator(fabric, datamodule.num_workers))
        except (UserError, RuntimeError) as error:
            others = getattr(fabric.strategy.launcher, "procs", [])  # those that this process started
            if isinstance(error, RuntimeError) and any(ended(process) == 2 for process in others):
                sys.exit(2)  # the connection broke because of a mistake that another process has named
            for process in others:  # they would wait for this one, and then print tracebacks
                process.kill()
            raise

    def _fabric(self) -> Fabric:
        """Devices and processes as the Trainer's settings say, precision as the verb's."""
        settings = self.config_init.evaluate.trainer
        if settings.strategy not in ("auto", "ddp"):
            log.warning("trainer.strategy is ignored: an evaluation shares images out and needs no gradients.")
        plugins = settings.plugins if isinstance(settings.plugins, list) else [settings.plugins]
        # Shares may take unequally long: at the end the others wait for the slowest.
        patient = DDPStrategy(timeout=timedelta(days=1))
        return Fabric(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=patient if self.trainer.world_size > 1 else "auto",
            precision=self.config.evaluate.precision,
            plugins=[plugin for plugin in plugins if isinstance(plugin, ClusterEnvironment)],
        )

    def _measure(self, model: Distillation, fabric: Fabric, evaluator: Evaluator) -> None:
        """Benchmark after benchmark, with a report that grows."""
        precision = fabric.strategy.precision.precision  # what was asked for may not exist on this device
        protocol = Protocol(
            model.student, model.inference, model.stride, model.geometry, model.templates, str(precision)
        )
        network, content = protocol.model(), protocol.content()
        limit = self.config.evaluate.max_images
        name = f"{type(model.student).__name__}-{model.inference}-{digest([network, content, limit])}"
        folder = Path(self.config.evaluate.out or OUT / name)
        report = Report(folder, network, content, environment(fabric))
        say = print if fabric.is_global_zero else lambda *_: None
        say("\n".join(f"{key}: {value}" for key, value in {**network, **content}.items()))
        for benchmark in self.benchmarks:
            # One process reads the label maps for their hash.
            own = fabric.broadcast(protocol.of(benchmark) if fabric.is_global_zero else {})
            own["hash"] = digest([content, own])
            say(f"\n{benchmark.name}: {', '.join(f'{key} {value}' for key, value in own.items() if key != 'labels')}")
            segmenter = model.segmenter(benchmark.description)
            # Of a text encoder that does not say what it is, the embeddings themselves belong to the key.
            text = None if network["text"] else segmenter.classifier.embeddings.numpy().tobytes().hex()
            key = fabric.broadcast(f"{benchmark.name}-{digest([network, own['hash'], text])}")
            counts = evaluator.evaluate(segmenter, benchmark, CountsFolder(folder, key, len(benchmark.classes)))
            if fabric.is_global_zero:
                report.add(benchmark, own, counts, Result.of(torch.from_numpy(counts.matrix), len(counts.images)))
        say(f"\n{table(report.content)}\n\n{NOTE}\n{folder}: results.json, table.md, per_class/, counts/")


def opened(benchmarks: list[Benchmark], max_images: int | None) -> list[Benchmark]:
    """The benchmarks, opened; of all that fail, the sentences of all."""
    errors = []
    for benchmark in benchmarks:
        try:
            benchmark.open()
        except BenchmarkError as error:
            errors.append(str(error))
        benchmark.keep(max_images)
    if errors:
        raise BenchmarkError("\n".join(errors))
    return benchmarks


def ended(process: "subprocess.Popen[bytes]") -> int | None:
    """The exit code of a process that is ending."""
    try:
        return process.wait(3)
    except subprocess.TimeoutExpired:
        return None


def environment(fabric: Fabric) -> dict[str, Any]:
    """Versions and hardware of this evaluation."""
    device = fabric.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = ("spar-lightning", "torch", "lightning", "timm", "open_clip_torch", "transformers")
    return {**{p: metadata.version(p) for p in packages}, "device": name, "processes": fabric.world_size}


def run(args: Sequence[str]) -> int:
    """Evaluate, or with --check, --prepare and --compare look at data and results."""
    given = list(args)
    others = ArgumentParser("spar evaluate", add_help=False, allow_abbrev=False)
    others.add_argument("--check", type=Path)
    others.add_argument("--prepare")
    others.add_argument("--compare", type=Path, nargs=2)
    for name in ("--weights", "--config"):
        others.add_argument(name)
    chosen, rest = others.parse_known_args(given)
    if chosen.check:
        return check(chosen.check, rest)
    if chosen.prepare:
        return prepare(chosen.prepare, rest)
    if chosen.compare:
        if rest:
            raise UserError(f"--compare takes two results and nothing more, but got {' '.join(rest)}.")
        print(comparison(*chosen.compare))
        return 0
    try:
        EvaluateCLI(_with_config(given, chosen.weights, chosen.config))
    except KeyboardInterrupt:
        if is_first_process():
            print("Stopped. The same command goes on where it was.")
        raise
    return 0


def _with_config(args: list[str], weights: str | None, config: str | None) -> list[str]:
    """The configuration of the run whose weights are given, unless one is named."""
    path = Path(weights or "") / "config.yaml"
    return ["--config", str(path), *args] if config is None and weights and path.is_file() else args
