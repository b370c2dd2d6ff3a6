"""SparCLI: base class of the commands that read a configuration (fit, cache, validate, evaluate, speed, doctor).

Built on LightningCLI. Each command builds only the parser of its own subcommand. Optimizer and schedule are arguments
of the model, so LightningCLI adds none.
"""

import logging
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from spar_lightning.backbones.checkpoints import STUDENT, local
from spar_lightning.backbones.registry import plugins
from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.callbacks.progress_bar import FitProgress
from spar_lightning.callbacks.run_plots import RunPlots
from spar_lightning.cli.help import GroupHelp
from spar_lightning.cli.lightning_messages import silence
from spar_lightning.cli.parser import Parser
from spar_lightning.cli.ranks import connected, without_signal_handlers
from spar_lightning.configs import find
from spar_lightning.configs.renamed import check_renamed, upgraded, written_by_a_run
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError
from spar_lightning.files.home import expand_home
from spar_lightning.header import read_header
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.stopping import signals

log = logging.getLogger("spar_lightning")

# Defaults of the Trainer that differ from Lightning's.
TRAINER = {
    "max_epochs": 10,  # as in the paper
    "enable_model_summary": False,  # fit prints the trained parameters in one line
    "use_distributed_sampler": False,  # the datamodule splits images over ranks without repeating any
    "num_sanity_val_steps": 0,  # MeanIoU measures all validation sets before training
}


# Patterns of options that commands list in their help. DATA_SHOWN leaves out the single settings of data.augmentation.
DATA_SHOWN = ("data.augmentation.preset", "data.[!a]*")
BENCHMARKS_SHOWN = ("data.benchmarks", "data.benchmark_root")
INFERENCE_SHOWN = ("model.backbone", *(f"model.{name}" for name in InferenceConfig.__dataclass_fields__))


