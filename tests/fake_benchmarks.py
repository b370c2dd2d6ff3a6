"""Small versions of the six benchmarks in their usual layouts; labels contain all special values."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from spar_lightning.evaluation.pascal_context import IDS

Labels = NDArray[np.integer]


TRAIN_IDS = np.full(34, 255)
TRAIN_IDS[[7, 24, 26, 33]] = 0, 11, 13, 18


def image(seed: int, height: int, width: int) -> Image.Image:
    """Return an image of coarse random colors, which survive JPEG compression and give structured features."""
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8))
    return cells.resize((width, height), Image.Resampling.BICUBIC)


def labels(seed: int, height: int, width: int, values: list[int]) -> Labels:
    """Return vertical bands of the values, in random order."""
    order = np.random.default_rng(seed).permutation(values)
    columns = np.minimum(np.arange(width) * len(values) // width, len(values) - 1)
    return np.broadcast_to(order[columns], (height, width)).copy()


def palette_png(path: Path, values: Labels) -> None:
    """Write a palette PNG as in VOC, with colors that differ from the values."""
    file = Image.fromarray(values.astype(np.uint8))
    file.putpalette([(7 * i) % 256 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save(path)


def grey_png(path: Path, values: Labels) -> None:
    """Write a grayscale PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def jpg(path: Path, picture: Image.Image) -> None:
    """Write a JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=95)


def voc(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write PASCAL VOC 2012 with images of these sizes (height, width), and one more training image."""
    folder = root / "VOCdevkit" / "VOC2012"
    for i, (height, width) in enumerate(sizes):
        jpg(folder / "JPEGImages" / f"2007_{i:06d}.jpg", image(i, height, width))
        palette_png(folder / "SegmentationClass" / f"2007_{i:06d}.png", labels(i, height, width, [0, 1, 7, 20, 255]))
    jpg(folder / "JPEGImages" / "2009_000000.jpg", image(9, 8, 8))  # a training image
    split = folder / "ImageSets" / "Segmentation" / "val.txt"
    split.parent.mkdir(parents=True)
    split.write_text("".join(f"2007_{i:06d} \n" for i in range(len(sizes))) + "\n")


def cityscapes(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write Cityscapes with two cities: one with the labelIds of the download only, one with trainIds as well."""
    for i, (height, width) in enumerate(sizes):
        city = ("frankfurt", "lindau")[i % 2]
        stem = f"{city}_000000_{i:06d}"
        path = root / "cityscapes" / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(100 + i, height, width).save(path)
        raw = labels(100 + i, height, width, [0, 3, 7, 24, 26, 33, 30])
        path = root / "cityscapes" / "gtFine" / "val" / city
        grey_png(path / f"{stem}_gtFine_labelIds.png", raw)
        if city == "lindau":
            grey_png(path / f"{stem}_gtFine_labelTrainIds.png", TRAIN_IDS[raw])


def ade20k(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write ADE20K."""
    folder = root / "ade" / "ADEChallengeData2016"
    for i, (height, width) in enumerate(sizes):
        jpg(folder / "images" / "validation" / f"ADE_val_{i:08d}.jpg", image(200 + i, height, width))
        path = folder / "annotations" / "validation" / f"ADE_val_{i:08d}.png"
        grey_png(path, labels(i, height, width, [0, 1, 77, 150]))


def context(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write PASCAL Context as downloaded: VOC2010 and annotations with 459 classes, without converted label maps."""
    folder = root / "VOCdevkit" / "VOC2010"
    (folder / "trainval").mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        jpg(folder / "JPEGImages" / f"2008_{i:06d}.jpg", image(300 + i, height, width))
        raw = labels(300 + i, height, width, [IDS[1], IDS[30], IDS[59], 1, 459])
        savemat(folder / "trainval" / f"2008_{i:06d}.mat", {"LabelMap": raw.astype(np.uint16)})
    split = folder / "ImageSets" / "Main" / "val.txt"
    split.parent.mkdir(parents=True)
    split.write_text("".join(f"2008_{i:06d}\n" for i in range(len(sizes))))


def all_six(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write all six benchmarks."""
    for write in (voc, cityscapes, ade20k, context):
        write(root, sizes)
