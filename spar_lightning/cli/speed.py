"""`spar speed`: throughput on this machine and speed-up over the published procedure, on random images.

The command reads the same configuration file as `spar fit` and uses its model. Without a configuration it uses the
paper's main model with random weights, because speed does not depend on the weights.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.cli.output import check_new_file
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
    """Command-line interface of `spar speed`: the model of a configuration on the Trainer's device.

    Args:
        parts: Names of the measurements, keys of `PARTS`.
        args: Further arguments of the command line.
    """

    usage = "{teacher,train,segment,read,all} [options]"
    description = """Measure the speed of the teacher, of training, of segmentation or of reading a cache on this
    machine. Each is compared with the network alone and with the published procedure, in interleaved repeats. Images
    and weights are random.

    Prints the rate of each implementation, its fraction of the rate of a large matrix product, and peak memory."""
    shown = (
        *("repeats", "height", "width", "precision", "json", "data.augmentation.preset"),
        *(
            "model.backbone",
            "model.trainable",
            "model.stride",
            "model.window_batch",
            "model.compile",
            "model.attention",
            "model.templates",
        ),
    )
    trainer_shown = ("accelerator",)
    examples = (
        "spar speed train --config quickstart --data.augmentation.preset small",
        "spar speed teacher --config quickstart --data.augmentation.preset small --repeats 3",
    )

    def __init__(self, parts: Sequence[str], args: Sequence[str]) -> None:
        self.parts = parts
        super().__init__(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the name of the command and the arguments that the CLI sets itself."""
        return {"speed": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the command."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--repeats", type=int, default=5, help="Timed runs of each implementation, interleaved.")
        parser.add_argument("--height", type=int, default=1024, help="Height of the segmented image, in pixels.")
        parser.add_argument("--width", type=int, default=2048, help="Width of the segmented image, in pixels.")
        parser.add_argument(
            "--precision",
            type=Precision | None,
            default=None,
            help="Precision of this package's networks; null: bf16 if the device supports it in hardware, else fp32.",
        )
        parser.add_argument("--json", type=str | None, default=None, help="Also write the results to a new JSON file.")

    def before_instantiate_classes(self) -> None:
        """Check the options."""
        config = self.config.speed
        check_at_least(1, **{f"--{name}": config[name] for name in ("repeats", "height", "width")})
        if config.json is not None:
            check_new_file("--json", Path(config.json))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer without logger and checkpoints."""
        # trainer.precision is not used, and this device may not support it; --precision is used instead.
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, precision="32-true", **kwargs)

    def speed(self, model: Distillation, datamodule: SA1B) -> None:
        """Measure the speed of this machine: `spar speed teacher`, `train`, `segment`, `read` or `all`.

        Prints for each implementation of the same task: its rate, the fraction of the FLOP rate of a large matrix
        multiplication on the device, the speed-up over the published procedure, and peak memory.
        """
        config = self.config.speed
        fabric = Fabric(accelerator=self.config_init.speed.trainer.accelerator, devices=1)
        bench = Bench(
            model,
            fabric.device,
            config.repeats,
            datamodule.augmentation.for_patch(model.student.patch_size),
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
            with open(config.json, "x", encoding="utf-8") as file:
                file.write(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


def run(args: Sequence[str]) -> int:
    """Run the measurements named by the first argument."""
    if args and args[0] in ("-h", "--help"):
        SpeedCLI([], args)
    allowed = [*PARTS, "all"]
    if not args or args[0] not in allowed:
        given = args[0] if args else "nothing"
        raise UserError(
            f"spar speed {given}: unknown. {nearest(given, allowed)}Allowed: {', '.join(allowed)}, followed by "
            "options; see spar speed --help."
        )
    parts = list(PARTS) if args[0] == "all" else [args[0]]
    SpeedCLI(parts, _with_model(args[1:]))
    return 0


def _with_model(args: Sequence[str]) -> list[str]:
    """Return the arguments, with the paper's main model if they name no configuration."""
    given = {arg.split("=")[0] for arg in args}
    if given & {"--config", "-c"}:
        return list(args)
    random = [] if "--model.backbone" in given else ["--model.backbone.init_args.pretrained", "null"]
    return ["--config", "siglip2_vitb16", *random, *args]
