"""Run folder of `spar fit`: an existing run is rejected unless it is to be resumed or overwritten.

config.yaml, config-resume-N.yaml   settings of the first start and of each later start
metrics.jsonl, train.log, results.json, events.out.tfevents.*
checkpoints/                        last.ckpt and epoch.ckpt to resume from, best.ckpt with the best mIoU
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

# Files of a run; only these are deleted by --overwrite.
OURS = (
    *("config.yaml", "config-resume-*.yaml", "metrics.jsonl", "train.log", "results.json", "events.out.tfevents.*"),
    *("checkpoints/*.ckpt", "checkpoints/*.unfinished", "plots/predictions.png", "plots/curves.png"),
)


class RunFolderError(UserError):
    """Error of a run folder that cannot be used."""


class RunFolder:
    """Folder with the settings, logs, checkpoints and plots of a run.

    Args:
        root: Path of the folder.
        resume: `auto` continues from the newest checkpoint if one exists and otherwise starts a new run; `never` starts
            a new run; any other value is the path of a checkpoint.
        overwrite: Delete an existing run in the folder.

    Raises:
        RunFolderError: The folder contains a run and neither `resume` nor `overwrite` is set, or it contains other
            files, or both options are set.
    """

    def __init__(self, root: str, resume: str, overwrite: bool) -> None:
        self.root = Path(root)
        self.resume = resume
        self.overwrite = overwrite
        if overwrite and resume != "never":
            raise RunFolderError(f"--overwrite and --resume {resume} cannot be combined. Pass one of them.")
        if not is_first_process():
            return
        if self.root.exists() and not self.root.is_dir():
            raise RunFolderError(f"run_dir: {self.root} is a file. Use another --run_dir.")
        if self._started and not overwrite and resume == "never":
            raise RunFolderError(
                f"run_dir: {self.root} already contains a run. Use --resume auto to continue it, --overwrite to "
                "replace it, or another --run_dir."
            )
        if self.root.exists() and any(self.root.iterdir()) and not self._log.exists():
            raise RunFolderError(
                f"run_dir: {self.root} is not empty and contains no run (no train.log). Use another --run_dir."
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
        """True if the folder has metrics or checkpoints. A start that failed earlier may be replaced without asking."""
        return (self.root / "metrics.jsonl").exists() or any(self.checkpoints.glob("*.ckpt"))

    def create(self) -> None:
        """Create the folder. Delete the files of a run that is replaced, but no other files.

        Raises:
            RunFolderError: The folder is not writable.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.root / "plots").mkdir(exist_ok=True)
            if self.overwrite or not self._started:
                for path in (path for pattern in OURS for path in self.root.glob(pattern)):
                    path.unlink()
            self._log.touch()
        except OSError as error:
            raise RunFolderError(
                f"run_dir: cannot write to {self.root} ({error.strerror}). Use a --run_dir that is writable."
            ) from error

    def checkpoint(self) -> str | None:
        """Return the path of the checkpoint to start from, or None for a new run.

        Raises:
            RunFolderError: `resume` is not an existing file.
        """
        if self.resume == "never":
            return None
        if self.resume != "auto":
            if not Path(self.resume).is_file():
                raise RunFolderError(
                    f"--resume {self.resume}: checkpoint not found. Allowed: auto, never, and the path of a .ckpt file."
                )
            return self.resume
        last = self.checkpoints / "last.ckpt"
        return str(last) if last.exists() else None

    def save_config(self, config: dict[str, Any]) -> None:
        """Write the settings to config.yaml or, if it exists, to the next config-resume-N.yaml."""
        path, number = self.root / "config.yaml", 0
        while path.exists():
            number += 1
            path = self.root / f"config-resume-{number}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))

    @contextmanager
    def log(self) -> Iterator[None]:
        """Also write the log messages of Lightning and this package, and Python's warnings, to train.log."""
        handler = logging.FileHandler(self._log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "spar_lightning", "py.warnings")]
        level = loggers[1].level
        loggers[1].setLevel(logging.INFO)
        logging.captureWarnings(True)
        screen = logging.StreamHandler()  # captured warnings are otherwise not shown on the screen
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
