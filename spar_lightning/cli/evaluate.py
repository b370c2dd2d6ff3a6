"""`spar evaluate`: mIoU on benchmarks, with the protocol that made it; resumable, on any number of processes.

The same configuration file as `spar fit`, of which the model counts. A result lies in a folder that is
named after its protocol: the same command goes on there, another protocol gets another folder.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.backbones.weights import WeightsError, difference, read
from spar_lightning.cli.benchmark_folders import check, prepare
from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.datamodules.benchmark import Benchmark, opened_later
from spar_lightning.datamodules.benchmark_description import SHIPPED, BenchmarkError
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError
from spar_lightning.evaluation.counts import CountsFolder
from spar_lightning.evaluation.evaluator import Evaluator
from spar_lightning.evaluation.protocol import Protocol, digest
from spar_lightning.evaluation.report import Report, comparison, table
from spar_lightning.evaluation.score import Result
from spar_lightning.processes import is_first_process
from spar_lightning.segmenter import Inference

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
            "precision": (Literal["32-true", "16-mixed", "bf16-mixed"], "32-true", "Of the network's arithmetic."),
            "max_images": (int | None, None, "Images of each benchmark, spread evenly over it; null: all."),
            "out": (str | None, None, f"Folder of the results; null: {OUT}/NAME-PROTOCOL."),
        }  # fmt: skip
        for name, (kind, default, text) in options.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def before_instantiate_classes(self) -> None:
        config = self.config.evaluate
        data = config.data.init_args
        sources = SHIPPED if config.benchmarks == "all" else config.benchmarks and config.benchmarks.split(",")
        if config.max_images is not None and config.max_images < 1:
            raise UserError(f"--max_images must be at least 1, but got {config.max_images}.")
        # Before the weights are loaded: a folder that is not there should cost no minutes.
        named = opened_later(sources or data.get("benchmarks") or (), config.root or data.get("benchmark_root"))
        self.benchmarks = opened(named, config.max_images)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)

    def evaluate(self, model: Distillation, datamodule: SA1B) -> None:
        """Measure what is not measured yet, and write the report."""
        config, trainer = self.config.evaluate, self.config.evaluate.trainer
        fabric = Fabric(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            precision=config.precision,
        )
        fabric.launch()
        if config.weights is not None:
            load(model, config.weights)
        model.to(fabric.device)
        model.stride, model.inference = config.stride or model.stride, config.inference or model.inference
        protocol = Protocol(
            model.student, model.inference, model.stride, model.geometry, model.templates, config.precision
        )
        network, content = protocol.model(), protocol.content()
        name = f"{type(model.student).__name__}-{model.inference}-{digest([network, content])}"
        folder = Path(config.out) if config.out else OUT / name
        report = Report(folder, network, content, environment(fabric))
        first = fabric.global_rank == 0
        if first:
            print("\n".join(f"{key}: {value}" for key, value in {**network, **content}.items()), end="\n\n")
        benchmarks = self.benchmarks or opened(datamodule.benchmarks, config.max_images)
        if not benchmarks:
            raise UserError("There is nothing to evaluate on: give --benchmarks all, or names, YAML files and folders.")
        evaluator = Evaluator(fabric, datamodule.num_workers)
        for benchmark in benchmarks:
            own = protocol.of(benchmark)
            own["hash"] = digest([content, own])
            key = f"{benchmark.name}-{digest([network, own['hash']])}"
            counts_folder = CountsFolder(folder, key, len(benchmark.classes))
            segmenter = model.segmenter(benchmark.description)
            counts = evaluator.evaluate(segmenter, benchmark, counts_folder)
            if first:
                report.add(benchmark, own, counts, Result.of(torch.from_numpy(counts.matrix), len(counts.images)))
        if first:
            print(f"\n{table(report.content)}\n\n{NOTE}\n{folder}: results.json, table.md, per_class/, counts/")


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


def load(model: Distillation, source: str) -> None:
    """Put weights into the student: of a run folder, a checkpoint of fit, or a file of the backbone's library.

    Raises:
        UserError: There are none, or they do not fit.
    """
    path = Path(source)
    if path.is_dir() and (path / "checkpoints").is_dir():
        candidates = [path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise UserError(f"--weights {source}: the run has no checkpoint yet. Give another run or a weight file.")
        path = found
    try:
        tensors = read(str(path))
        if difference(tensors, model.student.state_dict()) is None:  # of fit, in the backbone's own names
            model.student.load_state_dict(tensors)
        else:
            model.student.load_vision_state_dict(tensors)
    except WeightsError as error:
        raise UserError(f"--weights {source}: {error}") from error


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
    chosen, rest = others.parse_known_args(given)
    if chosen.check:
        return check(chosen.check, rest)
    if chosen.prepare:
        return prepare(chosen.prepare, rest)
    if chosen.compare:
        print(comparison(*chosen.compare))
        return 0
    try:
        EvaluateCLI(_with_config(given))
    except KeyboardInterrupt:
        if is_first_process():
            print("Stopped. The same command goes on where it was.")
        raise
    return 0


def _with_config(args: list[str]) -> list[str]:
    """The configuration of the run whose weights are given, unless one is named."""
    if "--weights" not in args or any(arg == "--config" or arg.startswith("--config=") for arg in args):
        return args
    config = Path(args[args.index("--weights") + 1 :][0] if args[-1] != "--weights" else "") / "config.yaml"
    return ["--config", str(config), *args] if config.is_file() else args
