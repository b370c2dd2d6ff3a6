"""`spar cache`: computation of the teacher's features before training, without collectives.

The command reads the same configuration file as `spar fit`. Each process takes shards that no other process is working
on. Any number of processes, on any number of machines with a shared folder, can be started and killed at any time.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.backbones.checkpoints import warn_if_random
from spar_lightning.cli.cache_report import CachePlan, summary
from spar_lightning.cli.cache_verify import recompute, show, verify
from spar_lightning.cli.help import CommandParser
from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.cli.processes import Processes
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.distributed import is_first_process, local_rank, world_size
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.feature_cache.shard import CacheError
from spar_lightning.formatting import bytes_text
from spar_lightning.stopping import GRACE, Stopped


class CacheCLI(SparCLI):
    """Command-line interface of `spar cache`, with a Trainer on this process's own device."""

    usage = "--config CONFIG [options] | info DIR | verify DIR | verify --config CONFIG [--recompute N]"
    description = """Compute the teacher's features of the training images and store them in data.cache. The command can
    be stopped and started again at any time, and be started on several machines with a shared folder.

    `spar cache info DIR` shows what a cache contains, `spar cache verify DIR` checks all checksums."""
    shown = (
        *("plan_only", "windows_per_second", "recompute", "stop_signals"),
        *("model.backbone", "model.trainable", "model.compile", "model.stride", "model.blend"),
        *("model.window_batch", "model.attention"),
        *("data.shards", "data.cache*", "data.augmentation.preset", "data.max_images", "data.fraction", "data.keys"),
        *("data.num_workers", "data.seed"),
    )
    trainer_shown = ("devices", "accelerator", "precision")
    examples = ("spar cache --config quickstart --plan_only", "spar cache --config quickstart")

    def __init__(self, args: Sequence[str], verify: bool = False) -> None:
        self.verify = verify
        super().__init__(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the name of the command and the arguments that the CLI sets itself."""
        return {"cache": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the command."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--plan_only", action="store_true", help="Print number of images, disk space and time, then exit."
        )
        parser.add_argument(
            "--windows_per_second",
            type=float | None,
            default=None,
            help="Windows per second of one process, if known from another run; null: measure on this device.",
        )
        parser.add_argument(
            "--recompute",
            type=int,
            default=0,
            help="Compute this many samples again and compare them with the cache, instead of building it.",
        )

    def before_instantiate_classes(self) -> None:
        """Check the number of samples to recompute; with 0, `verify` would build the cache."""
        check_at_least(1 if self.verify else 0, **{"--recompute": self.config.cache.recompute})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer for one process on its own device."""
        # Ignore the world size of a launcher: processes work independently of each other.
        alone = {"logger": False, "enable_checkpointing": False, "plugins": [LightningEnvironment()], **kwargs}
        self.folder = tempfile.TemporaryDirectory(prefix="spar-cache-")  # shard index of a cache that is read-only
        alone["default_root_dir"] = self.folder.name
        everything = super().instantiate_trainer(**alone)
        self.devices = everything.num_devices
        mine: Any = 1
        if everything.strategy.root_device.type != "cpu":
            mine = [everything.device_ids[(local_rank() or 0) % self.devices]]
        return super().instantiate_trainer(**{**alone, "devices": mine, "num_nodes": 1, "strategy": "auto"})

    def cache(self, model: Distillation, datamodule: SA1B) -> None:
        """Compute the teacher's features of the training images and, with data.cache_activations, the activations.

        `spar cache info DIR` describes a cache. `spar cache verify DIR` checks all its data.
        """
        self.trainer.strategy.connect(model)
        self.trainer.strategy.setup_environment()
        datamodule.trainer = self.trainer
        if is_first_process():
            warn_if_random(model.student)
        datamodule.prepare_data()
        config = self.config.cache
        if config.recompute:
            recompute(datamodule, config.recompute)
            return
        cache, images = datamodule.open_cache(), datamodule.images()
        todo = cache.missing(images)
        plan = CachePlan(model, datamodule, todo, config.windows_per_second)
        free = shutil.disk_usage(cache.root).free
        if is_first_process():
            processes = self.devices if local_rank() is None else world_size()
            print(plan.text(cache.root, len(images) - len(todo), free, processes), flush=True)
        if plan.cost.bytes > free:
            raise CacheError(
                f"The features need {bytes_text(plan.cost.bytes)}, but {cache.root} has {bytes_text(free)} free. "
                "Free disk space, set another data.cache, or use fewer images with data.max_images."
            )
        if is_first_process() and datamodule.cache_activations:
            activations = datamodule.open_activations()
            todo_there = activations.tokens.missing(images)
            size = activations.bytes(todo_there, datamodule.augmentation, datamodule.seed)
            print(activations.text(todo_there, size, plan.cost.bytes), flush=True)
        if config.plan_only:
            if is_first_process():
                print("\n" + CachePlan(model, datamodule, images, plan.rate).table())
            return
        others = Processes(["cache", *self.prepared], self.devices) if len(todo) and local_rank() is None else None
        try:
            datamodule.build_cache()
            codes = others.wait() if others else []
        except Stopped:
            if others:
                others.wait(GRACE)
            raise
        finally:
            if others:
                others.close()
        if is_first_process():
            print(summary(cache.index, images))
        if any(codes):
            raise UserError(f"The cache is complete, but other processes of this command exited with codes {codes}.")


# Description, examples and arguments of each action. The examples follow `spar cache --config quickstart`.
ACTIONS = {
    "info": (
        "Show what a cache contains: cache key, number of images, size, skipped images with reasons, work in progress.",
        ("spar cache info data/scenes/seed-0/cache", "spar cache verify data/scenes/seed-0/cache"),
        "DIR",
    ),
    "verify": (
        "Read a cache completely and compare all checksums. Exit code 1 if a file is damaged; the message says which "
        "to delete.\n\nWith --config and --recompute N, also compute N samples again and compare the features.",
        (
            "spar cache verify data/scenes/seed-0/cache",
            "spar cache verify --config quickstart --recompute 2",
        ),
        "DIR | --config CONFIG [--recompute N]",
    ),
}


def run(args: Sequence[str]) -> int:
    """Build a cache, or inspect one with `info` or `verify`; return 1 if `verify` finds damage."""
    configured = (
        args[:1] == ["verify"] and len(args) > 1 and args[1].startswith("-") and args[1] not in ("-h", "--help")
    )
    if args[:1] in (["info"], ["verify"]) and not configured:
        parser = CommandParser(f"spar cache {args[0]}", *ACTIONS[args[0]])
        parser.add_argument("cache", type=Path, help="Folder of the cache.")
        folder = parser.parse_args(args[1:]).cache
        return show(folder) if args[0] == "info" else verify(folder)
    if configured:
        given = [] if any(a.startswith("--recompute") for a in args) else ["--recompute", "4"]
        return verify(CacheCLI([*args[1:], *given], verify=True).datamodule.cache)
    if args and not args[0].startswith("-"):
        raise UserError(f"spar cache {args[0]}: unknown. Allowed: info, verify, or options; see spar cache --help.")
    try:
        CacheCLI(args)
    except Stopped:
        if is_first_process():
            print("Stopped. To continue, run the same command again.", flush=True)
        raise
    return 0
