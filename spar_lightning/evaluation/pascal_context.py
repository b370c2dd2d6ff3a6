"""PASCAL Context: conversion of the annotations with 459 classes to label maps with 60 or with all 459 classes.

The download (trainval.tar.gz from the PASCAL-Context website) is a folder of MATLAB files, one for each of the 10,103
trainval images; the images are in VOC2010. The conversion in mmsegmentation needs an additional file and a package
that is no longer maintained. Here, the class of a value is its index in the sorted list `IDS`; all other values are
background. With all classes, the values are kept: 0 is not counted, and k is class k - 1.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spar_lightning.evaluation.benchmark_config import BenchmarkError

# fmt: off
IDS: Final = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)
# fmt: on
LARGEST: Final = 459


def to_60(values: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Convert annotation values from 0 to 459 to class ids from 0 to 59."""
    table = np.zeros(LARGEST + 1, np.uint8)
    table[list(IDS)] = np.arange(len(IDS))
    return np.asarray(table[values])


def to_459(values: NDArray[np.integer]) -> NDArray[np.uint16]:
    """Return annotation values from 0 to 459 with 16 bits."""
    return values.astype(np.uint16)


class Target(NamedTuple):
    """Label maps to create.

    Attributes:
        split: Path of the list of images below VOC2010.
        labels: Folder of the label maps below VOC2010.
        convert: Function from annotation values (H, W), 0 to 459, to a label map.
    """

    split: str
    labels: str
    convert: Callable[[NDArray[np.integer]], NDArray[Any]]


TARGETS: Final = {
    "context": Target("ImageSets/SegmentationContext/val.txt", "SegmentationClassContext", to_60),
    "context459": Target("ImageSets/SegmentationContext459/val.txt", "SegmentationClassContext459", to_459),
}


def convert(voc2010: Path, annotations: Path, target: Target) -> Iterator[str]:
    """Write the label maps of all validation images and the list of these images; yield the image names.

    Args:
        voc2010: Folder with JPEGImages/ and ImageSets/Main/val.txt.
        annotations: Folder with one file NAME.mat per image, each with the entry LabelMap.
        target: Label maps to create.

    Raises:
        BenchmarkError: If a file is missing or damaged, or if the label maps already exist.
    """
    split, labels = voc2010 / target.split, voc2010 / target.labels
    if split.exists():
        raise BenchmarkError(
            f"{split} already exists, so the label maps have already been created. To create both again, "
            "delete this file. Results on different lists of images are not comparable."
        )
    main = voc2010 / "ImageSets" / "Main" / "val.txt"
    if not main.is_file():
        raise BenchmarkError(f"{main} does not exist. It is part of VOC2010: set --root to the folder above VOC2010.")
    if not annotations.is_dir():
        raise BenchmarkError(
            f"{annotations} does not exist. Unpack trainval.tar.gz of PASCAL-Context there, or set --annotations to "
            "its folder of .mat files."
        )
    names = [line.split()[0] for line in main.read_text().splitlines() if line.strip()]
    if missing := [name for name in names if not (annotations / f"{name}.mat").is_file()]:
        raise BenchmarkError(
            f"{annotations} does not contain the annotations of {len(missing)} of the {len(names)} images in {main} "
            f"(first: {missing[0]}.mat). Unpack trainval.tar.gz of PASCAL-Context again."
        )
    labels.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(target.convert(read_annotation(annotations / f"{name}.mat"))).save(labels / f"{name}.png")
        yield name
    split.parent.mkdir(exist_ok=True)
    split.write_text("\n".join(names) + "\n")  # written last: the list marks the label maps as complete


def read_annotation(path: Path) -> NDArray[np.integer]:
    """Return the annotation values (H, W) of a MATLAB file, from 0 to 459.

    Raises:
        BenchmarkError: If scipy is not installed, or if the file cannot be read.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise BenchmarkError(
            "Reading MATLAB files requires scipy. Run: pip install 'spar-lightning[context]'."
        ) from error
    try:
        values: NDArray[np.integer] = loadmat(path)["LabelMap"]
        if values.dtype.kind not in "ui" or values.ndim != 2:
            raise ValueError(f"LabelMap has type {values.dtype} and shape {values.shape}")
        low, high = values.min(), values.max()
    except Exception as error:  # scipy's reader raises many types
        raise BenchmarkError(f"{path} cannot be converted: {error}. Restore the file.") from error
    if low < 0 or high > LARGEST:
        raise BenchmarkError(
            f"{path} cannot be converted: its values range from {low} to {high}, but must be from 0 to {LARGEST}. "
            "Restore the file."
        )
    return values
