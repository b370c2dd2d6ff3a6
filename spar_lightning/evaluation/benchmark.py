"""Segmentation benchmarks on disk: labeled images in the usual folder layouts, read one at a time.

Only the image is resized, by the segmenter. Labels keep the size of the original image, and predictions are compared
with them at that size.
"""

import copy
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch.utils.data import Dataset

from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark_config import (
    PREPARED,
    SETS,
    SHIPPED,
    SUFFIXES,
    BenchmarkConfig,
    BenchmarkError,
    locate,
    read,
)
from spar_lightning.evaluation.confusion import ConfusionMatrix, Result
from spar_lightning.evaluation.file_pattern import existing, matches, prefix
from spar_lightning.evaluation.label_file import check_size, read_label_file
from spar_lightning.evaluation.label_files import LabelFiles
from spar_lightning.evaluation.label_values import class_ids
from spar_lightning.files.hashing import sha256
from spar_lightning.files.home import expand_home
from spar_lightning.image.codec import ImageError, decode_image, exif_orientation, image_size

log = logging.getLogger("spar_lightning")

# Ends of the names of label maps that mmsegmentation and others write next to those of COCO-Stuff.
CONVERTED: Final = re.compile("_(label|instance)TrainIds$")


class Benchmark(Dataset[LabelledImage]):
    """Benchmark of labeled images for mIoU.

    Nothing is read before `open` is called.

    Args:
        source: Name of a bundled benchmark (voc21, voc20, cityscapes, ade20k, context60, context59, coco_object,
            coco_stuff, ade847, context459), path of a YAML file, or folder with benchmark.yaml, images/ and labels/.
        root: Folder with the data of the bundled benchmarks; required for these only.

    Attributes:
        name: Name in reports: that of the bundled benchmark, of the YAML file or of the folder.
        description: Content of the YAML file; set by `open`.
        folder: Folder with images and labels; set by `open`.
        stems: Name of each image: the text that replaces `{}` in the path patterns.
    """

    description: BenchmarkConfig
    folder: Path

    def __init__(self, source: str, root: str | None = None) -> None:
        self.source = source = expand_home(source)
        self.root = expand_home(root)
        path = Path(source)
        self.name = path.stem if path.suffix in (".yaml", ".yml") else path.name
        if self.name == "benchmark":
            self.name = path.resolve().parent.name
        self.stems: list[str] = []
        self._images: list[Path] = []
        self._digests: list[str] = []  # at most one entry; copies made by `resized` share the list

    def open(self) -> None:
        """Read the YAML file and list the images.

        Raises:
            BenchmarkError: If the YAML file, the data folder or the list of images is missing or invalid, or if an
                image is listed twice.
        """
        file = locate(self.source)
        self.description = read(file)
        self.folder = self._folder(file)
        self._list()

    def training(self) -> "Benchmark":
        """Return the training images of an opened benchmark, as a benchmark that is also opened.

        Raises:
            BenchmarkError: Its YAML file names no training images, or they cannot be listed.
        """
        other = copy.copy(self)
        other.name = f"{self.name} (training)"
        try:
            other.description = self.description.training()
        except ValueError as error:
            raise BenchmarkError(f"{locate(self.source)}: {error}.") from error
        other._list()
        return other

    def _list(self) -> None:
        """List the images of the description."""
        self._digests = []
        patterns = self.description.images
        if self.description.split is None:
            found = sorted({item for pattern in patterns for item in matches(self.folder, pattern)})
            if len(patterns) > 1:  # a folder and a link to it, such as val2017 and images/val2017
                found = sorted({(stem, os.path.realpath(path)): (path, stem) for path, stem in found}.values())
            if not found:
                raise BenchmarkError(
                    f"{self.name} has no images: no file in {self.folder} matches {' or '.join(patterns)}. {self._help}"
                )
            self._images, self.stems = [path for path, _ in found], [stem for _, stem in found]
            self._warn_left_out()
        else:
            self.stems = self._read_split(self.folder / self.description.split)
            self._images = [self._image(stem, patterns) for stem in self.stems]
        if twice := [stem for stem, count in Counter(self.stems).items() if count > 1]:
            paths = [str(path) for path, stem in zip(self._images, self.stems, strict=True) if stem == twice[0]]
            raise BenchmarkError(
                f"{self.name}: image {twice[0]} occurs twice in {self.description.split or self.folder} "
                f"({', '.join(paths)}). Remove one of the two; otherwise the image would be counted twice."
            )

    def _warn_left_out(self) -> None:
        """Warn about label maps without an image, and about images that fit no pattern."""
        patterns, labels = self.description.images, [kind.file for kind in self.description.labels]
        labeled = [
            (path, CONVERTED.sub("", stem)) for pattern in labels for path, stem in matches(self.folder, pattern)
        ]
        matched = (path for pattern in patterns for path, _ in matches(self.folder, pattern))
        known, used = set(self.stems), {*matched, *(path for path, _ in labeled)}
        kinds = {Path(pattern).suffix.lower() for pattern in patterns} | {f".{suffix}" for suffix in SUFFIXES}
        starts = {prefix(pattern) for pattern in patterns}
        below = (path for start in starts for path, _ in matches(self.folder, f"{start}/{{}}" if start else "{}"))
        unknown = sorted(path for path in below if path not in used and path.suffix.lower() in kinds)
        for paths, what in (
            (sorted(path for path, stem in labeled if stem not in known), f"has an image ({' or '.join(patterns)})"),
            (unknown, f"matches {' or '.join(patterns)}"),
        ):
            if paths:
                log.warning(
                    "%s: %d files are not used, because none %s. First: %s", self.name, len(paths), what, paths[0]
                )

    def digest(self) -> str:
        """Return a hash of the image names and of the contents of images and label maps.

        The hash does not depend on the machine or the folder. Warn if images have an EXIF orientation.

        Raises:
            BenchmarkError: If a file is missing or cannot be read.
        """
        if self._digests:
            return self._digests[0]
        lines, turned = [], []
        for stem, image in zip(self.stems, self._images, strict=True):
            labels, _ = self.label_file(stem)
            try:
                pixels, values = image.read_bytes(), labels.read_bytes()
            except OSError as error:
                raise BenchmarkError(f"{self.name}: {error.filename} cannot be read: {error.strerror}.") from error
            lines.append(f"{stem} {sha256(pixels)} {sha256(values)}\n")
            turned += [stem] if exif_orientation(pixels) != 1 else []
        if turned:
            log.warning(
                "%s: %d images have an EXIF orientation (first: %s). They are turned upright, as in spar predict, "
                "so their label maps must be upright, too.", self.name, len(turned), turned[0],
            )  # fmt: skip
        self._digests.append(sha256("".join(lines).encode(errors="surrogateescape"), 12))
        return self._digests[0]

    def keep(self, count: int | None) -> None:
        """Keep `count` images, spread evenly over the benchmark; None or a larger number keeps all."""
        if count is not None and count < len(self):
            chosen = [i * len(self) // count for i in range(count)]
            self.stems, self._images = [self.stems[i] for i in chosen], [self._images[i] for i in chosen]
            self._digests = []

    def resized(self, area: int) -> "Benchmark":
        """Return a copy that resizes each image to the area of a square with side `area`, in pixels."""
        other = copy.copy(self)
        other.description = replace(self.description, resize=area)
        return other

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Names of each class by its label, in the order of the class ids."""
        return self.description.names()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> LabelledImage:
        """Return an image with its labels, both at the original size.

        Raises:
            BenchmarkError: If a file cannot be read, or if the labels do not match the image or the classes.
        """
        path = self._images[index]
        try:
            with path.open("rb") as file:
                image = decode_image(file, upright=True, name=str(path))
        except (OSError, ImageError) as error:
            raise BenchmarkError(f"{self.name}: {path} cannot be read: {error}. Restore the file.") from error
        label_path, kind = self.label_file(self.stems[index])
        try:
            values = read_label_file(label_path, kind.colors is not None)
            check_size(values.shape[:2] if kind.colors else values.shape, tuple(image.shape[-2:]), path)
            labels = class_ids(values, kind, len(self.description.classes))
        except (UserError, OSError) as error:
            raise BenchmarkError(f"{self.name}: {label_path} cannot be read: {error}. Restore the file.") from error
        except ValueError as error:
            raise BenchmarkError(f"{self.name}: {label_path} {error}.") from error
        return LabelledImage(self.stems[index], image, torch.from_numpy(labels))

    def label_file(self, stem: str) -> tuple[Path, LabelFiles]:
        """Return the path of an image's label map, and the format of its values.

        Raises:
            BenchmarkError: If the image has no label map.
        """
        candidates = self._label_files(stem)
        for path, kind in candidates:
            if path.is_file():
                return path, kind
        raise BenchmarkError(
            f"{self.name}: image {stem} has no label map. Expected {' or '.join(str(path) for path, _ in candidates)}. "
            f"{self._help}"
        )

    def _label_files(self, stem: str) -> list[tuple[Path, LabelFiles]]:
        return [(existing(self.folder, kind.file, stem), kind) for kind in self.description.labels]

    def results(self, counts: ConfusionMatrix) -> Result:
        """Compute the metrics of counts on this benchmark.

        Raises:
            BenchmarkError: If no pixel is counted, so that the mIoU is not defined.
        """
        if not counts.matrix.any():
            ignored = [
                each for kind in self.description.labels for each in (*(kind.ignored or ()), *kind.ignored_colors)
            ]
            raise BenchmarkError(
                f"{self.name}: no pixel of its {len(counts.images)} images is counted, because all labels are ignored "
                f"({', '.join(dict.fromkeys(map(str, ignored)))}). Check `labels` in its YAML file."
            )
        return counts.results()

    @property
    def paths(self) -> list[Path]:
        """Paths of the images."""
        return list(self._images)

    def image_size(self, index: int) -> tuple[int, int]:
        """Return height and width of an image, upright, from the header of its file.

        Raises:
            BenchmarkError: If the file cannot be read.
        """
        path = self._images[index]
        try:
            with path.open("rb") as file:
                size = image_size(file, upright=True)
        except OSError as error:
            raise BenchmarkError(f"{self.name}: {path} cannot be read: {error}. Restore the file.") from error
        if not all(size):
            raise BenchmarkError(f"{self.name}: {path} cannot be read as an image. Restore the file.")
        return size

    def has_labels(self, stem: str) -> bool:
        """Return True if the label map of an image exists."""
        return any(path.is_file() for path, _ in self._label_files(stem))

    def has_image(self, index: int) -> bool:
        """Return True if the file of an image exists; images in a split file may be missing."""
        return self._images[index].is_file()

    def _folder(self, file: Path) -> Path:
        """Return the data folder: below `root` for a bundled benchmark, otherwise relative to the YAML file."""
        ships = self.source in SHIPPED
        if ships and self.root is None:
            raise BenchmarkError(
                f"{self.name} needs the folder that contains the benchmarks. Set --root or data.benchmark_root."
            )
        base = Path(self.root) if ships and self.root is not None else file.parent
        candidates = [base / str(expand_home(folder)) for folder in self.description.folder]
        split, images = self.description.split, self.description.images
        wanted = [split] if split else list(dict.fromkeys(prefix(pattern) for pattern in images))
        for candidate in candidates:
            if any((candidate / path).exists() for path in wanted):
                return candidate
        expected = " or ".join(str(candidate / path) for candidate in candidates for path in wanted)
        raise BenchmarkError(f"{self.name} is not in {base}. Expected {expected}. {self._help}")

    @property
    def _help(self) -> str:
        if self.source not in SHIPPED:
            return ""
        text = f"`spar evaluate --check {self.root}` lists the expected files."
        if self.name in PREPARED:
            text += f" `spar evaluate --prepare {PREPARED[self.name]} --root DIR` creates its label maps."
        return text

    def _read_split(self, path: Path) -> list[str]:
        try:
            stems = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise BenchmarkError(
                f"{self.name}: the list of images {path} cannot be read: {error}. {self._help}"
            ) from error
        if not stems:
            raise BenchmarkError(f"{self.name}: the list of images {path} is empty. Restore the file.")
        return stems

    def _image(self, stem: str, patterns: list[str]) -> Path:
        candidates = [existing(self.folder, pattern, stem) for pattern in patterns]
        return next((path for path in candidates if path.is_file()), candidates[0])  # if missing, reading it raises


def opened_later(sources: Sequence[str], root: str | None) -> list[Benchmark]:
    """Return the benchmarks of a list, without opening them.

    Args:
        sources: Bundled benchmarks, sets of them (paper6, standard8, standard10), YAML files and folders.
        root: Folder with the data of the bundled benchmarks.

    Raises:
        BenchmarkError: If two benchmarks have the same name, because reports identify benchmarks by name.
    """
    benchmarks = [Benchmark(name, root) for source in sources for name in SETS.get(source, (source,))]
    names = [benchmark.name for benchmark in benchmarks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BenchmarkError(
            f"benchmarks: two benchmarks have the name {', '.join(twice)}. The name is that of the YAML file or "
            "folder: rename one of them."
        )
    return benchmarks
