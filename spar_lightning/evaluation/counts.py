"""What has been counted of a benchmark, on disk, so that an interrupted evaluation goes on where it was.

Sums of whole numbers do not depend on their order: the counts of any number of processes and of any number
of starts add up to those of one process, exactly. Every process writes its own file now and then; the first
process gathers them at the next start.

counts/NAME.npz          what is certain: confusion matrix, numbers of the images, milliseconds of each
counts/NAME.part-R.npz   what process R has counted since the last start
"""

import io
import logging
import zipfile
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datamodules.durable import replace, sweep

log = logging.getLogger("spar_lightning")


@dataclass(frozen=True)
class Counts:
    """Some images of a benchmark.

    Attributes:
        matrix: Pixels by true class and predicted class (C, C) int64.
        images: Numbers of the images that are counted.
        milliseconds: What the segmentation of each took.
    """

    matrix: NDArray[np.int64]
    images: NDArray[np.int64]
    milliseconds: NDArray[np.float64]

    @classmethod
    def none(cls, classes: int) -> "Counts":
        """Nothing counted yet."""
        return cls(np.zeros((classes, classes), np.int64), np.zeros(0, np.int64), np.zeros(0))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.matrix + other.matrix,
            np.concatenate([self.images, other.images]),
            np.concatenate([self.milliseconds, other.milliseconds]),
        )


class CountsFolder:
    """The counts of one benchmark in the folder of an evaluation.

    Args:
        folder: The evaluation's folder.
        name: The benchmark and its protocol: another protocol's counts are not its own.
        classes: Its number of classes.
    """

    def __init__(self, folder: Path, name: str, classes: int) -> None:
        self.folder = folder / "counts"
        self.name = name
        self.classes = classes

    def gather(self) -> Counts:
        """All that is on disk, each image once; the parts become one file. Called by one process, before others write.

        A part of which images are counted already is left out: the start that took it over was killed in between.
        """
        sweep(self._unfinished)
        total = self._read(self._path) or Counts.none(self.classes)
        parts = self._parts()
        for path in parts:
            part = self._read(path)
            if part is not None and not np.isin(part.images, total.images).any():
                total = total + part
        if parts:
            self.write(total)
            self.drop_parts()
        return total

    def drop_parts(self) -> None:
        """Delete the files of single processes, which the one of all now holds."""
        for path in self._parts():
            path.unlink(missing_ok=True)

    def write(self, counts: Counts, process: int | None = None) -> None:
        """Put the file of a process, or the one of all, in place of the last."""
        path = self._path if process is None else self.folder / f"{self.name}.part-{process}.npz"
        buffer = io.BytesIO()
        np.savez(buffer, matrix=counts.matrix, images=counts.images, milliseconds=counts.milliseconds)
        self._unfinished.mkdir(parents=True, exist_ok=True)
        replace(path, buffer.getvalue(), self._unfinished)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{escape(self.name)}.part-*.npz"))

    @property
    def _unfinished(self) -> Path:
        return self.folder / "tmp"

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}.npz"

    def _read(self, path: Path) -> Counts | None:
        """A file; None where there is none, or where it is damaged: its images are counted again."""
        try:
            with np.load(path, allow_pickle=False) as file:
                counts = Counts(file["matrix"], file["images"], file["milliseconds"])
            if counts.matrix.shape != (self.classes, self.classes):
                raise ValueError(f"{counts.matrix.shape} is not the shape of {self.classes} classes")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged (%s): its images are counted again.", path, error)
            return None
        return counts
