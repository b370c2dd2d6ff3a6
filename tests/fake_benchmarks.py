"""Small versions of the bundled benchmarks in their usual layouts; labels contain all special values."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from spar_lightning.evaluation.ade20k_full import IDS as FULL
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
    split.parent.mkdir(parents=True, exist_ok=True)
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


def coco(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write COCO-Stuff as downloaded: images, and label maps with 182 values, of which 11 never occur."""
    folder = root / "coco"
    for i, (height, width) in enumerate(sizes):
        jpg(folder / "val2017" / f"{i:012d}.jpg", image(500 + i, height, width))
        path = folder / "stuffthingmaps" / "val2017" / f"{i:012d}.png"
        grey_png(path, labels(500 + i, height, width, [0, 12, 89, 91, 181, 255]))


def ade20k_full(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write the full ADE20K as downloaded: colors (red // 10 * 256 + green) of two classes and two other numbers."""
    for i, (height, width) in enumerate(sizes):
        scene = root / "ADE20K_2021_17_01" / "images" / "ADE" / "validation" / "urban" / f"street{i}"
        jpg(scene / f"ADE_val_{i:08d}.jpg", image(600 + i, height, width))
        numbers = labels(600 + i, height, width, [FULL[0], FULL[846], 0, 3])
        colors = np.stack([numbers // 256 * 10, numbers % 256, np.zeros_like(numbers)], axis=-1).astype(np.uint8)
        Image.fromarray(colors).save(scene / f"ADE_val_{i:08d}_seg.png")


def all_ten(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write all bundled benchmarks."""
    for write in (voc, cityscapes, ade20k, context, coco, ade20k_full):
        write(root, sizes)


def training(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write the training images of PASCAL VOC, Cityscapes and ADE20K, with images of these sizes."""
    voc, city, ade = root / "VOCdevkit" / "VOC2012", root / "cityscapes", root / "ade" / "ADEChallengeData2016"
    for i, (height, width) in enumerate(sizes):
        picture = image(400 + i, height, width)
        jpg(voc / "JPEGImages" / f"2008_{i:06d}.jpg", picture)
        palette_png(voc / "SegmentationClass" / f"2008_{i:06d}.png", labels(i, height, width, [0, 1, 7, 20, 255]))
        stem = f"aachen_000000_{i:06d}"
        path = city / "leftImg8bit" / "train" / "aachen" / f"{stem}_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        raw = labels(i, height, width, [0, 3, 7, 24, 26, 33, 30])
        grey_png(city / "gtFine" / "train" / "aachen" / f"{stem}_gtFine_labelIds.png", raw)
        jpg(ade / "images" / "training" / f"ADE_train_{i:08d}.jpg", picture)
        grey_png(ade / "annotations" / "training" / f"ADE_train_{i:08d}.png", labels(i, height, width, [0, 1, 77, 150]))
    split = voc / "ImageSets" / "Segmentation" / "train.txt"
    split.parent.mkdir(parents=True, exist_ok=True)
    split.write_text("".join(f"2008_{i:06d}\n" for i in range(len(sizes))))


def instances(root: Path) -> None:
    """Write instance maps for the validation images of Cityscapes (two instances per thing) and ADE20K."""
    for path in (root / "cityscapes" / "gtFine" / "val").glob("*/*_labelIds.png"):
        values = np.array(Image.open(path)).astype(np.uint16)
        halves = np.arange(values.shape[0])[:, None] * 2 // values.shape[0]
        values = np.where(values >= 24, 1000 * values + halves, values).astype(np.uint16)
        Image.fromarray(values).save(path.with_name(path.name.replace("labelIds", "instanceIds")))
    folder = root / "ade" / "ADEChallengeData2016"
    for path in (folder / "annotations" / "validation").glob("*.png"):
        values = np.array(Image.open(path))
        colors = np.zeros((*values.shape, 3), np.uint8)
        colors[values == 77] = 43, 1, 0  # the 43rd category, of another class than the label
        target = folder / "annotations_instance" / "validation" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colors).save(target)
