"""YAML description of a benchmark: paths of images and labels, meaning of label values, class names, protocol.

The benchmarks of the paper and four more are bundled as such files (configs/benchmarks); user-defined files can be in
any folder. In a path pattern, `{}` stands for the name of an image, including its subfolders.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml
from jsonargparse import ArgumentParser

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError, nearest
from spar_lightning.evaluation.label_files import LabelFiles
from spar_lightning.files.hashing import hash_json
from spar_lightning.files.home import expand_home
from spar_lightning.image.resize import Resize
from spar_lightning.segmentation.class_file import SUFFIXES as CLASS_FILES
from spar_lightning.segmentation.class_file import read_class_file
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.label_map import Thresholds
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import TextClassifiers

SUFFIXES: Final = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")  # of images, without `images` in the YAML file


class BenchmarkError(UserError):
    """Error for a benchmark that is missing or invalid."""


@dataclass(frozen=True)
class ClassNames:
    """Class of a benchmark.

    Attributes:
        label: Name of the class in reports.
        names: Names of the class in prompts; the name with the highest similarity counts.
    """

    label: str
    names: list[str]


@dataclass(frozen=True)
class InstanceFiles:
    """Format of instance maps, for `spar probe panoptic`.

    Attributes:
        file: Pattern of the instance map paths.
        things: Labels of the classes with instances; all others are stuff.
        first: Smallest value of an instance. Pixels of things with a smaller value are not counted.
        categories: For instance maps in color: label of the class for each red value from 1; green is the number of the
            instance, from 1. Instances replace the labels of their pixels. null: one channel, and the
            class is that of the label map.
    """

    file: str
    things: list[str]
    first: int = 1
    categories: list[str] | None = None


@dataclass(frozen=True)
class BenchmarkConfig:
    """Labeled images and the protocol of their evaluation.

    Attributes:
        classes: Classes, in the order of the class ids, or the path of a file with class names (.txt, .json), relative
            to the YAML file.
        folder: Data folder, relative to the YAML file (bundled benchmarks: to the root folder). In a list, the first
            folder that contains the data is used.
        images: Pattern of the image paths; a list if there are several file formats. The case of suffixes does not
            matter.
        labels: Formats of the label maps; each image uses the first format that has a file for it.
        split: Text file with one image name per line; null uses all files that match `images`.
        train: Replacements in `images`, `labels` and `split` that give the training images of `spar probe`, such as
            {/val/: /train/}; null if the benchmark has only images for evaluation.
        instances: Format of instance maps; null if all classes are stuff.
        expected_images: Number of images of the complete benchmark; null if it is not known.
        resize: Maximum long and short side of the resized image, in pixels; or one number, the side of a square with
            the area of the resized image; null keeps the size.
        background: True if class 0 covers everything outside the other classes; required for thresholds.
        thresholds: Thresholds that assign pixels to the background.
        backbone_thresholds: Thresholds for particular backbones, by class name; they replace `thresholds`.
    """

    classes: list[ClassNames]
    folder: list[str] = field(default_factory=lambda: ["."])
    images: list[str] = field(default_factory=lambda: [f"images/{{}}.{suffix}" for suffix in SUFFIXES])
    labels: list[LabelFiles] = field(default_factory=lambda: [LabelFiles("labels/{}.png")])
    split: str | None = None
    train: dict[str, str] | None = None
    instances: InstanceFiles | None = None
    expected_images: int | None = None
    resize: Resize = None
    background: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)
    backbone_thresholds: dict[str, Thresholds] = field(default_factory=dict)

    def names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of each class by its label, in the order of the class ids."""
        return {entry.label: tuple(entry.names) for entry in self.classes}

    def training(self) -> "BenchmarkConfig":
        """Return the description of the training images.

        Raises:
            ValueError: `train` is missing, or does not lead to other images.
        """
        if self.train is None:
            raise ValueError("train is missing, which names the training images, such as train: {/val/: /train/}")

        def path(text: str) -> str:
            for old, new in (self.train or {}).items():
                text = text.replace(old, new)
            return text

        changed = replace(
            self,
            images=[path(pattern) for pattern in self.images],
            labels=[replace(kind, file=path(kind.file)) for kind in self.labels],
            split=None if self.split is None else path(self.split),
            train=None,
        )
        if (changed.images, changed.split) == (self.images, self.split):
            raise ValueError(f"train: {self.train} replaces nothing in images or split, so it names the same images")
        return changed

    def segmenter(self, backbone: Backbone, config: InferenceConfig, classifiers: TextClassifiers) -> Segmenter:
        """Return a segmenter that follows the protocol of this benchmark.

        Args:
            backbone: Backbone of the segmenter.
            config: Inference settings.
            classifiers: Text embeddings of class names for this backbone.
        """
        # Thresholds are defined for similarities; refined scores have a different scale.
        thresholds = self.thresholds_of(type(backbone)) if config.refine is None else None
        return Segmenter(backbone, classifiers(self.names()), config, resize=self.resize, thresholds=thresholds)

    def thresholds_of(self, backbone: type) -> Thresholds:
        """Return the thresholds of a backbone class or its nearest base class; otherwise the common thresholds."""
        named = (
            self.backbone_thresholds[cls.__name__]
            for cls in backbone.__mro__
            if cls.__name__ in self.backbone_thresholds
        )
        return next(named, self.thresholds)

    def protocol(self, backbone: type) -> dict[str, Any]:
        """Return the settings of this benchmark that affect a result, without images and network."""
        return {
            "classes": len(self.classes),
            "names": sum(len(entry.names) for entry in self.classes),
            "names_sha256": hash_json([asdict(entry) for entry in self.classes], 12),
            "labels": [labels.protocol() for labels in self.labels],
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "thresholds": asdict(self.thresholds_of(backbone)),
        }


