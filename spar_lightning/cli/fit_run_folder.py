"""Run folder of `spar fit`: an existing run is rejected unless it is to be resumed or overwritten.

config.yaml, config-resume-N.yaml   settings of the first start and of each later start
metrics.jsonl, train.log, results.json, events.out.tfevents.*
checkpoints/                        last.ckpt and epoch.ckpt to resume from, best.ckpt with the best mIoU
plots/                              predictions.png and curves.png
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError
from spar_lightning.files.atomic import MACHINE
from spar_lightning.files.leases import Claims
from spar_lightning.stopping import signals

log = logging.getLogger("spar_lightning")

# Files of a run; only these are deleted by --overwrite.
OURS = (
    *("config.yaml", "config-resume-*.yaml", "metrics.jsonl", "train.log", "results.json", "events.out.tfevents.*"),
    *("hpc_ckpt_*.ckpt", "checkpoints/*.ckpt", "checkpoints/*.unfinished", "plots/predictions.png", "plots/curves.png"),
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
        self._check_new()
        # MLflow creates its database with the logger, before a later setting is found to be wrong.
        ignored = {"mlflow.db", ".lease"}
        others = {path.name for path in self.root.iterdir()} - ignored if self.root.exists() else ()
        if others and not self._log.exists():
            raise RunFolderError(
                f"run_dir: {self.root} is not empty and contains no run (no train.log). Use another --run_dir."
            )

    def _check_new(self) -> None:
        """Raise RunFolderError if the folder contains a run that is neither resumed nor replaced."""
        if self._started and not self.overwrite and self.resume == "never":
            raise RunFolderError(
                f"run_dir: {self.root} already contains a run. Use --resume auto to continue it, --overwrite to "
                "replace it, or another --run_dir."
            )

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the lease on the folder, so that no other `spar fit` writes to it.

        If the process that holds it may have died on another machine, wait for a sign of life.

        Raises:
            RunFolderError: Another `spar fit` is running in this folder, or has just finished a run there.
        """
        claims = Claims(self.root / ".lease" / "claims")
        with self._writing():
            while not claims.take_over("run"):
                before = _renewed(claims.folder / "run")
                if claims.holder("run").startswith(f"{MACHINE}.") or self._is_renewed(claims, before):
                    raise RunFolderError(
                        f"run_dir: {self.root} is in use by another spar fit ({claims.holder('run')}). Wait for its "
                        "end, or use another --run_dir."
                    )
        release = partial(claims.release, "run")
        signals.at_once.append(release)
        try:
            with claims.held("run"):
                self._check_new()
                yield
        finally:
            signals.at_once.remove(release)
            for folder in (claims.folder, claims.private, claims.folder.parent):
                with suppress(OSError):  # another process has started in the meantime
                    folder.rmdir()

    def _is_renewed(self, claims: Claims, before: float) -> bool:
        """Wait until the lease is renewed, and return True, or until its owner counts as dead."""
        log.warning("run_dir: waiting for a sign of life of %s, which has used it last.", claims.holder("run"))
        while _renewed(claims.folder / "run") == before:
            if claims.clear("run"):
                return False
            time.sleep(1)
        return True

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
        return (self.root / "metrics.jsonl").exists() or any(self.checkpoints.glob("*.ckpt")) or bool(self._foreign)

    @property
    def _foreign(self) -> list[Path]:
        """Checkpoints that version 0.1 left in a SLURM job: Lightning's handler wrote them in the middle of a step."""
        return sorted(self.root.glob("hpc_ckpt_*.ckpt"))

    def create(self) -> None:
        """Create the folder. Delete the files of a run that is replaced, but no other files.

        Raises:
            RunFolderError: The folder is not writable.
        """
        with self._writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.root / "plots").mkdir(exist_ok=True)
            if self.overwrite or not self._started:
                if self._foreign:
                    log.warning("%s is deleted with the old run.", ", ".join(map(str, self._foreign)))
                for path in (path for pattern in OURS for path in self.root.glob(pattern)):
                    path.unlink()
            self._log.touch()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Convert errors of the file system."""
        try:
            yield
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
        if self._foreign:
            found = ", ".join(path.name for path in self._foreign)
            choice = f"Pass --resume {self._foreign[-1]} to continue from it, or delete it"
            if not last.exists():
                raise RunFolderError(
                    f"run_dir: {self.root} contains no checkpoints/last.ckpt, but {found}, which Lightning saved on a "
                    f"signal of SLURM. {choice}."
                )
            log.warning("%s in %s is not used. %s.", found, self.root, choice)
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


def _renewed(lease: Path) -> float:
    """Return the time at which a lease was renewed last, or 0 if it does not exist."""
    try:
        return max((path.stat().st_mtime for path in lease.iterdir()), default=0.0)
    except FileNotFoundError:
        return 0.0
