"""Confusion matrices on disk, so that an interrupted evaluation can be continued.

Each rank writes its own file every 30 seconds; rank 0 merges the files at the next start.

counts/NAME.npz          merged counts: confusion matrix, image indices, milliseconds of each image
counts/NAME.part-R.npz   counts of rank R since the last start
"""

import logging
import zipfile
from glob import escape
from pathlib import Path

from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.files.atomic import replace, sweep

log = logging.getLogger("spar_lightning")


class PartialCounts:
    """Counts of one benchmark in the folder of an evaluation.

    Args:
        folder: Result folder of the evaluation.
        name: Name of the benchmark with a hash of its protocol, so that counts of different protocols are not mixed.
        classes: Number of classes.
    """

    def __init__(self, folder: Path, name: str, classes: int) -> None:
        self.folder = folder / "counts"
        self.name = name
        self.classes = classes

    def gather(self) -> ConfusionMatrix:
        """Return all counts on disk, each image once, and merge the parts into one file.

        Only one rank may call this method, before other ranks write. A part with images that are already counted is
        skipped: the process that merged it was killed before it could delete the part.
        """
        sweep(self._unfinished)
        total = self._read(self.path) or ConfusionMatrix(self.classes)
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
        """Delete the files of individual ranks, after they were merged."""
        for path in self._parts():
            path.unlink(missing_ok=True)

    def write(self, counts: ConfusionMatrix, rank: int | None = None) -> None:
        """Write the file of a rank, or (rank None) the merged file; an existing file is replaced."""
        path = self.path if rank is None else self.folder / f"{self.name}.part-{rank}.npz"
        replace(path, counts.to_bytes(), self._unfinished)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{escape(self.name)}.part-*.npz"))

    @property
    def _unfinished(self) -> Path:
        return self.folder / "tmp"

    @property
    def path(self) -> Path:
        """Path of the merged file."""
        return self.folder / f"{self.name}.npz"

    def _read(self, path: Path) -> ConfusionMatrix | None:
        """Return the content of a file, or None if it does not exist or is damaged (its images are counted again)."""
        try:
            return ConfusionMatrix.load(path, self.classes)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be used (%s). Its images are evaluated again.", path, error)
            return None
