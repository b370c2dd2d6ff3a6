"""`spar speed`: rates and ratios of this machine, in one run, on random images and without any data.

The same configuration file as `spar fit`, of which the model counts. Without one the paper's main model is
taken with random weights: speed does not depend on what they are.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError, check_at_least, nearest
from spar_lightning.evaluation.environment import environment
from spar_lightning.speed.bench import Bench, Precision
from spar_lightning.speed.comparison import Comparison
from spar_lightning.speed.read import read
from spar_lightning.speed.segment import segment
from spar_lightning.speed.teacher import teacher
from spar_lightning.speed.train import train

PARTS: Final[dict[str, Callable[[Bench], Iterator[Comparison]]]] = {
    "teacher": teacher,
    "train": train,
    "segment": segment,
    "read": read,
}


class SpeedCLI(SparCLI):
    """The model of a configuration on the Trainer's device."""

    def __init__(self, parts: Sequence[str], args: Sequence[str]) -> None:
        self.parts = parts
        super().__init__(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"speed": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--repeats", type=int, default=5, help="Timed runs of each implementation, interleaved.")
        parser.add_argument("--height", type=int, default=1024, help="Of the image that is segmented, in pixels.")
        parser.add_argument("--width", type=int, default=2048, help="As the height.")
        parser.add_argument(
            "--precision",
            type=Precision | None,
            default=None,
            help="Of our networks; null takes bf16 where the device multiplies it in hardware, else fp32.",
        )
        parser.add_argument("--json", type=str | None, default=None, help="File for the same numbers as JSON.")

    def before_instantiate_classes(self) -> None:
        config = self.config.speed
        check_at_least(1, **{f"--{name}": config[name] for name in ("repeats", "height", "width")})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # The precision is the command's own; that of training may not exist here.
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, precision="32-true", **kwargs)

    def speed(self, model: Distillation, datamodule: SA1B) -> None:
        """Measure the speed of this machine: `spar speed teacher`, `train`, `segment`, `read` or `all`.

        Prints the rate of each implementation of the same work, its fraction of the rate of a large matrix product on
        the device, the speed-up over the published procedure, and peak memory.
        """
        config = self.config.speed
        fabric = Fabric(accelerator=self.config_init.speed.trainer.accelerator, devices=1)
        bench = Bench(
            model,
            fabric.device,
            config.repeats,
            datamodule.augmentation,
            (config.height, config.width),
            config.precision,
        )
        facts = {**environment(fabric), "backbone": type(model.student).__name__, "repeats": config.repeats}
        facts["precision"], facts["native bf16"] = bench.precision, bench.native_bf16
        facts["peak TFLOP/s"] = {name: round(rate / 1e12, 3) for name, rate in bench.peaks.items()}
        print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
        rows = []
        for part in self.parts:
            for comparison in PARTS[part](bench):
                print(f"\n{comparison.table()}", flush=True)
                rows += [{"part": part, **row} for row in comparison.rows()]
        if config.json is not None:
            Path(config.json).write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


def run(args: Sequence[str]) -> int:
    """Measure what the first argument names."""
    if args and args[0] in ("-h", "--help"):
        SpeedCLI([], args)
    allowed = [*PARTS, "all"]
    if not args or args[0] not in allowed:
        given = args[0] if args else "nothing"
        raise UserError(
            f"spar speed {given}: unknown. {nearest(given, allowed)}Allowed are {', '.join(allowed)}, and options "
            "after it; see spar speed --help."
        )
    parts = list(PARTS) if args[0] == "all" else [args[0]]
    SpeedCLI(parts, _with_model(args[1:]))
    return 0


def _with_model(args: Sequence[str]) -> list[str]:
    """The arguments, with the paper's main model where they name no configuration."""
    given = {arg.split("=")[0] for arg in args}
    if given & {"--config", "-c"}:
        return list(args)
    random = [] if "--model.backbone" in given else ["--model.backbone.init_args.pretrained", "null"]
    return ["--config", "siglip2_vitb16", *random, *args]