class SparCLI(LightningCLI):
    """One command, with `Distillation` and an `SA1B` datamodule.

    A command that is not a method of the Trainer is a method of the subclass, named by `subcommands`.

    Attributes:
        usage: Arguments after the name of the command, for the first line of the help.
        description: First paragraphs of the help.
        shown: Patterns of the options that the command uses. All keys of a configuration are accepted, because one file
            serves all commands; only these are listed by `--help`.
        trainer_shown: Options of the Trainer that the help names.
        examples: Commands for the end of the help. They work in any folder in which the quickstart has run.
    """

    usage = "--config CONFIG [options]"
    description = ""
    shown: Sequence[str] = ("*",)
    trainer_shown: Sequence[str] = ("accelerator", "devices", "num_nodes", "strategy", "precision")
    examples: Sequence[str] = ()

    def __init__(self, args: Sequence[str]) -> None:
        silence()
        command = next(iter(self.subcommands()))
        self.prepared = prepared = prepare(args)
        plugins()  # classes have short names after their import
        # LightningCLI warns about arguments that are passed in addition to sys.argv, even if they are equal.
        given = None if prepared == sys.argv[2:] and sys.argv[1:2] == [command] else [command, *prepared]
        own = {} if hasattr(Trainer, command) else {command: getattr(type(self), command)}
        super().__init__(
            Distillation,
            SA1B,
            subclass_mode_data=True,
            save_config_callback=None,  # Lightning's raises an error if the folder exists, as it does on resume
            seed_everything_default=0,
            trainer_class=type("Trainer", (Trainer,), own) if own else Trainer,
            trainer_defaults=dict(TRAINER),
            parser_class=Parser,
            parser_kwargs={"prog": "spar"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=given,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of a configuration next to model, data and trainer; they are the same for every command."""
        command = next(iter(self.subcommands()))
        assert isinstance(parser, Parser)
        parser.usage_line, parser.description = self.usage, self.description
        parser.shown, parser.examples = self.shown, self.examples
        parser.titles = {
            "": f"{command} options",
            "model": "model options",
            "data": "data options",
            "mean_iou": "validation options",
            "pictures": "plot options",
        }
        parser.notes = {
            "model": [
                f"All: spar {command} --model.help. Settings of a class: --model.backbone.help SigLIP2, "
                "--model.refine.help LPOSS"
            ],
            "data": [f"All, by class: spar {command} --data.help SA1B, spar {command} --data.help RenderedScenes"],
        }
        parser.more = [
            f"Lightning Trainer options, such as {', '.join(f'--trainer.{name}' for name in self.trainer_shown)}: "
            f"spar {command} --trainer.help",
        ]
        data = Parser(add_help=False)
        data.add_class_arguments(SA1B, "data")
        parser.also = [data]
        for group in ("model", "trainer"):
            parser.add_argument(f"--{group}.help", action=GroupHelp, help=f"List all {group} options and exit.")
        parser.add_lightning_class_args(MeanIoU, "mean_iou")
        parser.add_lightning_class_args(RunPlots, "pictures")
        parser.add_argument(
            "--run_dir", type=str, default="runs/run", help="Folder of the run: checkpoints, logs, plots."
        )
        parser.add_argument(
            "--stop_signals",
            type=list[Literal["SIGUSR1", "SIGUSR2"]],
            default=["SIGUSR1", "SIGUSR2"],
            help="Signals that stop the command like Ctrl-C and SIGTERM do; under SLURM they also requeue the job.",
        )
        parser.add_argument(
            "--rank_timeout",
            type=float,
            default=120.0,
            help="Seconds without a sign of life from another rank after which the command ends with an error.",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int,
            default=500,
            help="Save last.ckpt every N optimizer steps (fit only).",
        )
        parser.add_argument(
            "--tensorboard",
            type=bool,
            default=True,
            help="Write TensorBoard events, in addition to the loggers of trainer.logger (fit only).",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; in all values of configurations, `~` at the beginning of a path is the home folder."""
        super().parse_arguments(parser, args)
        self.config = expand_home(self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        if config.use_distributed_sampler:
            log.warning("trainer.use_distributed_sampler is ignored: it would repeat images to even out the ranks.")
        # A copy: Lightning appends to the list of the configuration, and `spar cache` makes two Trainers.
        given = config.get("callbacks")
        kwargs = {"callbacks": list(given) if isinstance(given, list) else given, **kwargs}
        return without_signal_handlers(super().instantiate_trainer(**{"use_distributed_sampler": False, **kwargs}))

    def ranks(self, fabric: Fabric | None = None) -> AbstractContextManager[None]:
        """Return a context with contact between all ranks, see `cli.ranks.connected`."""
        timeout = self.config[self.subcommand].rank_timeout
        return connected([str(self.subcommand), *self.prepared], self.trainer, timeout, fabric)

    def instantiate_classes(self) -> None:
        """Instantiate all classes, then check settings of one against another."""
        signals.choose(self.config[self.subcommand].stop_signals)
        super().instantiate_classes()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MeanIoU):
                callback.check(self.datamodule)

    def drop_training(self) -> None:
        """Reset settings of training that a measurement does not need: weights of a run contain its LoRA merged."""
        model = self.config[self.subcommand].model
        model.lora_rank = None
        model.loss = Namespace(class_path="torch.nn.MSELoss")  # type: ignore[no-untyped-call]

    def settings(self) -> dict[str, Any]:
        """Return the complete configuration of the command, as plain YAML types."""
        dumped = yaml.safe_load(self.parser.dump(self.config, format="yaml", skip_none=False))  # null is a setting, too
        settings: dict[str, Any] = dumped[self.subcommand]
        settings.pop("config", None)
        return settings


def prepare(args: Sequence[str]) -> list[str]:
    """Return the arguments of a command in the form that LightningCLI expects.

    Configurations are moved to the front, so that an option overrides them wherever it is placed, and names are
    replaced by paths. A config.yaml that an older version wrote into a run folder is replaced by its content with
    current keys.

    Raises:
        UserError: A configuration has a key that was renamed.
    """
    configs: list[str] = []
    others: list[str] = []
    rest = iter(args)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c"):
            given = value if equals else next(rest, None)
            configs += [flag] if given is None else ["--config", _configuration(given)]
        else:
            others.append(arg)
    return [*configs, *others]


def _configuration(given: str) -> str:
    """Return the path of a configuration, or its upgraded content if an older version wrote it into a run folder."""
    found = find(given)
    if os.path.exists(found) and stat.S_ISFIFO(os.stat(found).st_mode):
        found = Path(found).read_text("utf-8")  # a pipe can be read once, but each process reads the configuration
    path = Path(found) if os.path.isfile(found) else None  # otherwise a URL or the configuration itself
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8") if path else found)
    except (yaml.YAMLError, UnicodeDecodeError):
        return found  # the parser reports the position
    if path is not None and written_by_a_run(path) and isinstance(content, dict):
        newer = upgraded(content)
        return found if newer == content else yaml.safe_dump(newer, sort_keys=False)
    check_renamed(content, found if path else "--config")
    return found


def with_run_config(args: Sequence[str], weights: str | None, config: str | None) -> list[str]:
    """Return the arguments, preceded by the configuration of the run or export in `weights` unless one is given."""
    if config is not None or not weights:
        return list(args)
    path = local(weights if os.path.exists(weights) else weights.split(",")[0])  # a name can contain a comma
    if (path / "config.yaml").is_file():
        return ["--config", str(path / "config.yaml"), *args]
    file = path / STUDENT if path.is_dir() else path
    if file.suffix == ".safetensors" and file.is_file() and (block := read_header(file)):
        # An export has no training images; benchmarks come from options.
        data = {"class_path": "spar_lightning.datamodules.SA1B", "init_args": {"shards": []}}
        return ["--config", yaml.safe_dump({"model": block, "data": data}), *args]
    return list(args)


def of_model(arg: str) -> str:
    """Return an inference option such as --stride or --refine.k with the prefix `--model.`."""
    name = arg.removeprefix("--").partition("=")[0].partition(".")[0]
    return f"--model.{arg[2:]}" if arg.startswith("--") and name in InferenceConfig.__dataclass_fields__ else arg


class Position(NamedTuple):
    """Position of a run in a checkpoint: name of the file, finished epochs, optimizer steps."""

    name: str
    epochs: int
    steps: int


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint of `spar fit`; raise UserError if the file is something else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # another zip file, a pickle or a text file raise different types
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}). {_GIVE}") from error
    if not isinstance(checkpoint, dict) or "spar" not in checkpoint:
        raise UserError(f"{path} was not written by spar fit: it lacks the entry 'spar'. {_GIVE}")
    return checkpoint


def check_checkpoint(path: str) -> Position:
    """Return the position of a checkpoint of `spar fit`; raise UserError if the file is something else."""
    checkpoint = read_checkpoint(path)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return Position(Path(path).name, epochs, checkpoint["global_step"])


_GIVE = "Pass a .ckpt file such as runs/NAME/checkpoints/best.ckpt."


def progress(config: Any) -> list[Callback]:
    """Return our progress bar, unless the configuration of the Trainer has another or disables it."""
    others = any(isinstance(callback, ProgressBar) for callback in config.callbacks or [])
    return [] if others or config.enable_progress_bar is False else [FitProgress()]
