"""Confusion matrices on disk, so that an interrupted evaluation continues where it was.

Every rank writes its own file every half minute; the first rank gathers them at the next start.

counts/NAME.npz          gathered: confusion matrix, indices of the images, milliseconds of each
counts/NAME.part-R.npz   counted by rank R since the last start
"""

import logging
import zipfile
from glob import escape
from pathlib import Path

from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.files.atomic import replace, sweep

log = logging.getLogger("spar_lightning")


class PartialCounts:
    """The counts of one benchmark in the folder of an evaluation.

    Args:
        folder: The evaluation's folder.
        name: The benchmark and its protocol: counts of another protocol are not mixed in.
        classes: Number of classes.
    """

    def __init__(self, folder: Path, name: str, classes: int) -> None:
        self.folder = folder / "counts"
        self.name = name
        self.classes = classes

    def gather(self) -> ConfusionMatrix:
        """Return all that is on disk, each image once, and merge the parts into one file.

        Called by one rank, before others write. A part whose images are counted already is left out: the start that
        merged it was killed in between.
        """
        sweep(self._unfinished)
        total = self._read(self._path) or ConfusionMatrix(self.classes)
        parts = self._parts()
        for path in parts:
            part = self._read(path)
            if part is not None and not set(part.images) & set(total.images):
                total = total.merge(part)
        if parts:
            self.write(total)
            self.drop_parts()
        return total

    def drop_parts(self) -> None:
        """Delete the files of single ranks, which the gathered one now holds."""
        for path in self._parts():
            path.unlink(missing_ok=True)

    def write(self, counts: ConfusionMatrix, rank: int | None = None) -> None:
        """Replace the file of a rank, or the gathered one."""
        path = self._path if rank is None else self.folder / f"{self.name}.part-{rank}.npz"
        replace(path, counts.to_bytes(), self._unfinished)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{escape(self.name)}.part-*.npz"))

    @property
    def _unfinished(self) -> Path:
        return self.folder / "tmp"

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}.npz"

    def _read(self, path: Path) -> ConfusionMatrix | None:
        """Return a file's content; None if it does not exist or is damaged: its images are then counted again."""
        try:
            return ConfusionMatrix.load(path, self.classes)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged (%s): its images are counted again.", path, error)
            return None
