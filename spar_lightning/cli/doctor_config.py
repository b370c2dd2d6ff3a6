"""Check of a configuration by `spar doctor --config`: its folders, and two training steps."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Trainer

from spar_lightning.cli.doctor_checks import Finding, disk
from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError
from spar_lightning.evaluation.timing import Peak

STEPS: Final = 2


class DoctorCLI(SparCLI):
    """Command-line interface of `spar doctor --config`: two training steps on one device.

    Args:
        args: Arguments of the configuration, as for `spar fit`.
        folder: Temporary folder for all files that the steps write.
    """

    def __init__(self, args: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.findings: list[Finding] = []
        super().__init__(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the name of the command and the arguments that the CLI sets itself."""
        return {"doctor": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer for two steps on one device."""
        return super().instantiate_trainer(
            fast_dev_run=STEPS, enable_progress_bar=False, devices=1, num_nodes=1, strategy="auto",
            default_root_dir=str(self.folder), **kwargs,
        )  # fmt: skip

    def doctor(self, model: Distillation, datamodule: SA1B) -> None:
        """Check the folders of a configuration and run two training steps."""
        self.findings += self._folders(model, datamodule)
        self.findings.append(self._steps(model, datamodule))

    def _folders(self, model: Distillation, datamodule: SA1B) -> Iterator[Finding]:
        cache = datamodule.cache
        yield disk("run_dir", Path(self.config.doctor.run_dir), "set another --run_dir")
        if cache is None:
            yield Finding("cache", "not set: the teacher runs in every step")
            return
        yield disk("data.cache", cache, "set another data.cache")
        if not (cache / "manifest.json").exists():
            yield Finding("cache", f"{cache} is empty: spar fit fills it before training; spar cache can do so earlier")
            return
        self.trainer.strategy.connect(model)
        datamodule.trainer = self.trainer
        index = datamodule.open_cache().index  # raises if another configuration built the cache
        index.refresh()
        yield Finding("cache", f"{cache}: {len(index):,} images with features")

    def _steps(self, model: Distillation, datamodule: SA1B) -> Finding:
        # Use few windows, because the check is about the student's steps.
        model.config = replace(model.config, stride=model.student.window)
        datamodule.shorten(STEPS, self.folder)
        start, peak = time.monotonic(), Peak(self.trainer.strategy.root_device)
        self.trainer.fit(model, datamodule=datamodule)
        loss = self.trainer.callback_metrics["loss"].item()
        device = self.trainer.strategy.root_device
        text = f"{STEPS} steps of {type(model.student).__name__} on {device} in {time.monotonic() - start:.1f} s"
        memory = peak.mebibytes()
        return Finding("dry run", f"{text}, loss {loss:.4g}" + (f", peak memory {memory:,.0f} MiB" if memory else ""))


def configuration(args: Sequence[str]) -> list[Finding]:
    """Check a configuration with two training steps.

    Args:
        args: Arguments of the configuration, as for `spar fit`.

    Returns:
        Findings about folders, cache and steps. An error is reported as a finding, too.
    """
    said = StringIO()
    with tempfile.TemporaryDirectory(prefix="spar-doctor-") as folder:
        try:
            with redirect_stdout(said), redirect_stderr(said):
                return DoctorCLI(args, Path(folder)).findings
        except torch.OutOfMemoryError:
            text = (
                "set data.batch_size 1, a smaller data.pack_tokens or trainer.precision bf16-mixed, or use a larger GPU"
            )
            return [Finding("dry run", "does not fit into GPU memory", text)]
        except UserError as error:
            return [Finding("configuration", "cannot be used", str(error))]
        except SystemExit:  # from the parser, which has printed the error
            lines = [line for line in said.getvalue().splitlines() if line.strip()]
            return [Finding("configuration", "cannot be used", lines[-1].removeprefix("spar: error: "))]
