"""`spar fit`: teacher features, training and validation, with all results in a run folder."""

import logging
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from spar_lightning import __version__
from spar_lightning.backbones.checkpoints import warn_if_random
from spar_lightning.callbacks.checkpoint import BestCheckpoint, DurableCheckpointIO, LastCheckpoint
from spar_lightning.callbacks.event_file import Events
from spar_lightning.callbacks.jsonl_logger import JSONLLogger
from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.callbacks.run_loggers import create_logger, log_settings
from spar_lightning.cli.fit_log import log_to
from spar_lightning.cli.fit_run_files import START
from spar_lightning.cli.fit_run_folder import RunFolder, RunFolderError
from spar_lightning.cli.lightning_cli import DATA_SHOWN, Position, SparCLI, check_checkpoint, progress
from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError, nearest
from spar_lightning.stopping import Stopped

log = logging.getLogger("spar_lightning")

OURS: Final = ("lightning", "spar_lightning")  # packages whose callbacks log no further metrics


class FitCLI(SparCLI):
    """Command-line interface of `spar fit`."""

    description = """Distill a student: compute the teacher's features that are missing, train, measure mIoU.

    Everything is written to --run_dir. A stopped run continues with --resume auto."""
    shown = (
        *("seed_everything", "run_dir", "resume", "overwrite", "checkpoint_every_n_steps", "tensorboard"),
        *("stop_signals", "rank_timeout"),
        *("model.backbone", "model.trainable", "model.lora_rank", "model.loss", "model.lr", "model.weight_decay"),
        *("model.lr_schedule", "model.compile", "model.stride", "model.blend", "model.window_batch", "model.templates"),
        *("model.refine", "model.upsampler", "model.attention"),
        *(*DATA_SHOWN, "mean_iou.*", "pictures.*"),
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
        parser.add_argument("--overwrite", action="store_true", help="Replace the run in run_dir; keep other files.")
        for cls in (WandbLogger, MLFlowLogger):
            parser.add_instantiator(lambda cls, **given: create_logger(self.folder.root, cls, **given), cls)

    def before_instantiate_classes(self) -> None:
        """Check run folder and checkpoint."""
        config = self.config.fit
        self.folder = RunFolder(config.run_dir, config.resume, config.overwrite)
        self.resumed = self.folder.checkpoint()
        self.position = check_checkpoint(self.resumed) if self.resumed else None
        if self.position:
            _check_end(self.position, config.trainer.max_epochs, config.trainer.max_steps)

    def _start_folder(self) -> None:
        """Create the run folder and write the settings to it."""
        settings = {name: value for name, value in self.settings().items() if name not in START}
        self.folder.create(settings)
        log_settings(self.trainer.loggers, settings)

    def _facts(self) -> str:
        """Return a description of the run in two lines."""
        module, backbone = self.model, self.model.student
        total = sum(p.numel() for p in backbone.parameters())
        trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        rank = "" if module.lora_rank is None else f"; LoRA of rank {module.lora_rank}"
        return (
            f"spar_lightning {__version__}: {type(backbone).__name__}, {trained:,} of {total:,} parameters are trained "
            f"({', '.join(module.trainable)}{rank}); teacher: {module.sliding_window(backbone).description()}\n"
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
            logger=[*_loggers(config.logger, self.config_init.fit.tensorboard, root), JSONLLogger(root)],
            plugins=_plugins(config.plugins),
            **kwargs,
        )

    def instantiate_classes(self) -> None:
        """Instantiate all classes, put checkpoints into the run folder, and check what callbacks monitor."""
        super().instantiate_classes()
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder.checkpoints)  # otherwise a folder of the first logger
        if any(type(callback).__module__.split(".")[0] not in OURS for callback in callbacks):
            return  # a callback of the user can log any metric
        chosen = next(callback.benchmarks for callback in callbacks if isinstance(callback, MeanIoU))
        names = [b.name for b in self.datamodule.benchmarks if chosen is None or b.name in chosen]
        logged = ["loss", *(f"mIoU/{name}" for name in names), *(["mIoU/mean"] if names else [])]
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in logged:
                raise UserError(
                    f"trainer.callbacks: {type(callback).__name__} monitors {monitor!r}, which is not logged. "
                    f"{nearest(monitor, logged)}Allowed: {', '.join(logged)}."
                )

    def _callbacks(self, config: Any) -> list[Callback]:
        """Return the callbacks for progress and checkpoints."""
        callbacks: list[Callback] = [*progress(config)]
        if config.enable_checkpointing is not False:
            folder = str(self.folder.checkpoints)
            callbacks.append(LastCheckpoint(folder, self.config_init.fit.checkpoint_every_n_steps))
            if self.datamodule.benchmarks:
                callbacks.append(BestCheckpoint(folder))
        return callbacks

    def fit(self, **kwargs: Any) -> None:
        """Train, starting from the checkpoint selected by --resume."""
        first = self.trainer.is_global_zero
        with self.folder.lease() if first else nullcontext():
            if first:
                self._start_folder()
            with self.ranks(), log_to(self.folder.log) if first else nullcontext():
                self._train(**kwargs)

    def _train(self, **kwargs: Any) -> None:
        if self.trainer.is_global_zero:
            print(self._facts())
            log.info(self._facts())
            if not self.resumed:
                warn_if_random(self.model.student)
        self._compare_checkpoints()
        self.trainer.fit(**kwargs, ckpt_path=self.resumed)

    def _compare_checkpoints(self) -> None:
        """Raise RunFolderError if this rank resumes from another checkpoint than rank 0."""
        first: Position | None = self.trainer.strategy.broadcast(self.position)
        if self.position != first:
            raise RunFolderError(
                f"Rank {self.trainer.global_rank} finds {_named(self.position)} to resume from, but rank 0 finds "
                f"{_named(first)}. All machines need access to the same --run_dir. Put it on a shared file system."
            )


def _loggers(chosen: Any, tensorboard: bool, root: str) -> Sequence[Logger]:
    """Return the configured loggers and ours for TensorBoard, unless it is turned off or the user has one."""
    if chosen is False:
        return []
    loggers = [] if chosen in (None, True) else chosen if isinstance(chosen, list) else [chosen]
    ours = tensorboard and not any(isinstance(logger, TensorBoardLogger) for logger in loggers)
    return [*loggers, Events(root)] if ours else loggers


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


def _named(position: Position | None) -> str:
    return "no checkpoint" if position is None else f"{position.name} of step {position.steps}"


def _check_end(position: Position, max_epochs: int | None, max_steps: int) -> None:
    """Raise UserError if a run would end before the position at which it resumes."""
    for name, end, done in (("max_epochs", max_epochs, position.epochs), ("max_steps", max_steps, position.steps)):
        if end is not None and 0 <= end < done:
            raise UserError(
                f"trainer.{name} is {end}, but {position.name} was saved after {done} of them. Set --trainer.{name} to "
                "at least that number, or start a new run with another --run_dir."
            )


def run(args: Sequence[str]) -> int:
    """Run `spar fit`."""
    try:
        cli = FitCLI(args)
    except Stopped:
        if is_first_process():
            print(f"Stopped. To continue: spar fit {shlex.join(_without_start(args))} --resume auto", flush=True)
        raise
    if cli.trainer.is_global_zero:
        made = sorted(path for path in Path(cli.folder.root).rglob("*") if path.is_file())
        print("Files of the run:")
        print("\n".join(f"  {path}" for path in made))
    return 0