def shipped() -> dict[str, Path]:
    """Return the YAML files of the bundled benchmarks by name."""
    folder = Path(str(resources.files("spar_lightning.configs"))) / "benchmarks"
    return {name: folder / f"{name}.yaml" for name in SHIPPED}


# The six of the paper's Table 1 in its order, and those that newer papers on open vocabularies add.
SHIPPED: Final = (
    *("voc21", "voc20", "cityscapes", "ade20k", "context60", "context59"),
    *("coco_object", "coco_stuff", "ade847", "context459"),
)
SETS: Final = {"paper6": SHIPPED[:6], "standard8": SHIPPED[:8], "standard10": SHIPPED}

# Benchmarks whose label maps are created by `spar evaluate --prepare`, and the argument of that option.
PREPARED: Final = {"context60": "context", "context59": "context", "context459": "context459", "ade847": "ade847"}


def locate(source: str) -> Path:
    """Return the YAML file of a benchmark.

    Args:
        source: Name of a bundled benchmark, path of a YAML file, or folder with benchmark.yaml.

    Raises:
        BenchmarkError: If the file does not exist.
    """
    if source in SHIPPED:
        return shipped()[source]
    path = Path(expand_home(source))
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        path = path / "benchmark.yaml"
    if not path.is_file():
        raise BenchmarkError(
            f"Benchmark {source!r} not found: {path} does not exist. "
            f"{'It is now called paper6. ' if source == 'all' else nearest(source, [*SETS, *SHIPPED])}Allowed: "
            f"{', '.join([*SETS, *SHIPPED])}, the path of a YAML file, or a folder with benchmark.yaml, images/ and "
            "labels/."
        )
    return path


