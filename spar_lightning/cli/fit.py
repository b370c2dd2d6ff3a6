"""`spar fit`: teacher features, training and validation, with all results in a run folder."""

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
from spar_lightning.cli.lightning_cli import DATA_SHOWN, SparCLI, check_checkpoint, progress
from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError

log = logging.getLogger("spar_lightning")


class Events(TensorBoardLogger):
    """TensorBoard logger that writes no hparams.yaml, because config.yaml contains the settings."""

    def save(self) -> None:
        """Write pending events to disk."""
        self.experiment.flush()


class FitCLI(SparCLI):
    """Command-line interface of `spar fit`."""

    description = """Distill a student: compute the teacher's features that are missing, train, measure mIoU.

    Everything is written to --run_dir. A stopped run continues with --resume auto."""
    shown = (
        *("seed_everything", "run_dir", "resume", "overwrite", "checkpoint_every_n_steps"),
        *("model.*", *DATA_SHOWN, "mean_iou.*", "pictures.*"),
    )
    trainer_shown = ("devices", "num_nodes", "strategy", "precision", "max_epochs", "max_steps", "logger")
    examples = (
        "spar fit --config quickstart",
        "spar fit --config quickstart --data.train_scenes 100 --data.root data/small --run_dir runs/small",
    )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the name of the command and the arguments that the CLI sets itself."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the command."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--resume",
            type=str,
            default="never",
            help="never: start a new run; auto: continue from the last checkpoint, if any; or path of a checkpoint.",
        )
        parser.add_argument("--overwrite", action="store_true", help="Delete an existing run in run_dir.")

    def before_instantiate_classes(self) -> None:
        """Check run folder and checkpoint."""
        config = self.config.fit
        self.folder = RunFolder(config.run_dir, config.resume, config.overwrite)
        self.resumed = self.folder.checkpoint()
        if self.resumed:
            check_checkpoint(self.resumed)
        self.interrupt = SaveOnInterrupt(str(self.folder.checkpoints))

    def before_fit(self) -> None:
        """Create the run folder and write the settings to it."""
        if not self.trainer.is_global_zero:
            return
        self.folder.create()
        settings = self.settings()
        for name in ("resume", "overwrite"):  # options of this start, not settings of the run
            settings.pop(name)
        self.folder.save_config(settings)

    def _facts(self) -> str:
        """Return a description of the run in two lines."""
        module, backbone = self.model, self.model.student
        total = sum(p.numel() for p in backbone.parameters())
        trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        return (
            f"spar_lightning {__version__}: {type(backbone).__name__}, {trained:,} of {total:,} parameters are trained "
            f"({', '.join(module.trainable)}); teacher: windows of {backbone.window} px, "
            f"stride {module.config.stride} px\n"
            f"run folder {self.folder.root}, {type(self.trainer.accelerator).__name__} x {self.trainer.world_size}, "
            f"precision {self.trainer.precision}" + (f", resumed from {self.resumed}" if self.resumed else "")
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer that writes to the run folder."""
        config = self.config_init.fit.trainer
        root = str(self.folder.root)
        if config.default_root_dir not in (None, root):
            log.warning("trainer.default_root_dir is ignored: the run is stored in --run_dir (%s).", root)
        self.trainer_defaults["callbacks"] = self._callbacks(config)
        return super().instantiate_trainer(
            default_root_dir=root,
            logger=[*_loggers(config.logger, root), JSONLLogger(root)],
            plugins=_plugins(config.plugins),
            **kwargs,
        )

    def _callbacks(self, config: Any) -> list[Callback]:
        """Return the callbacks for interrupts, progress and checkpoints."""
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
        """Train, starting from the checkpoint selected by --resume."""
        with self.folder.log() if self.trainer.is_global_zero else nullcontext():
            if self.trainer.is_global_zero:
                print(self._facts())
                log.info(self._facts())
            self._fit(**kwargs)

    def _fit(self, **kwargs: Any) -> None:
        try:
            self.trainer.fit(**kwargs, ckpt_path=self.resumed)
        except UserError:
            # Otherwise the other processes wait for this one and then print tracebacks.
            if kill := getattr(self.trainer.strategy.launcher, "kill", None):
                kill(signal.SIGKILL)
            raise


def _loggers(chosen: Any, root: str) -> Sequence[Logger]:
    """Return the configured loggers, or TensorBoard by default; metrics.jsonl is always written as well."""
    if chosen in (None, True):
        return [Events(root, name="", version="")]
    if chosen is False:
        return []
    return chosen if isinstance(chosen, list) else [chosen]


def _plugins(chosen: Any) -> list[Any]:
    """Return the configured plugins, with crash-safe checkpoints unless they include a CheckpointIO."""
    plugins = [] if chosen is None else chosen if isinstance(chosen, list) else [chosen]
    ours = [] if any(isinstance(plugin, CheckpointIO) for plugin in plugins) else [DurableCheckpointIO()]
    return [*plugins, *ours]


def _without_start(args: Sequence[str]) -> list[str]:
    """Return the arguments of a run without --overwrite and --resume."""
    kept, skip = [], False
    for arg in args:
        if not skip and arg not in ("--overwrite", "--resume") and not arg.startswith("--resume="):
            kept.append(arg)
        skip = arg == "--resume"  # the next argument is its value
    return kept


def run(args: Sequence[str]) -> int:
    """Run `spar fit`; return 130 if it was stopped by Ctrl-C."""
    try:
        cli = FitCLI(args)
    except SystemExit as exit:
        if exit.code == 1:  # Lightning exits with 1 after Ctrl-C
            if is_first_process():
                print(f"Stopped. To continue: spar fit {shlex.join(_without_start(args))} --resume auto")
            return 130
        raise
    if cli.trainer.is_global_zero:
        made = sorted(path for path in Path(cli.folder.root).rglob("*") if path.is_file())
        print("Files of the run:")
        print("\n".join(f"  {path}" for path in made))
    return 0
