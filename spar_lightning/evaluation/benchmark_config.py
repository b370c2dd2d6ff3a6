"""What a benchmark is, in a YAML file: where images and labels lie, what labels mean, class names, protocol.

The six benchmarks of the paper are such files too (configs/benchmarks); one's own may lie anywhere. In a
pattern `{}` stands for what identifies an image, subfolders included.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError, nearest
from spar_lightning.files.hashing import hash_json
from spar_lightning.image.resize import Resize
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.label_map import Thresholds
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.segmentation.text_embeddings import TextClassifiers


class BenchmarkError(UserError):
    """A benchmark is missing or malformed."""


@dataclass(frozen=True)
class ClassNames:
    """One class.

    Attributes:
        label: How results call it.
        names: What prompts call it; the best of them counts.
    """

    label: str
    names: list[str]


@dataclass(frozen=True)
class LabelFiles:
    """Label maps of one kind: one channel, or a palette whose indices count.

    Attributes:
        file: Pattern of the files' paths.
        reduce_zero_label: Whether 0 is not counted and k stands for class k - 1.
        label_map: Value in the file -> class; null takes values as classes.
        ignored: Values that are not counted.
    """

    file: str
    reduce_zero_label: bool = False
    label_map: dict[int, int] | None = None
    ignored: list[int] = field(default_factory=lambda: [255])


@dataclass(frozen=True)
class BenchmarkConfig:
    """A labelled set of images and the protocol of its evaluation.

    Attributes:
        classes: In the order of the class ids.
        folder: Where it lies, relative to this file; of several the first that exists.
        images: Pattern of the images' paths; several where their format differs.
        labels: Label maps; for each image the first kind whose file exists.
        split: Text file with one image in each line; null takes all that `images` finds.
        expected_images: How many there are when nothing is missing; null where that is not known.
        resize: Bounds of the long and of the short side that images are brought to, in pixels; or one number, the
            side of the square whose area they get; null keeps sizes.
        background: Whether class 0 is everything that the other classes are not; thresholds need it.
        thresholds: When a pixel becomes background.
        backbone_thresholds: The same for some classes of backbones, by their names.
    """

    classes: list[ClassNames]
    folder: list[str] = field(default_factory=lambda: ["."])
    images: list[str] = field(default_factory=lambda: ["images/{}.png", "images/{}.jpg"])
    labels: list[LabelFiles] = field(default_factory=lambda: [LabelFiles("labels/{}.png")])
    split: str | None = None
    expected_images: int | None = None
    resize: Resize = None
    background: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)
    backbone_thresholds: dict[str, Thresholds] = field(default_factory=dict)

    def names(self) -> dict[str, tuple[str, ...]]:
        """Label -> names, in the order of the class ids."""
        return {entry.label: tuple(entry.names) for entry in self.classes}

    def segmenter(self, backbone: Backbone, config: InferenceConfig, classifiers: TextClassifiers) -> Segmenter:
        """Return a segmenter that follows this benchmark's protocol.

        Args:
            backbone: The network.
            config: How it segments.
            classifiers: Text embeddings of the backbone's classes.
        """
        # Refined scores have another scale than the similarities that thresholds belong to.
        thresholds = self.thresholds_of(type(backbone)) if config.refine is None else None
        return Segmenter(backbone, classifiers(self.names()), config, resize=self.resize, thresholds=thresholds)

    def thresholds_of(self, backbone: type) -> Thresholds:
        """Those of the backbone's class or of the nearest class above it, or those of all."""
        named = (
            self.backbone_thresholds[cls.__name__]
            for cls in backbone.__mro__
            if cls.__name__ in self.backbone_thresholds
        )
        return next(named, self.thresholds)

    def protocol(self, backbone: type) -> dict[str, Any]:
        """What a result depends on beside images and network."""
        return {
            "classes": len(self.classes),
            "names": sum(len(entry.names) for entry in self.classes),
            "names_sha256": hash_json([asdict(entry) for entry in self.classes], 12),
            "labels": [asdict(labels) for labels in self.labels],
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "thresholds": asdict(self.thresholds_of(backbone)),
        }


def shipped() -> dict[str, Path]:
    """Name -> file of the benchmarks in the package."""
    folder = Path(str(resources.files("spar_lightning.configs"))) / "benchmarks"
    return {name: folder / f"{name}.yaml" for name in SHIPPED}


