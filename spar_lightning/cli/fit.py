"""`spar fit`: teacher features, training, validation, and a run folder with all that came of it."""

import logging
import shlex
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from spar_lightning import __version__
from spar_lightning.callbacks.checkpoint import DurableCheckpointIO, LastCheckpoint
from spar_lightning.callbacks.graceful_stop import SaveOnInterrupt
from spar_lightning.callbacks.jsonl_logger import JSONLLogger
from spar_lightning.cli.fit_run_folder import RunFolder
from spar_lightning.cli.lightning_cli import SparCLI, check_checkpoint, progress
from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError

log = logging.getLogger("spar_lightning")


class Events(TensorBoardLogger):
    """TensorBoard events alone: config.yaml holds the settings, so no hparams.yaml beside it."""

    def save(self) -> None:
        self.experiment.flush()


class FitCLI(SparCLI):
    """Distill a student."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--resume",
            type=str,
            default="never",
            help="auto: from the last checkpoint of the run if there is one; or the path of a checkpoint.",
        )
        parser.add_argument("--overwrite", action="store_true", help="Delete the run that lies in run_dir.")

    def before_instantiate_classes(self) -> None:
        config = self.config.fit
        self.folder = RunFolder(config.run_dir, config.resume, config.overwrite)
        self.resumed = self.folder.checkpoint()
        if self.resumed:
            check_checkpoint(self.resumed)
        self.interrupt = SaveOnInterrupt(str(self.folder.checkpoints))

    def before_fit(self) -> None:
        if not self.trainer.is_global_zero:
            return
        self.folder.create()
        settings = self.settings()
        for name in ("resume", "overwrite"):  # they belong to one start, not to the run
            settings.pop(name)
        self.folder.save_config(settings)

    def _facts(self) -> str:
        """What was decided, in two lines."""
        module, backbone = self.model, self.model.student
        total = sum(p.numel() for p in backbone.parameters())
        trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        return (
            f"spar_lightning {__version__}: {type(backbone).__name__}, {trained:,} of {total:,} parameters train "
            f"({', '.join(module.trainable)}); teacher: windows of {backbone.window} px, "
            f"stride {module.config.stride} px\n"
            f"run folder {self.folder.root}, {type(self.trainer.accelerator).__name__} x {self.trainer.world_size}, "
            f"precision {self.trainer.precision}" + (f", resumed from {self.resumed}" if self.resumed else "")
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init.fit.trainer
        root = str(self.folder.root)
        if config.default_root_dir not in (None, root):
            log.warning("trainer.default_root_dir is ignored: a run lies in --run_dir, here %s.", root)
        self.trainer_defaults["callbacks"] = self._callbacks(config)
        return super().instantiate_trainer(
            default_root_dir=root,
            logger=[*_loggers(config.logger, root), JSONLLogger(root)],
            plugins=_plugins(config.plugins),
            **kwargs,
        )

    def _callbacks(self, config: Any) -> list[Callback]:
        callbacks: list[Callback] = [self.interrupt, *progress(config)]
        if config.enable_checkpointing is not False:
            folder = str(self.folder.checkpoints)
            callbacks.append(LastCheckpoint(folder, self.config_init.fit.checkpoint_every_n_steps))
            if self.datamodule.benchmarks:
                callbacks.append(
                    ModelCheckpoint(folder, "best", monitor="mIoU/mean", mode="max", enable_version_counter=False)
                )
        return callbacks

    def fit(self, **kwargs: Any) -> None:
        """Train, from the checkpoint that --resume chose."""
        with self.folder.log() if self.trainer.is_global_zero else nullcontext():
            if self.trainer.is_global_zero:
                print(self._facts())
                log.info(self._facts())
            self._fit(**kwargs)

    def _fit(self, **kwargs: Any) -> None:
        try:
            self.trainer.fit(**kwargs, ckpt_path=self.resumed)
        except UserError:
            # Lightning's other processes would wait for this one and then print tracebacks.
            if kill := getattr(self.trainer.strategy.launcher, "kill", None):
                kill(signal.SIGKILL)
            raise


def _loggers(chosen: Any, root: str) -> Sequence[Logger]:
    """The user's loggers, or TensorBoard; metrics.jsonl is always written beside them."""
    if chosen in (None, True):
        return [Events(root, name="", version="")]
    if chosen is False:
        return []
    return chosen if isinstance(chosen, list) else [chosen]


def _plugins(chosen: Any) -> list[Any]:
    """The user's plugins, and checkpoints that survive a crash unless those bring their own."""
    plugins = [] if chosen is None else chosen if isinstance(chosen, list) else [chosen]
    ours = [] if any(isinstance(plugin, CheckpointIO) for plugin in plugins) else [DurableCheckpointIO()]
    return [*plugins, *ours]


def _without_start(args: Sequence[str]) -> list[str]:
    """The arguments of a run, without those that say how it starts."""
    kept, skip = [], False
    for arg in args:
        if not skip and arg not in ("--overwrite", "--resume") and not arg.startswith("--resume="):
            kept.append(arg)
        skip = arg == "--resume"  # its value follows
    return kept


def run(args: Sequence[str]) -> int:
    """Run the command; 130 where Ctrl-C stopped it."""
    try:
        cli = FitCLI(args)
    except SystemExit as exit:
        if exit.code == 1:  # Lightning's way out after Ctrl-C
            if is_first_process():
                print(f"Stopped. To go on: spar fit {shlex.join(_without_start(args))} --resume auto")
            return 130
        raise
    if cli.trainer.is_global_zero:
        made = sorted(path for path in Path(cli.folder.root).rglob("*") if path.is_file())
        print("The run left:")
        print("\n".join(f"  {path}" for path in made))
    return 0
