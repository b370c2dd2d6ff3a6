"""A benchmark on disk: labelled images in the folders that users already have, read one at a time.

Labels stay at the size of their image and are compared there; only the image is resized, by the segmenter.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.evaluation.benchmark_config import (
    SHIPPED,
    BenchmarkConfig,
    BenchmarkError,
    LabelFiles,
    locate,
    read,
)
from spar_lightning.evaluation.file_pattern import matches, prefix
from spar_lightning.evaluation.label_values import class_ids
from spar_lightning.files.hashing import sha256
from spar_lightning.image.codec import ImageError, decode_image


class Benchmark(Dataset[LabelledImage]):
    """Labelled images for mIoU.

    Args:
        source: Name of one that ships (voc21, voc20, cityscapes, ade20k, context60, context59), the path of a YAML
            file, or a folder with benchmark.yaml, images/ and labels/.
        root: Folder in which the data of those that ship lie.

    Attributes:
        name: How results call it: the name that ships, or that of the file or folder.
        description: What the YAML file says; once `open` has run.
        folder: Where images and labels lie.
        stems: What stands for `{}` in the patterns of each image.
    """

    description: BenchmarkConfig
    folder: Path

    def __init__(self, source: str, root: str | None = None) -> None:
        self.source = source
        self.root = root
        path = Path(source)
        self.name = path.stem if path.suffix in (".yaml", ".yml") else path.name
        if self.name == "benchmark":
            self.name = path.resolve().parent.name
        self.stems: list[str] = []
        self._images: list[Path] = []
        self._digests: list[str] = []  # one at most; a list, which copies at another size share

    def open(self) -> None:
        """Read the description and list the images.

        Raises:
            BenchmarkError: Folders, files or class names are missing.
        """
        self._digests = []
        file = locate(self.source)
        self.description = read(file)
        self.folder = self._folder(file)
        patterns = self.description.images
        if self.description.split is None:
            found = sorted((path, stem) for pattern in patterns for path, stem in matches(self.folder, pattern))
            if not found:
                raise BenchmarkError(
                    f"{self.name} holds no images: nothing matches {' or '.join(patterns)} in {self.folder}. "
                    f"{self._help}"
                )
            self._images, self.stems = [path for path, _ in found], [stem for _, stem in found]
        else:
            self.stems = self._read_split(self.folder / self.description.split)
            self._images = [self._image(stem, patterns) for stem in self.stems]
        if twice := [stem for stem, count in Counter(self.stems).items() if count > 1]:
            raise BenchmarkError(
                f"{self.name}: {twice[0]} is there twice, in {self.description.split or ' and '.join(patterns)} of "
                f"{self.folder}. It would count twice: keep one."
            )

    def digest(self) -> str:
        """Stands for the images and labels: names, sizes of the image files, contents of the label maps.

        The same on every machine that holds them.

        Raises:
            BenchmarkError: A file is missing.
        """
        if self._digests:
            return self._digests[0]
        lines = []
        for stem, image in zip(self.stems, self._images, strict=True):
            labels, _ = self.label_file(stem)
            try:
                size, content = image.stat().st_size, labels.read_bytes()
            except OSError as error:
                raise BenchmarkError(f"{self.name}: {error.filename} cannot be read: {error.strerror}.") from error
            lines.append(f"{stem} {size} {sha256(content)}\n")
        self._digests.append(sha256("".join(lines).encode(), 12))
        return self._digests[0]

    def keep(self, count: int | None) -> None:
        """Keep so many images, spread evenly over all; None or a larger number keeps all."""
        if count is not None and count < len(self):
            chosen = [i * len(self) // count for i in range(count)]
            self.stems, self._images = [self.stems[i] for i in chosen], [self._images[i] for i in chosen]
            self._digests = []

    def resized(self, area: int) -> "Benchmark":
        """The same with all images brought to the area of a square of this side, in pixels."""
        other = copy.copy(self)
        other.description = replace(self.description, resize=area)
        return other

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Label -> names, in the order of the class ids."""
        return self.description.names()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> LabelledImage:
        path = self._images[index]
        try:
            image = decode_image(path.read_bytes())
        except (OSError, ImageError) as error:
            raise BenchmarkError(f"{self.name}: {path} cannot be read: {error}. Restore the file.") from error
        label_path, kind = self.label_file(self.stems[index])
        try:
            with Image.open(label_path) as file:
                values = np.array(file)  # of a palette its indices
        except Exception as error:  # every format has its own ways to fail
            raise BenchmarkError(f"{self.name}: {label_path} cannot be read: {error}. Restore the file.") from error
        if values.shape != tuple(image.shape[-2:]):
            raise BenchmarkError(
                f"{self.name}: {label_path} is {values.shape}, but its image {path} {tuple(image.shape[-2:])}. Labels "
                "have one channel and the size of their image."
            )
        try:
            labels = class_ids(values, kind, len(self.description.classes))
        except ValueError as error:
            raise BenchmarkError(f"{self.name}: {label_path} {error}.") from error
        return LabelledImage(self.stems[index], image, torch.from_numpy(labels))

    def label_file(self, stem: str) -> tuple[Path, LabelFiles]:
        """The label map of an image, and what its values mean.

        Raises:
            BenchmarkError: There is none.
        """
        candidates = self._label_files(stem)
        for path, kind in candidates:
            if path.is_file():
                return path, kind
        raise BenchmarkError(
            f"{self.name}: {stem} has no labels: there is no {' nor '.join(str(path) for path, _ in candidates)}. "
            f"{self._help}"
        )

    def _label_files(self, stem: str) -> list[tuple[Path, LabelFiles]]:
        return [(self.folder / kind.file.replace("{}", stem), kind) for kind in self.description.labels]

    def has_labels(self, stem: str) -> bool:
        """Whether a label map of an image exists."""
        return any(path.is_file() for path, _ in self._label_files(stem))

    def has_image(self, index: int) -> bool:
        """Whether the file of an image exists; those of a list may not."""
        return self._images[index].is_file()

    def _folder(self, file: Path) -> Path:
        """The folder with the data: of a benchmark that ships below the root, otherwise beside its YAML file."""
        ships = self.source in SHIPPED
        if ships and self.root is None:
            raise BenchmarkError(
                f"{self.name} needs the folder in which the benchmarks lie: give --root, or data.benchmark_root."
            )
        base = Path(self.root) if ships and self.root is not None else file.parent
        candidates = [base / folder for folder in self.description.folder]
        wanted = self.description.split or prefix(self.description.images[0])
        for candidate in candidates:
            if (candidate / wanted).exists():
                return candidate
        raise BenchmarkError(
            f"{self.name} is not in {base}: none of {', '.join(str(c / wanted) for c in candidates)} exists. "
            f"{self._help}"
        )

    @property
    def _help(self) -> str:
        context = " `spar evaluate --prepare context --root DIR` makes its list and labels."
        known = self.source in SHIPPED
        where = f"`spar evaluate --check {self.root}` says what lies where." if known else ""
        return where + (context if known and self.name.startswith("context") else "")

    def _read_split(self, path: Path) -> list[str]:
        try:
            stems = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise BenchmarkError(
                f"{self.name}: the list of images {path} cannot be read: {error}. {self._help}"
            ) from error
        if not stems:
            raise BenchmarkError(f"{self.name}: the list of images {path} is empty. Restore the file.")
        return stems

    def _image(self, stem: str, patterns: list[str]) -> Path:
        candidates = [self.folder / pattern.replace("{}", stem) for pattern in patterns]
        return next((path for path in candidates if path.is_file()), candidates[0])  # reading a missing one names it


def opened_later(sources: Sequence[str], root: str | None) -> list[Benchmark]:
    """The benchmarks of a list; nothing is read yet.

    Raises:
        BenchmarkError: Two have the same name, so that results could not tell them apart.
    """
    benchmarks = [Benchmark(source, root) for source in sources]
    names = [benchmark.name for benchmark in benchmarks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BenchmarkError(
            f"benchmarks: two are called {', '.join(twice)}. The name is that of the file or folder: give each its own."
        )
    return benchmarks
