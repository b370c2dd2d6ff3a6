"""`spar evaluate`: mIoU on benchmarks, stored with the evaluation protocol; resumable, on any number of processes.

The command reads the same configuration file as `spar fit` and uses its model. Results are stored in a folder named
after the protocol: the same command continues there, another protocol gets another folder.
"""

import logging
import os
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
from spar_lightning.backbones.checkpoints import load_weights, warn_if_random
from spar_lightning.backbones.weights import without_weights
from spar_lightning.cli.evaluate_benchmarks import check, prepare
from spar_lightning.cli.evaluate_compare import compare
from spar_lightning.cli.evaluate_options import OPTIONS, OUT
from spar_lightning.cli.evaluate_sweep import Sweep, check_folder, figures, numbers
from spar_lightning.cli.lightning_cli import BENCHMARKS_SHOWN, INFERENCE_SHOWN, SparCLI, of_model, with_run_config
from spar_lightning.cli.validate import weights_options
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.distributed import is_first_process, world_size
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.benchmark import Benchmark, opened_later
from spar_lightning.evaluation.benchmark_config import BenchmarkError
from spar_lightning.evaluation.evaluator import Evaluator
from spar_lightning.evaluation.paper_table import check_paper
from spar_lightning.evaluation.report import table
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.text_embeddings import TextClassifiers
from spar_lightning.stopping import Stopped

log = logging.getLogger("spar_lightning")

NOTE = "mIoU and pixel accuracy in percent over all images; ms: median time of segmentation only, one image at a time."


