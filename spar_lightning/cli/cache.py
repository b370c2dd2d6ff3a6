"""`spar cache`: the teacher's features on disk, before training and without its collectives.

The same configuration file as `spar fit`. Every process takes shards that nobody works on, so any
number of them, on any number of machines over a shared folder, may be started and killed at any time.
"""

import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.cli.cache_report import CachePlan, summary
from spar_lightning.cli.cache_verify import recompute, show, verify
from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.distributed import is_first_process, local_rank, world_size
from spar_lightning.errors import UserError
from spar_lightning.feature_cache.shard import CacheError
from spar_lightning.formatting import bytes_text


class CacheCLI(SparCLI):
    """Model and data of a configuration, with a Trainer on this process's own device."""

    def __init__(self, args: Sequence[str]) -> None:
        self.given = list(args)
        super().__init__(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"cache": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--plan_only", action="store_true", help="Say what would be done and what it costs.")
        parser.add_argument(
            "--windows_per_second",
            type=float | None,
            default=None,
            help="Rate of one process, measured elsewhere; null measures it here.",
        )
        parser.add_argument("--recompute", type=int, default=0, help="Of verify: samples to compute once more.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # A launcher's world is of no interest: every process works for itself, on its own device.
        alone = {"logger": False, "enable_checkpointing": False, "plugins": [LightningEnvironment()], **kwargs}
        everything = super().instantiate_trainer(**alone)
        self.devices = everything.num_devices
        mine: Any = 1
        if everything.strategy.root_device.type != "cpu":
            mine = [everything.device_ids[(local_rank() or 0) % self.devices]]
        return super().instantiate_trainer(**{**alone, "devices": mine, "num_nodes": 1, "strategy": "auto"})

    def cache(self, model: Distillation, datamodule: SA1B) -> None:
        """Compute the teacher's features of the training images, and with data.cache_activations those tokens.

        `spar cache info DIR` shows what a cache contains, `spar cache verify DIR` reads all of it.
        """
        self.trainer.strategy.connect(model)
        self.trainer.strategy.setup_environment()
        datamodule.trainer = self.trainer
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
            if datamodule.cache_activations:
                activations = datamodule.open_activations()
                todo_there = activations.tokens.missing(images)
                text = activations.text(todo_there, datamodule.augmentation, datamodule.seed)
                print(text, flush=True)
        if plan.cost.bytes > free:
            raise CacheError(
                f"The features take {bytes_text(plan.cost.bytes)}, but {cache.root} has {bytes_text(free)} free. Make "
                "room, give another data.cache, or take fewer images with data.max_images."
            )
        if config.plan_only:
            if is_first_process():
                print("\n" + CachePlan(model, datamodule, images, plan.rate).table())
            return
        workers = self._start_workers() if len(todo) else []
        try:
            datamodule.build_cache()
        except BaseException:
            for worker in workers:
                worker.terminate()
            raise
        codes = [worker.wait() for worker in workers]
        if is_first_process():
            print(summary(cache.index, images))
        if any(codes):
            raise UserError(f"The cache is complete, but other processes of this command ended with codes {codes}.")

    def _start_workers(self) -> list["subprocess.Popen[bytes]"]:
        """One process for each further device, unless a launcher has started them."""
        if local_rank() is not None:
            return []
        command = [sys.executable, "-m", "spar_lightning", "cache", *self.given]
        world = {**os.environ, "WORLD_SIZE": str(self.devices)}
        ranks = map(str, range(1, self.devices))
        return [subprocess.Popen(command, env={**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]


def run(args: Sequence[str]) -> int:
    """Build, or with `info` and `verify` look at what is there."""
    configured = (
        args[:1] == ["verify"] and len(args) > 1 and args[1].startswith("-") and args[1] not in ("-h", "--help")
    )
    if args[:1] in (["info"], ["verify"]) and not configured:
        parser = ArgumentParser(f"spar cache {args[0]}", description=(show if args[0] == "info" else verify).__doc__)
        parser.add_argument("cache", type=Path, help="folder of the cache")
        folder = parser.parse_args(args[1:]).cache
        return show(folder) if args[0] == "info" else verify(folder)
    if configured:
        cli = CacheCLI([*args[1:], *([] if any(a.startswith("--recompute") for a in args) else ["--recompute", "4"])])
        return verify(cli.datamodule.cache)
    if args and not args[0].startswith("-"):
        raise UserError(f"spar cache {args[0]}: unknown. Allowed are info, verify, or options; see spar cache --help.")
    CacheCLI(args)
    return 0
