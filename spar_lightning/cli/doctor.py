"""`spar doctor`: whether this machine has what a run needs, and whether a configuration takes two steps on it."""

import json
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Trainer

from spar_lightning.cli.doctor_checks import Finding, disk, system
from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import UserError
from spar_lightning.evaluation.timing import Peak

STEPS: Final = 2


class DoctorCLI(SparCLI):
    """A configuration, on one device and in a folder that goes away again.

    Args:
        args: Of the configuration, as for fit.
        folder: For everything that the steps write.
    """

    def __init__(self, args: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.findings: list[Finding] = []
        super().__init__(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"doctor": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(
            fast_dev_run=STEPS, enable_progress_bar=False, devices=1, num_nodes=1, strategy="auto",
            default_root_dir=str(self.folder), **kwargs,
        )  # fmt: skip

    def doctor(self, model: Distillation, datamodule: SA1B) -> None:
        """Check the configuration and take two steps of it."""
        self.findings += self._folders(model, datamodule)
        self.findings.append(self._steps(model, datamodule))

    def _folders(self, model: Distillation, datamodule: SA1B) -> Iterator[Finding]:
        cache = datamodule.cache
        yield disk("run_dir", Path(self.config.doctor.run_dir), "give another --run_dir")
        if cache is None:
            yield Finding("cache", "none: the teacher runs in every step")
            return
        yield disk("data.cache", cache, "give another data.cache")
        if not (cache / "manifest.json").exists():
            yield Finding("cache", f"{cache} is empty: spar fit builds it first, spar cache beforehand")
            return
        self.trainer.strategy.connect(model)
        datamodule.trainer = self.trainer
        index = datamodule.open_cache().index  # refused where it is another configuration's
        index.refresh()
        yield Finding("cache", f"{cache}: {len(index):,} images with features")

    def _steps(self, model: Distillation, datamodule: SA1B) -> Finding:
        # Few windows: the student's steps are what has to fit.
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
    """Findings about a configuration; what is wrong with it is one of them."""
    said = StringIO()
    with tempfile.TemporaryDirectory(prefix="spar-doctor-") as folder:
        try:
            with redirect_stdout(said), redirect_stderr(said):
                return DoctorCLI(args, Path(folder)).findings
        except torch.OutOfMemoryError:
            text = "give data.batch_size 1 or a smaller data.pack_tokens, trainer.precision bf16-mixed, a larger GPU"
            return [Finding("dry run", "does not fit into the GPU's memory", text)]
        except UserError as error:
            return [Finding("configuration", "cannot be used", str(error))]
        except SystemExit:  # the parser's: it has printed the sentence
            lines = [line for line in said.getvalue().splitlines() if line.strip()]
            return [Finding("configuration", "cannot be used", lines[-1].removeprefix("spar: error: "))]


def run(args: Sequence[str]) -> int:
    """Print the findings; 1 where something has to be mended."""
    parser = ArgumentParser("spar doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file, or the name of one that ships; further arguments as for spar fit")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given, rest = parser.parse_known_args(args)
    if rest and given.config is None:
        raise UserError(f"spar doctor does not know {rest[0]} without --config.")
    findings = list(system())
    if given.config is not None:
        findings += configuration(["--config", given.config, *rest])
    wrong = [finding for finding in findings if finding.mend]
    if given.json:
        print(json.dumps([{"ok": finding.mend is None, **asdict(finding)} for finding in findings], indent=2))
        return 1 if wrong else 0
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'MEND' if finding.mend else 'ok':<5} {finding.name:<{width}}  {finding.text}")
        if finding.mend:
            print(f"{'':<5} {'':<{width}}  -> {finding.mend}")
    if wrong:
        print(f"{len(wrong)} of {len(findings)} to mend", file=sys.stderr)
    return 1 if wrong else 0
