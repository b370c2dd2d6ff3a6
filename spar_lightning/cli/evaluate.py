"""`spar evaluate`: mIoU on benchmarks, with the protocol that made it; resumable, on any number of processes.

The same configuration file as `spar fit`, of which the model counts. A result lies in a folder that is
named after its protocol: the same command goes on there, another protocol gets another folder.
"""

import logging
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.checkpoints import load_weights
from spar_lightning.backbones.weights import without_weights
from spar_lightning.cli.evaluate_benchmarks import check, prepare
from spar_lightning.cli.evaluate_options import OPTIONS, OUT
from spar_lightning.cli.evaluate_sweep import Sweep, check_folder, figures, numbers
from spar_lightning.cli.lightning_cli import SparCLI, with_run_config
from spar_lightning.cli.validate import weights_options
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.distributed import is_first_process, world_size
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.benchmark import Benchmark, opened_later
from spar_lightning.evaluation.benchmark_config import SHIPPED, BenchmarkError
from spar_lightning.evaluation.evaluator import Evaluator
from spar_lightning.evaluation.report import comparison, table
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.text_embeddings import TextClassifiers

log = logging.getLogger("spar_lightning")

NOTE = "mIoU and pixel accuracy in percent over all images; ms: median, segmentation alone, one image at a time."


class EvaluateCLI(SparCLI):
    """The model of a configuration, on benchmarks."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"evaluate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name, (kind, default, text) in OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def before_instantiate_classes(self) -> None:
        config = self.config.evaluate
        data = config.data.init_args
        named = [name.strip() for name in (config.benchmarks or "").split(",") if name.strip()]
        sources = SHIPPED if named == ["all"] else named
        check_at_least(1, **{"--max_images": config.max_images, "--repeats": config.repeats})
        check_at_least(0, **{"--warm_ups": config.warm_ups})
        self.strides, self.areas = numbers("--strides", config.strides), numbers("--sweep", config.sweep)
        given = [source.strip() for source in (config.weights or "").split(",") if source.strip()]
        self.weights = list(dict.fromkeys(given))
        if len(self.weights) > 1 and not (self.strides or self.areas):
            raise UserError(
                f"--weights takes one network, but got {len(self.weights)}. Give --strides or --sweep, which compare "
                "several, or one at a time."
            )
        if config.out is not None:
            check_folder(Path(config.out))
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

    def instantiate_classes(self) -> None:
        # A sweep also measures the backbone as configured.
        with without_weights() if self.weights and not (self.strides or self.areas) else nullcontext():
            super().instantiate_classes()

    def evaluate(self, model: Distillation, datamodule: SA1B) -> None:
        """Measure mIoU on benchmarks.

        `spar evaluate --check ROOT` lists the benchmarks found in a folder and where the others should be,
        `spar evaluate --prepare context --root ROOT` makes the labels of PASCAL Context, `spar evaluate --compare A B`
        compares two results, `spar evaluate --figures A B --out DIR` draws several sweeps in one figure. Settings of
        `--model` may be given without it: --inference sliding, --refine LPOSS --refine.preset spar.
        """
        config = self.config.evaluate
        fabric = self._fabric()
        fabric.launch()
        try:
            if not self.benchmarks:
                datamodule.prepare_data()  # rendered scenes bring their own
                self.benchmarks = opened(datamodule.benchmarks, config.max_images)
            if not self.benchmarks:
                raise UserError("There is nothing to evaluate on: give --benchmarks all, or names, files and folders.")
            model.to(fabric.device)
            evaluator = Evaluator(fabric, self.benchmarks, datamodule.num_workers, config.max_images)
            self._measure(model.student.requires_grad_(False), model.config, evaluator)
        except (UserError, RuntimeError) as error:
            others = getattr(fabric.strategy.launcher, "procs", [])  # those that this process started
            if isinstance(error, RuntimeError) and any(ended(process) == 2 for process in others):
                sys.exit(2)  # the connection broke because of a mistake that another process has named
            for process in others:  # they would wait for this one, and then print tracebacks
                process.kill()
            raise

    def _fabric(self) -> Fabric:
        """Devices and processes as the Trainer's settings say, precision as the command's."""
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

    def _measure(self, backbone: Backbone, settings: InferenceConfig, evaluator: Evaluator) -> None:
        """Measure one result, or a sweep."""
        config = self.config.evaluate
        out = None if config.out is None else Path(config.out)
        if self.strides or self.areas:
            sweep = Sweep(evaluator, self.strides, self.areas, config.warm_ups, config.repeats)
            sweep.run(backbone, settings, self.weights, OUT, out)
            return
        for source in self.weights:
            load_weights(backbone, source)
        classifiers = TextClassifiers(backbone, settings.templates)
        report = evaluator.run(backbone, settings, classifiers, OUT, out)
        files = "results.json, table.md, per_class/, counts/"
        evaluator.say(f"\n{table(report.content)}\n\n{NOTE}\n{report.folder}: {files}")


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


def run(args: Sequence[str]) -> int:
    """Evaluate, or with --check, --prepare, --compare and --figures look at data and results."""
    others = ArgumentParser("spar evaluate", add_help=False, allow_abbrev=False, parents=[weights_options()])
    others.add_argument("--check", type=Path)
    others.add_argument("--prepare")
    others.add_argument("--compare", type=Path, nargs=2)
    others.add_argument("--figures", type=Path, nargs="+")
    others.add_argument("--stride")
    others.add_argument("--strides")
    chosen, rest = others.parse_known_args(args)
    looks = chosen.check or chosen.prepare or chosen.compare or chosen.figures
    if looks and (unused := [f"--{name}" for name in ("weights", "config") if getattr(chosen, name)]):
        raise UserError(f"--check, --prepare, --compare and --figures take no {' and '.join(unused)}: leave it out.")
    if chosen.stride and chosen.strides:
        raise UserError("--stride and --strides exclude each other. Give one of them.")
    if chosen.check:
        return check(chosen.check, rest)
    if chosen.prepare:
        return prepare(chosen.prepare, rest)
    if chosen.compare:
        if rest:
            raise UserError(f"--compare takes two results and nothing more, but got {' '.join(rest)}.")
        print(comparison(*chosen.compare))
        return 0
    if chosen.figures:
        return figures(chosen.figures, rest)
    try:
        EvaluateCLI(with_run_config([_of_model(arg) for arg in args], chosen.weights, chosen.config))
    except KeyboardInterrupt:
        if is_first_process():
            print("Stopped. The same command continues where it was.")
        raise
    return 0


def _of_model(arg: str) -> str:
    """Return an option such as --stride or --refine.k as the key of the model block that it sets."""
    name = arg.removeprefix("--").partition("=")[0].partition(".")[0]
    return f"--model.{arg[2:]}" if arg.startswith("--") and name in InferenceConfig.__dataclass_fields__ else arg
