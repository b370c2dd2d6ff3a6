"""The folder of one run: refused when it exists, resumed or overwritten when that is asked for.

config.yaml, config-resume-N.yaml   the settings of the first and of every later start
metrics.jsonl, train.log, results.json, events.out.tfevents.*
checkpoints/                        last.ckpt and epoch.ckpt to go on from, best.ckpt by mIoU
plots/                              predictions.png and curves.png
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError

OURS = (
    *("config.yaml", "config-resume-*.yaml", "metrics.jsonl", "train.log", "results.json", "events.out.tfevents.*"),
    *("checkpoints/*.ckpt", "checkpoints/*.unfinished", "plots/predictions.png", "plots/curves.png"),
)


class RunFolderError(UserError):
    """The run folder cannot be used."""


class RunFolder:
    """Where a run keeps what it makes.

    Args:
        root: The folder.
        resume: `auto` goes on from the newest checkpoint or starts if there is none, `never` starts a new run,
            anything else is the path of a checkpoint.
        overwrite: Delete the run that lies there.

    Raises:
        RunFolderError: The folder holds a run and neither resume nor overwrite is given, or it cannot be written.
    """

    def __init__(self, root: str, resume: str, overwrite: bool) -> None:
        self.root = Path(root)
        self.resume = resume
        self.overwrite = overwrite
        if overwrite and resume != "never":
            raise RunFolderError(f"--overwrite and --resume {resume} exclude each other. Give one of them.")
        if not is_first_process():
            return
        if self.root.exists() and not self.root.is_dir():
            raise RunFolderError(f"run_dir: {self.root} is a file. Give another --run_dir.")
        if self._started and not overwrite and resume == "never":
            raise RunFolderError(
                f"run_dir: {self.root} holds a run already. Go on with it: --resume auto. Replace it: --overwrite. "
                "Keep it: give another --run_dir."
            )
        if self.root.exists() and any(self.root.iterdir()) and not self._log.exists():
            raise RunFolderError(
                f"run_dir: {self.root} is not empty and holds no run (no train.log). Give another --run_dir."
            )

    @property
    def checkpoints(self) -> Path:
        """Folder of last.ckpt, epoch.ckpt and best.ckpt."""
        return self.root / "checkpoints"

    @property
    def _log(self) -> Path:
        return self.root / "train.log"

    @property
    def _started(self) -> bool:
        """Whether something was measured or saved here; a start that failed before that needs no protection."""
        return (self.root / "metrics.jsonl").exists() or any(self.checkpoints.glob("*.ckpt"))

    def create(self) -> None:
        """Make the folder; of an old run that is to be replaced, its own files go and no others."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.root / "plots").mkdir(exist_ok=True)
            if self.overwrite or not self._started:
                for path in (path for pattern in OURS for path in self.root.glob(pattern)):
                    path.unlink()
            self._log.touch()
        except OSError as error:
            raise RunFolderError(
                f"run_dir: cannot write in {self.root} ({error.strerror}). Give a --run_dir where you may write."
            ) from error

    def checkpoint(self) -> str | None:
        """The checkpoint to start from, or None to start at the beginning."""
        if self.resume == "never":
            return None
        if self.resume != "auto":
            if not Path(self.resume).is_file():
                raise RunFolderError(
                    f"--resume {self.resume}: no such checkpoint. "
                    "Allowed are auto, never, and the path of a .ckpt file."
                )
            return self.resume
        last = self.checkpoints / "last.ckpt"
        return str(last) if last.exists() else None

    def save_config(self, config: dict[str, Any]) -> None:
        """Write the settings: once under config.yaml, at every later start under a new name."""
        path, number = self.root / "config.yaml", 0
        while path.exists():
            number += 1
            path = self.root / f"config-resume-{number}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))

    @contextmanager
    def log(self) -> Iterator[None]:
        """Write what Lightning and this package log, and Python's warnings, to train.log as well."""
        handler = logging.FileHandler(self._log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "spar_lightning", "py.warnings")]
        level = loggers[1].level
        loggers[1].setLevel(logging.INFO)
        logging.captureWarnings(True)
        screen = logging.StreamHandler()  # where they would go without being captured
        loggers[2].addHandler(screen)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            loggers[2].removeHandler(screen)
            logging.captureWarnings(False)
            loggers[1].setLevel(level)
            handler.close()