class EvaluateCLI(SparCLI):
    """Command-line interface of `spar evaluate`: the model of a configuration, measured on benchmarks."""

    usage = "--weights WEIGHTS | --config CONFIG [options]"
    description = """Measure mIoU by the protocol of the paper. An evaluation that was stopped is continued by the same
    command. The result contains the protocol, so that results can be compared.

    Settings of inference may be given without `model.`: --inference sliding, --stride 32, --refine LPOSS.

    `spar evaluate --check DIR` lists which benchmarks DIR contains, and where the others are expected.

    `spar evaluate --prepare context --root DIR` creates label maps from a download: context, context459, ade847.

    `spar evaluate --compare A B [--out PAGE.html]` compares two result folders: is a difference significant?

    `spar evaluate --check_paper DIR` compares the results of scripts/reproduce_paper.sh with Table 1 of the paper.

    `spar evaluate --figures A B --out DIR` draws several sweeps in one figure."""
    shown = (*OPTIONS, *INFERENCE_SHOWN, *BENCHMARKS_SHOWN, "data.num_workers")
    trainer_shown = ("devices", "num_nodes", "accelerator")
    examples = (
        "spar evaluate --config quickstart",
        "spar evaluate --config quickstart --inference sliding --stride 32",
    )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the name of the command and the arguments that the CLI sets itself."""
        return {"evaluate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the command."""
        super().add_arguments_to_parser(parser)
        for name, (kind, default, text) in OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def before_instantiate_classes(self) -> None:
        """Check the options and open the benchmarks."""
        config = self.config.evaluate
        data = config.data.init_args
        sources = separated(config.benchmarks)
        check_at_least(1, **{"--max_images": config.max_images, "--repeats": config.repeats})
        check_at_least(0, **{"--warm_ups": config.warm_ups, "--gallery": config.gallery})
        self.strides, self.areas = numbers("--strides", config.strides), numbers("--sweep", config.sweep)
        self.weights = list(dict.fromkeys(separated(config.weights)))
        if len(self.weights) > 1 and not (self.strides or self.areas):
            raise UserError(
                f"--weights must name one network, but got {len(self.weights)}. Pass one, or compare several with "
                "--strides or --sweep."
            )
        if config.out is not None:
            check_folder(Path(config.out))
        # Open the benchmarks before the weights are loaded, so that a missing folder is reported at once.
        listed = opened_later(sources or data.get("benchmarks") or (), config.root or data.get("benchmark_root"))
        self.benchmarks = opened(listed, config.max_images)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer without logger and checkpoints; its settings decide about devices and processes."""
        trainer = super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)
        if world_size() not in (1, trainer.world_size):
            raise UserError(
                f"The launcher started {world_size()} processes, but the Trainer is configured for "
                f"{trainer.world_size}. Set --trainer.devices (per machine) and --trainer.num_nodes."
            )
        return trainer

    def instantiate_classes(self) -> None:
        """Create model and data; skip pretrained weights if --weights replaces them."""
        self.drop_training()
        # A sweep also measures the configured backbone, so it needs the pretrained weights.
        with without_weights() if self.weights and not (self.strides or self.areas) else nullcontext():
            super().instantiate_classes()

    def evaluate(self, model: Distillation, datamodule: SA1B) -> None:
        """Measure mIoU on benchmarks.

        `spar evaluate --check ROOT` lists the benchmarks found in a folder and the expected locations of the others.
        `spar evaluate --prepare context --root ROOT` creates label maps from a download: context, context459, ade847.
        `spar evaluate --compare A B [--out PAGE.html]` compares two results.
        `spar evaluate --check_paper DIR` compares the results of scripts/reproduce_paper.sh with Table 1 of the paper.
        `spar evaluate --figures A B --out DIR` draws several sweeps in one figure.
        Inference options can be written without `--model.`: --inference sliding, --refine LPOSS --refine.preset spar.
        """
        config = self.config.evaluate
        fabric = self._fabric()
        with self.ranks(fabric):
            if not self.benchmarks:
                datamodule.prepare_data()  # RenderedScenes creates its own benchmarks
                self.benchmarks = opened(datamodule.benchmarks, config.max_images)
            if not self.benchmarks:
                raise UserError(
                    "No benchmarks are selected. Pass --benchmarks paper6, or names, YAML files and folders."
                )
            model.to(fabric.device)
            evaluator = Evaluator(fabric, self.benchmarks, datamodule.num_workers, config.max_images)
            self._measure(model.student.requires_grad_(False), model.config, evaluator)

    def _fabric(self) -> Fabric:
        """Return a Fabric with the devices and processes of the Trainer and the precision of --precision."""
        settings = self.config_init.evaluate.trainer
        if settings.strategy not in ("auto", "ddp"):
            log.warning("trainer.strategy is ignored: evaluation splits images over processes and needs no gradients.")
        plugins = settings.plugins if isinstance(settings.plugins, list) else [settings.plugins]
        # Processes can need different times for their images; at the end, the others wait for the slowest.
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
        """Run one evaluation or a sweep."""
        config = self.config.evaluate
        out = None if config.out is None else Path(config.out)
        if not self.weights or self.strides or self.areas:  # a sweep also measures the configured backbone
            warn_if_random(backbone)
        if self.strides or self.areas:
            sweep = Sweep(evaluator, self.strides, self.areas, config.warm_ups, config.repeats)
            sweep.run(backbone, settings, self.weights, OUT, out)
            return
        for source in self.weights:
            load_weights(backbone, source)
        classifiers = TextClassifiers(backbone, settings.templates)
        report = evaluator.run(backbone, settings, classifiers, OUT, out, gallery=config.gallery)
        files = "results.json, table.md, report.html, per_class/, counts/, gallery/"
        evaluator.say(f"\n{table(report.content)}\n\n{NOTE}\n{report.folder}: {files}")


def separated(given: str | None) -> list[str]:
    """Return the parts of an option with commas, or the path of an existing file or folder that contains commas."""
    if given is not None and os.path.exists(given):
        return [given]
    return [part.strip() for part in (given or "").split(",") if part.strip()]


def opened(benchmarks: list[Benchmark], max_images: int | None) -> list[Benchmark]:
    """Open benchmarks and limit each to `max_images` images.

    Raises:
        BenchmarkError: One or more benchmarks cannot be opened; the message lists all of them.
    """
    errors = []
    for benchmark in benchmarks:
        try:
            benchmark.open()
        except UserError as error:  # also of a folder that cannot be read
            errors.append(str(error))
        benchmark.keep(max_images)
    if errors:
        raise BenchmarkError("\n".join(errors))
    return benchmarks


def run(args: Sequence[str]) -> int:
    """Run an evaluation, or one of the actions --check, --prepare, --compare, --check_paper and --figures."""
    options = ArgumentParser("spar evaluate", add_help=False, allow_abbrev=False, parents=[weights_options()])
    options.add_argument("--check", type=Path)
    options.add_argument("--prepare")
    options.add_argument("--compare", type=Path, nargs=2)
    options.add_argument("--check_paper", "--check-paper", type=Path)
    options.add_argument("--figures", type=Path, nargs="+")
    options.add_argument("--stride")
    options.add_argument("--strides")
    chosen, rest = options.parse_known_args(args)
    actions = [name for name in ("check", "prepare", "compare", "check_paper", "figures") if getattr(chosen, name)]
    others = [*actions[1:], *(name for name in ("weights", "config") if getattr(chosen, name))]
    if actions and others:
        raise UserError(f"--{actions[0]} cannot be combined with --{' and --'.join(others)}. Leave it out.")
    if chosen.stride and chosen.strides:
        raise UserError("--stride and --strides cannot be combined. Pass one of them.")
    if chosen.check:
        return check(chosen.check, rest)
    if chosen.prepare:
        return prepare(chosen.prepare, rest)
    if chosen.compare:
        return compare(chosen.compare, rest)
    if chosen.check_paper:
        if rest:
            raise UserError(f"--check_paper takes one folder and no other arguments, but got {' '.join(rest)}.")
        text, good = check_paper(chosen.check_paper, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
        print(text)
        return int(not good)
    if chosen.figures:
        return figures(chosen.figures, rest)
    try:
        EvaluateCLI(with_run_config([of_model(arg) for arg in args], chosen.weights, chosen.config))
    except Stopped:
        if is_first_process():
            print("Stopped. To continue, run the same command again.", flush=True)
        raise
    return 0
