"""`spar validate`: mIoU of the configured backbone, or of a student from a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.cli.lightning_cli import SparCLI, check_checkpoint, progress
from spar_lightning.errors import UserError
from spar_lightning.markdown import markdown


class ValidateCLI(SparCLI):
    """Measure mIoU."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"}}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.trainer_defaults["callbacks"] = progress(self.config_init.validate.trainer)
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        # Here, because LightningCLI loads the file next, and shows what torch says of a bad one.
        path = self.config.validate.ckpt_path
        if path is not None and not Path(path).is_file():
            raise UserError(
                f"--ckpt_path {path}: no such checkpoint. Give a .ckpt file, such as runs/NAME/checkpoints/best.ckpt, "
                "or leave it out to measure the backbone as it is."
            )
        if path is not None:
            check_checkpoint(path)

    def validate(self, **kwargs: Any) -> None:
        """Run the Trainer's validation and print a line per benchmark."""
        self.trainer.validate(**kwargs, verbose=False)
        results = next(c.results for c in self.trainer.callbacks if isinstance(c, MeanIoU))  # type: ignore[attr-defined]
        if self.trainer.is_global_zero:
            ways = {"single": "single pass", "sliding": f"sliding window, stride {self.model.stride}"}
            print(f"\n{ways[self.model.inference]}, {kwargs['ckpt_path'] or 'the backbone as it is configured'}\n")
            rows = [[name, str(result.images), f"{result.miou:.1f}"] for name, result in results.items()]
            print(markdown([["benchmark", "images", "mIoU"], *rows]))


def run(args: Sequence[str]) -> int:
    """Run the verb."""
    ValidateCLI(args)
    return 0
