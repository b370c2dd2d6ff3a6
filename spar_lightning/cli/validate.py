"""`spar validate`: mIoU of the configured backbone or a trained student on the configured validation sets."""

from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.backbones.checkpoints import load_weights, warn_if_random
from spar_lightning.backbones.weights import without_weights
from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.cli.lightning_cli import (
    BENCHMARKS_SHOWN,
    INFERENCE_SHOWN,
    SparCLI,
    of_model,
    progress,
    with_run_config,
)
from spar_lightning.formatting import markdown
from spar_lightning.sliding_window import SlidingWindow


class ValidateCLI(SparCLI):
    """Command-line interface of `spar validate`."""

    usage = "--weights WEIGHTS | --config CONFIG [options]"
    description = """Measure the mIoU of the configured backbone or of a student on the validation sets.

    Settings of inference may be given without `model.`: --inference sliding, --stride 32, --refine LPOSS."""
    shown = ("weights", *INFERENCE_SHOWN, *BENCHMARKS_SHOWN, "mean_iou.benchmarks", "mean_iou.max_images")
    trainer_shown = ("devices", "num_nodes", "precision")
    examples = ("spar validate --config quickstart", "spar validate --config quickstart --inference sliding")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the name of the command and the arguments that the CLI sets itself."""
        return {"validate": {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only", "verbose"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the command."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Run folder, checkpoint of spar fit, export, hf-hub:org/name, or weight file; null: the backbone as "
            "configured.",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer without logger and checkpoints."""
        self.trainer_defaults["callbacks"] = progress(self.config_init.validate.trainer)
        return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)

    def instantiate_classes(self) -> None:
        """Create model and data; load the weights of --weights if given."""
        self.drop_training()
        with without_weights() if self.config.validate.weights else nullcontext():
            super().instantiate_classes()
        if self.config.validate.weights:
            load_weights(self.model.student, self.config.validate.weights)
        else:
            warn_if_random(self.model.student)

    def validate(self, **kwargs: Any) -> None:
        """Run the Trainer's validation and print a table with one row per benchmark."""
        with self.ranks():
            self.trainer.validate(**kwargs, verbose=False)
        results = next(c.results for c in self.trainer.callbacks if isinstance(c, MeanIoU))  # type: ignore[attr-defined]
        if self.trainer.is_global_zero:
            config = self.model.config
            windows = SlidingWindow(self.model.student, config.stride, blend=config.blend)
            kinds = {"single": "single pass", "sliding": f"sliding window, {windows.description()}"}
            print(f"\n{kinds[config.inference]}, {self.config.validate.weights or 'the backbone as configured'}\n")
            rows = [[name, str(result.images), f"{result.miou:.1f}"] for name, result in results.items()]
            print(markdown([["benchmark", "images", "mIoU"], *rows]))


def run(args: Sequence[str]) -> int:
    """Run `spar validate`."""
    given, _ = weights_options().parse_known_args(args)
    ValidateCLI(with_run_config([of_model(arg) for arg in args], given.weights, given.config))
    return 0


def weights_options() -> ArgumentParser:
    """Return a parser of the options that decide which configuration is read."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--weights")
    parser.add_argument("--config", "-c")
    return parser
