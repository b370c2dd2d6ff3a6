"""Run folder of `spar fit`: an existing run is rejected unless it is to be resumed or overwritten.

A folder with other files is rejected, too. The content of config.yaml shows that a folder is the one of a run.

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
from typing import Any, Final

import yaml

from spar_lightning.cli.fit_run_files import CHECKPOINTS, delete_run, is_settings
from spar_lightning.distributed import is_first_process
from spar_lightning.errors import UserError
from spar_lightning.files.atomic import MACHINE, replace
from spar_lightning.files.leases import Claims
from spar_lightning.stopping import signals

log = logging.getLogger("spar_lightning")

# MLflow creates its database with the logger, before a later setting is found to be wrong.
BEFORE: Final = {"mlflow.db", ".lease"}


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
        if not root:
            raise RunFolderError("run_dir is empty. Pass the path of a folder, such as runs/NAME.")
        if is_first_process():
            self._check()

    def _check(self) -> None:
        """Raise RunFolderError if the folder cannot be used, contains other files, or a run that is to be kept."""
        with self._usable():
            if not self.root.exists():
                if self.root.is_symlink():
                    target = self.root.readlink()
                    raise RunFolderError(
                        f"run_dir: {self.root} is a link to {target}, which does not exist. Create that folder, or use "
                        "another --run_dir."
                    )
                return
            if not self.root.is_dir():
                raise RunFolderError(f"run_dir: {self.root} is a file. Use another --run_dir.")
            if {path.name for path in self.root.iterdir()} - BEFORE and not is_settings(self.root / "config.yaml"):
                raise RunFolderError(
                    f"run_dir: {self.root} is not empty and contains no run (no config.yaml of spar fit). Use another "
                    "--run_dir."
                )
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
        with self._usable():
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
                self._check()
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
    def log(self) -> Path:
        """File with the messages of the run."""
        return self.root / "train.log"

    @property
    def _started(self) -> bool:
        """True if the folder has results. A start that failed before the first one may be replaced without asking."""
        results = ("metrics.jsonl", "results.json", "plots/*", *CHECKPOINTS)
        return any(any(self.root.glob(pattern)) for pattern in results)

    @property
    def _foreign(self) -> list[Path]:
        """Checkpoints that version 0.1 left in a SLURM job: Lightning's handler wrote them in the middle of a step."""
        return sorted(self.root.glob("hpc_ckpt_*.ckpt"))

    def create(self, settings: dict[str, Any]) -> None:
        """Create the files of the run and write its settings to config.yaml, or to the next config-resume-N.yaml.

        The files of a run that is replaced are deleted first, config.yaml last, so that the folder is always known as
        that of a run. Other files are kept.

        Args:
            settings: Configuration of the run, as plain YAML types.

        Raises:
            RunFolderError: The folder is not writable.
        """
        with self._usable():
            path, number = self.root / "config.yaml", 0
            if self.overwrite or not self._started:
                delete_run(self.root)
            else:
                while path.exists():
                    number += 1
                    path = self.root / f"config-resume-{number}.yaml"
            replace(path, yaml.safe_dump(settings, sort_keys=False).encode(), self.root / ".lease" / "tmp")
            self.checkpoints.mkdir(exist_ok=True)
            (self.root / "plots").mkdir(exist_ok=True)
            self.log.touch()

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Convert errors of the file system."""
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"run_dir: cannot use {self.root} ({error.strerror}). Use a --run_dir that is writable and has free "
                "space."
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


def _renewed(lease: Path) -> float:
    """Return the time at which a lease was renewed last, or 0 if it does not exist."""
    try:
        return max((path.stat().st_mtime for path in lease.iterdir()), default=0.0)
    except FileNotFoundError:
        return 0.0
