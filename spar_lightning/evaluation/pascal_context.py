"""PASCAL Context: conversion of the annotations with 459 classes to label maps with the 60 evaluated classes.

The download (trainval.tar.gz from the PASCAL-Context website) is a folder of MATLAB files, one for each of the 10,103
trainval images; the images are in VOC2010. The conversion in mmsegmentation needs an additional file and a package
that is no longer maintained. Here, the class of a value is its index in the sorted list `IDS`; all other values are
background.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

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
LIST: Final = "ImageSets/SegmentationContext/val.txt"
LABELS: Final = "SegmentationClassContext"


def to_60(values: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Convert annotation values from 0 to 459 to class ids from 0 to 59.

    Raises:
        ValueError: If a value is outside 0 to 459.
    """
    if values.min() < 0 or values.max() > LARGEST:
        raise ValueError(f"the values range from {values.min()} to {values.max()}, but must be from 0 to {LARGEST}")
    table = np.zeros(LARGEST + 1, np.uint8)
    table[list(IDS)] = np.arange(len(IDS))
    return np.asarray(table[values])


def convert(voc2010: Path, annotations: Path) -> Iterator[str]:
    """Write the label maps of all validation images and the list of these images; yield the image names.

    Args:
        voc2010: Folder with JPEGImages/ and ImageSets/Main/val.txt.
        annotations: Folder with one file NAME.mat per image, each with the entry LabelMap.

    Raises:
        BenchmarkError: If a file is missing or damaged, or if the label maps already exist.
    """
    if (voc2010 / LIST).exists():
        raise BenchmarkError(
            f"{voc2010 / LIST} already exists, so the label maps have already been created. To create both again, "
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
    (voc2010 / LABELS).mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(to_60_of(annotations / f"{name}.mat")).save(voc2010 / LABELS / f"{name}.png")
        yield name
    (voc2010 / LIST).parent.mkdir(exist_ok=True)
    (voc2010 / LIST).write_text("\n".join(names) + "\n")  # written last: the list marks the label maps as complete


def to_60_of(path: Path) -> NDArray[np.uint8]:
    """Return the label map (H, W) with 60 classes of a MATLAB file.

    Raises:
        BenchmarkError: If scipy is not installed, or if the file cannot be converted.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise BenchmarkError(
            "Reading MATLAB files requires scipy. Run: pip install 'spar-lightning[context]'."
        ) from error
    try:
        return to_60(loadmat(path)["LabelMap"])
    except Exception as error:  # scipy's reader raises many types
        raise BenchmarkError(f"{path} cannot be converted: {error}. Restore the file.") from error