SHIPPED = ("voc21", "voc20", "cityscapes", "ade20k", "context60", "context59")  # in the order of the paper's Table 1


def locate(source: str) -> Path:
    """The YAML file of a benchmark: by its name, by its path, or benchmark.yaml in a folder.

    Raises:
        BenchmarkError: There is none.
    """
    if source in SHIPPED:
        return shipped()[source]
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = path / "benchmark.yaml"
    if not path.is_file():
        raise BenchmarkError(
            f"There is no benchmark {source!r}: {path} does not exist. {nearest(source, SHIPPED)}Allowed are "
            f"{', '.join(SHIPPED)}, the path of a YAML file, or a folder with benchmark.yaml, images/ and labels/."
        )
    return path


def read(path: Path) -> BenchmarkConfig:
    """Read and check a description.

    Raises:
        BenchmarkError: The file is no YAML of this form.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise BenchmarkError(f"{path} must hold classes: [{{label: disc, names: [disc, circle]}}, ..].")
    classes = _classes(content.get("classes"), path)
    content = {key: value for key, value in content.items() if key != "classes"}
    content = {**content, **{key: [content[key]] for key in ("folder", "images") if isinstance(content.get(key), str)}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BenchmarkConfig, skip={"classes"})  # of 150 dataclasses it takes seconds
    try:
        settings = parser.instantiate(parser.parse_object(content))
        description = BenchmarkConfig(classes, **vars(settings))
    except UserError as error:
        raise BenchmarkError(f"{path}: {error}") from error
    except Exception as error:  # jsonargparse's own, of several types
        keys = ", ".join(key.name for key in fields(BenchmarkConfig))
        raise BenchmarkError(f"{path}: {' '.join(str(error).split())}. Keys of a benchmark are {keys}.") from error
    _check(description, path)
    return description


def _classes(entries: Any, path: Path) -> list[ClassNames]:
    if not isinstance(entries, list) or not all(
        isinstance(entry, Mapping)
        and entry.keys() == {"label", "names"}
        and isinstance(entry["names"], list)
        and all(isinstance(name, str) for name in (entry["label"], *entry["names"]))
        for entry in entries
    ):
        raise BenchmarkError(f"{path} must hold classes: [{{label: disc, names: [disc, circle]}}, ..].")
    return [ClassNames(**entry) for entry in entries]


def _check(description: BenchmarkConfig, path: Path) -> None:
    labels = [entry.label for entry in description.classes]
    if not labels:
        raise BenchmarkError(f"{path}: classes is empty. Give at least one: {{label: disc, names: [disc, circle]}}.")
    for entry in description.classes:
        if not entry.names or not all(name.strip() for name in entry.names):
            raise BenchmarkError(f"{path}: class {entry.label!r} needs at least one name, and none may be empty.")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise BenchmarkError(f"{path}: two classes are called {', '.join(twice)}. Every class needs its own label.")
    for pattern in [*description.images, *(kind.file for kind in description.labels)]:
        if pattern.count("{}") != 1:
            raise BenchmarkError(f"{path}: the pattern {pattern!r} must hold {{}} once, for the image's name.")
    if not description.folder or not description.images or not description.labels:
        raise BenchmarkError(f"{path}: folder, images and labels need at least one entry each.")
    sides = description.resize if isinstance(description.resize, tuple) else (description.resize,)
    if any(side is not None and side < 1 for side in sides):
        raise BenchmarkError(f"{path}: resize takes one or two numbers of at least 1, but got {description.resize}.")
    for thresholds in (description.thresholds, *description.backbone_thresholds.values()):
        if (thresholds.probability or thresholds.area is not None) and not description.background:
            raise BenchmarkError(
                f"{path}: thresholds turn pixels into class 0, but {labels[0]!r} is not said to be the background. "
                "Set background: true, or leave out probability and area."
            )
    for kind in description.labels:
        if kind.label_map is not None and kind.reduce_zero_label:
            raise BenchmarkError(f"{path}: label_map and reduce_zero_label exclude each other. Give one of them.")
        if kind.label_map is not None and (not kind.label_map or min(kind.label_map) < 0):
            raise BenchmarkError(f"{path}: label_map needs at least one entry, and none below 0.")
        if kind.label_map and not set(kind.label_map.values()) <= set(range(len(labels))):
            raise BenchmarkError(f"{path}: label_map leads to classes outside 0 to {len(labels) - 1}.")
