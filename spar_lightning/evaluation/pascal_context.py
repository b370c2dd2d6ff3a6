"""PASCAL Context: the download's annotations of 459 classes become label maps of the 60 that are evaluated.

The download (trainval.tar.gz of the PASCAL-Context site) is a folder of MATLAB files beside VOC2010, one for
each of its 10 103 trainval images. mmsegmentation's preparation needs another file and a package that is no
longer kept; the conversion itself is a table: the place of a value in this sorted list is the class,
everything else is background.
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
    """Classes 0 to 59 of the annotation's values 0 to 459.

    Raises:
        ValueError: A value is outside.
    """
    if values.min() < 0 or values.max() > LARGEST:
        raise ValueError(f"holds values from {values.min()} to {values.max()}, but the annotation has 0 to {LARGEST}")
    table = np.zeros(LARGEST + 1, np.uint8)
    table[list(IDS)] = np.arange(len(IDS))
    return np.asarray(table[values])


def convert(voc2010: Path, annotations: Path) -> Iterator[str]:
    """Write the label map of every validation image, and their list; yields the images' names.

    Args:
        voc2010: Folder with JPEGImages/ and ImageSets/Main/val.txt.
        annotations: Folder with NAME.mat, each with the entry LabelMap.

    Raises:
        BenchmarkError: A file is missing or damaged.
    """
    if (voc2010 / LIST).exists():
        raise BenchmarkError(
            f"{voc2010 / LIST} exists, so the label maps have been made. Delete it to make both anew: results on "
            "another list of images do not compare."
        )
    main = voc2010 / "ImageSets" / "Main" / "val.txt"
    if not main.is_file():
        raise BenchmarkError(f"{main} does not exist. It comes with VOC2010: give the folder above VOC2010 as --root.")
    if not annotations.is_dir():
        raise BenchmarkError(
            f"{annotations} does not exist. Unpack trainval.tar.gz of PASCAL-Context there, or give its folder of .mat "
            "files as --annotations."
        )
    names = [line.split()[0] for line in main.read_text().splitlines() if line.strip()]
    if missing := [name for name in names if not (annotations / f"{name}.mat").is_file()]:
        raise BenchmarkError(
            f"{annotations} lacks {len(missing)} of the {len(names)} images in {main}, such as {missing[0]}.mat. "
            "Unpack trainval.tar.gz of PASCAL-Context again."
        )
    (voc2010 / LABELS).mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(to_60_of(annotations / f"{name}.mat")).save(voc2010 / LABELS / f"{name}.png")
        yield name
    (voc2010 / LIST).parent.mkdir(exist_ok=True)
    (voc2010 / LIST).write_text("\n".join(names) + "\n")  # last: it stands for all label maps


def to_60_of(path: Path) -> NDArray[np.uint8]:
    """The 60 classes of one MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise BenchmarkError("MATLAB files are read with scipy: pip install 'spar-lightning[context]'.") from error
    try:
        return to_60(loadmat(path)["LabelMap"])
    except Exception as error:  # scipy's reader has many ways to fail
        raise BenchmarkError(f"{path} cannot be converted: {error}. Restore the file.") from error