def read(path: Path) -> BenchmarkConfig:
    """Read and validate the YAML file of a benchmark.

    Raises:
        BenchmarkError: If the file is not valid YAML, or has missing, unknown or invalid keys.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise BenchmarkError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise BenchmarkError(f"{path} must contain classes: [{{label: disc, names: [disc, circle]}}, ..].")
    classes = _classes(content.get("classes"), path)
    content = {key: value for key, value in content.items() if key != "classes"}
    content = {**content, **{key: [content[key]] for key in ("folder", "images") if isinstance(content.get(key), str)}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BenchmarkConfig, skip={"classes"})  # parsing 150 classes takes seconds
    try:
        settings = parser.instantiate(parser.parse_object(content))
        description = BenchmarkConfig(classes, **vars(settings))
    except UserError as error:
        raise BenchmarkError(f"{path}: {error}") from error
    except Exception as error:  # jsonargparse raises several types
        keys = ", ".join(key.name for key in fields(BenchmarkConfig))
        raise BenchmarkError(f"{path}: {' '.join(str(error).split())}. Allowed keys are {keys}.") from error
    _check(description, path)
    try:
        if description.train is not None:
            description.training()
    except ValueError as error:
        raise BenchmarkError(f"{path}: {error}.") from error
    try:
        return replace(description, labels=[kind.resolved(len(classes)) for kind in description.labels])
    except ValueError as error:
        raise BenchmarkError(f"{path}: labels: {error}.") from error


def class_names(source: str) -> dict[str, tuple[str, ...]]:
    """Return the names of each class by its label, of a benchmark or of a file with class names.

    Args:
        source: Name of a bundled benchmark, path of its YAML file, or path of a .txt or .json file with class names.

    Raises:
        UserError: If the file does not exist or is invalid.
    """
    path = Path(expand_home(source))
    return read_class_file(path) if path.suffix in CLASS_FILES else read(locate(source)).names()


def _classes(entries: Any, path: Path) -> list[ClassNames]:
    if isinstance(entries, str):
        return [ClassNames(label, [*names]) for label, names in read_class_file(path.parent / entries).items()]
    if not isinstance(entries, list) or not all(
        isinstance(entry, Mapping)
        and entry.keys() == {"label", "names"}
        and isinstance(entry["names"], list)
        and all(isinstance(name, str) for name in (entry["label"], *entry["names"]))
        for entry in entries
    ):
        raise BenchmarkError(f"{path} must contain classes: [{{label: disc, names: [disc, circle]}}, ..].")
    return [ClassNames(**entry) for entry in entries]


def _check(description: BenchmarkConfig, path: Path) -> None:
    labels = [entry.label for entry in description.classes]
    if not labels:
        raise BenchmarkError(f"{path}: classes is empty. Add at least one: {{label: disc, names: [disc, circle]}}.")
    for entry in description.classes:
        if not entry.names or not all(name.strip() for name in entry.names):
            raise BenchmarkError(f"{path}: class {entry.label!r} needs at least one name, and names must not be empty.")
    names = [name for entry in description.classes for name in dict.fromkeys(entry.names)]
    for words, what in ((labels, "label"), (names, "name")):
        if twice := sorted(word for word, count in Counter(words).items() if count > 1):
            raise BenchmarkError(f"{path}: two classes have the {what} {', '.join(twice)}. A {what} must be unique.")
    instances = description.instances
    named = {*instances.things, *(instances.categories or ())} if instances else set()
    if unknown := sorted(named - {*labels}):
        raise BenchmarkError(
            f"{path}: instances: {unknown[0]!r} is not the label of a class. {nearest(unknown[0], labels)}"
            f"Allowed: {', '.join(labels)}."
        )
    patterns = [*description.images, *(kind.file for kind in description.labels)]
    for pattern in [*patterns, *([instances.file] if instances else [])]:
        if pattern.count("{}") != 1:
            raise BenchmarkError(f"{path}: the pattern {pattern!r} must contain {{}} exactly once, for the image name.")
    if not description.folder or not description.images or not description.labels:
        raise BenchmarkError(f"{path}: folder, images and labels need at least one entry each.")
    sides = description.resize if isinstance(description.resize, tuple) else (description.resize,)
    if any(side is not None and side < 1 for side in sides):
        raise BenchmarkError(f"{path}: resize must be one or two numbers of at least 1, but got {description.resize}.")
    for thresholds in (description.thresholds, *description.backbone_thresholds.values()):
        if (thresholds.probability or thresholds.area is not None) and not description.background:
            raise BenchmarkError(
                f"{path}: thresholds assign pixels to class 0, but {labels[0]!r} is not declared as the background. "
                "Set background: true, or remove probability and area."
            )
    for kind in description.labels:
        if kind.label_map is not None and kind.reduce_zero_label:
            raise BenchmarkError(f"{path}: label_map and reduce_zero_label cannot be combined. Set only one of them.")
        if kind.label_map is not None and (not kind.label_map or min(kind.label_map) < 0):
            raise BenchmarkError(f"{path}: label_map needs at least one entry, and its keys must be at least 0.")
        known = range(len(labels))
        if wrong := sorted({*(kind.label_map or {}).values()} - {*known}):
            raise BenchmarkError(f"{path}: label_map contains the class id {wrong[0]}. Allowed: 0 to {known[-1]}.")
