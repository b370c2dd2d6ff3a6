"""SparCLI: the commands that read a configuration (fit, cache, validate, evaluate, speed, doctor), by LightningCLI.

Each command builds the parser of its own subcommand only. Optimizer and schedule are the model's arguments, so
LightningCLI adds none of its own.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from spar_lightning.backbones.registry import plugins
from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.callbacks.progress_bar import FitProgress
from spar_lightning.callbacks.run_plots import RunPlots
from spar_lightning.cli.parser import Parser
from spar_lightning.configs import find
from spar_lightning.configs.renamed import check_renamed, upgraded, written_by_a_run
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError

log = logging.getLogger("spar_lightning")

# Defaults of the Trainer that differ from Lightning's.
TRAINER = {
    "max_epochs": 10,  # as the paper
    "enable_model_summary": False,  # fit prints what trains, in a line
    "use_distributed_sampler": False,  # the datamodule splits over ranks itself, without repeating images
    "num_sanity_val_steps": 0,  # MeanIoU measures the whole of the validation sets before training
}


class SparCLI(LightningCLI):
    """One command, with `Distillation` and an `SA1B` datamodule.

    A command that is not a method of the Trainer is a method of the subclass: `subcommands` names it, and its docstring
    is the text of `--help`.
    """

    def __init__(self, args: Sequence[str]) -> None:
        _silence()
        command = next(iter(self.subcommands()))
        prepared = prepare(args)
        plugins()  # once imported, their classes have short names
        # LightningCLI warns about arguments passed in addition to those of the process, even if they are the same.
        given = None if prepared == sys.argv[2:] and sys.argv[1:2] == [command] else [command, *prepared]
        own = {} if hasattr(Trainer, command) else {command: getattr(type(self), command)}
        super().__init__(
            Distillation,
            SA1B,
            subclass_mode_data=True,
            save_config_callback=None,  # Lightning's own refuses to resume into the same folder
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
        parser.add_lightning_class_args(MeanIoU, "mean_iou")
        parser.add_lightning_class_args(RunPlots, "pictures")
        parser.add_argument("--run_dir", type=str, default="runs/run", help="Folder for everything that fit writes.")
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int,
            default=500,
            help="Save last.ckpt every N optimizer steps (fit only).",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        if config.use_distributed_sampler:
            log.warning("trainer.use_distributed_sampler is ignored: it would repeat images to even out the ranks.")
        return super().instantiate_trainer(**{"use_distributed_sampler": False, **kwargs})

    def instantiate_classes(self) -> None:
        """Make everything, and compare what only shows side by side."""
        super().instantiate_classes()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MeanIoU):
                callback.check(self.datamodule)

    def settings(self) -> dict[str, Any]:
        """Return the complete configuration of the command, as plain YAML types."""
        dumped = yaml.safe_load(self.parser.dump(self.config, format="yaml", skip_none=False))  # null is a setting, too
        settings: dict[str, Any] = dumped[self.subcommand]
        settings.pop("config", None)
        return settings


def prepare(args: Sequence[str]) -> list[str]:
    """Return the arguments of a command as LightningCLI takes them.

    Configurations come first, so that an option changes them wherever it is placed, and are paths instead of names. A
    config.yaml that an older version wrote into a run folder is replaced by its content in today's keys.

    Raises:
        UserError: A configuration has an old key.
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
    """Return the path of a configuration, or the content of a run's own where an older version wrote it."""
    found = find(given)
    path = Path(found) if os.path.isfile(found) else None  # otherwise a URL or the configuration itself
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8") if path else found)
    except (yaml.YAMLError, UnicodeDecodeError):
        return found  # the parser says where
    if path is not None and written_by_a_run(path) and isinstance(content, dict):
        newer = upgraded(content)
        return found if newer == content else yaml.safe_dump(newer, sort_keys=False)
    check_renamed(content, found if path else "--config")
    return found


def with_run_config(args: Sequence[str], weights: str | None, config: str | None) -> list[str]:
    """Return the arguments with the configuration of the run whose weights are given, unless one is named."""
    path = Path((weights or "").split(",")[0]) / "config.yaml"
    return ["--config", str(path), *args] if config is None and weights and path.is_file() else list(args)


def check_checkpoint(path: str) -> None:
    """Raise UserError unless the file is a checkpoint of `spar fit`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a zip of something else, a pickle, a text: each fails in its own way
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}). {_GIVE}") from error
    if not isinstance(checkpoint, dict) or "spar" not in checkpoint:
        raise UserError(f"{path} was not written by spar fit: it lacks the entry 'spar'. {_GIVE}")


_GIVE = "Give a .ckpt file such as runs/NAME/checkpoints/best.ckpt."


def progress(config: Any) -> list[Callback]:
    """Return our progress bars, unless the Trainer's configuration has others or none."""
    others = any(isinstance(callback, ProgressBar) for callback in config.callbacks or [])
    return [] if others or config.enable_progress_bar is False else [FitProgress()]


def _worth_reading(record: logging.LogRecord) -> bool:
    """Not so: hints to install litlogger and litmodels (lightning 2.6, trainer.py), lists of absent accelerators."""
    return not re.match(r".*(litlogger|litmodels)|Seed set to|[GTH]PU available", record.getMessage())


def _silence() -> None:
    """Keep Lightning's hints about other products and about choices that are ours off the screen."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_worth_reading)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 with torch 2.15: utilities/_pytree.py
        "Found .* module.* in eval mode",  # the contract: a backbone is always in eval mode
        "The '.*_dataloader' does not have many workers",
        ".*does not have a `val_dataloader`",
        "Total length of .* across ranks is zero",  # no validation sets are configured
        "It is recommended to use `self.log.*sync_dist=True",  # MeanIoU logs what is summed over processes already
        "LightningCLI's args parameter is intended to run from within Python",  # main(args) is that
        ".*Checkpoint directory .* exists and is not empty",  # RunFolder has decided about that
    ):
        warnings.filterwarnings("ignore", message)
