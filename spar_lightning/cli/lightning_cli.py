"""SparCLI: what `spar fit` and `spar validate` share of LightningCLI.

Each verb builds the parser of its own subcommand only. Optimizer and schedule are the model's
arguments, so LightningCLI adds none of its own.
"""

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from spar_lightning.backbones.plugins import plugins
from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.callbacks.pictures import Pictures
from spar_lightning.callbacks.progress import FitProgress
from spar_lightning.cli.parser import Parser
from spar_lightning.configs import named
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
    """One verb of the Trainer, with `Distillation` and an `SA1B` datamodule."""

    def __init__(self, args: Sequence[str], **kwargs: Any) -> None:
        _silence()
        args = with_shipped(args)
        check_presets(args)
        plugins()  # imported, their classes have short names
        verb = next(iter(self.subcommands()))
        # LightningCLI warns about arguments given beside those of the process, even where they are the same.
        given = None if list(args) == sys.argv[2:] and sys.argv[1:2] == [verb] else [verb, *args]
        super().__init__(
            Distillation,
            SA1B,
            subclass_mode_data=True,
            save_config_callback=None,  # Lightning's own refuses to resume into the same folder
            seed_everything_default=0,
            trainer_defaults=dict(TRAINER),
            parser_class=Parser,
            parser_kwargs={"prog": "spar"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=given,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a configuration file holds beside model, data and trainer, the same for every verb."""
        parser.add_lightning_class_args(MeanIoU, "mean_iou")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.add_argument("--run_dir", type=str, default="runs/run", help="Folder for everything that fit makes.")
        parser.add_argument(
            "--checkpoint_every_n_steps", type=int, default=500, help="Of fit: steps between two savings of last.ckpt."
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
        """The complete configuration of the verb, as plain YAML types."""
        dumped = yaml.safe_load(self.parser.dump(self.config, format="yaml", skip_none=False))  # null is a setting, too
        settings: dict[str, Any] = dumped[self.subcommand]
        settings.pop("config", None)
        return settings


def with_shipped(args: Sequence[str]) -> list[str]:
    """Arguments in which the name of a shipped configuration is the path of its file."""
    found: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if found and found[-1] in ("--config", "-c"):
            found.append(named(arg))
        elif equals and flag == "--config":
            found.append(f"{flag}={named(value)}")
        else:
            found.append(arg)
    return found


def check_presets(args: Sequence[str]) -> None:
    """Raise UserError if a preset and single settings are given side by side: jsonargparse would drop the preset."""
    names = {arg.split("=")[0] for arg in args}
    for key in ("--refine", "--model.refine", "--data.augmentation"):
        if key in names and (single := sorted(name for name in names if name.startswith(f"{key}."))):
            raise UserError(
                f"{key} and {single[0]} exclude each other. Give a preset alone, or all settings that differ from the "
                f"defaults, such as {single[0]}."
            )


def check_checkpoint(path: str) -> None:
    """Raise UserError unless the file is a checkpoint of `spar fit`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a zip of something else, a pickle, a text: each fails in its own way
        raise UserError(f"{path} is no checkpoint that can be read ({type(error).__name__}). {_GIVE}") from error
    if not isinstance(checkpoint, dict) or "spar" not in checkpoint:
        raise UserError(f"{path} was not written by spar fit: it lacks the entry 'spar'. {_GIVE}")


_GIVE = "Give a .ckpt file such as runs/NAME/checkpoints/best.ckpt."


def progress(trainer: Any) -> list[Callback]:
    """Our progress bars, unless the Trainer's configuration has others or none."""
    others = any(isinstance(callback, ProgressBar) for callback in trainer.callbacks or [])
    return [] if others or trainer.enable_progress_bar is False else [FitProgress()]


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
        "Be aware that when using `ckpt_path`, callbacks used to create",  # validate needs those of mIoU alone
        ".*Checkpoint directory .* exists and is not empty",  # RunFolder has decided about that
    ):
        warnings.filterwarnings("ignore", message)
