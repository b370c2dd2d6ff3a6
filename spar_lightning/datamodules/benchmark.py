"""A labelled validation set in a folder: images/, labels/ and benchmark.yaml with the class names.

benchmark.yaml      classes: [{label: disc, names: [disc, circle]}, ..]; the order is the class id
images/NAME.png     or .jpg
labels/NAME.png     one channel, class ids; 255 is not counted
"""

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset

from spar_lightning.datamodules.image import ImageError, decode_image
from spar_lightning.datamodules.sample import IGNORED, LabelledImage
from spar_lightning.errors import UserError


class BenchmarkError(UserError):
    """A validation set is missing or malformed."""


class Benchmark(Dataset[LabelledImage]):
    """Labelled images for mIoU.

    Args:
        root: Folder with images/, labels/ and benchmark.yaml.
        name: How the results are called; null takes the folder's name.
        max_images: Use only the first images; null takes all.
    """

    def __init__(self, root: str, name: str | None = None, max_images: int | None = None) -> None:
        self.root = Path(root)
        self.name = name or self.root.name
        self.max_images = max_images
        self.classes: dict[str, tuple[str, ...]] = {}
        self.files: list[Path] = []

    def open(self) -> None:
        """List the files and read the class names.

        Raises:
            BenchmarkError: Folders, files or class names are missing.
        """
        description = self.root / "benchmark.yaml"
        if not description.is_file():
            raise BenchmarkError(
                f"The validation set {self.name} should lie in {self.root}, but {description} does not exist. "
                "Expected there: benchmark.yaml with classes, images/*.png or *.jpg, labels/*.png."
            )
        self.classes = _read_classes(description)
        files = sorted(path for path in (self.root / "images").glob("*") if path.suffix in (".png", ".jpg"))
        self.files = files[: self.max_images]
        if not self.files:
            raise BenchmarkError(f"The validation set {self.name} holds no images in {self.root / 'images'}.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LabelledImage:
        path = self.files[index]
        label_path = self.root / "labels" / f"{path.stem}.png"
        if not label_path.is_file():
            raise BenchmarkError(f"{path} has no labels: {label_path} does not exist.")
        try:
            image = decode_image(path.read_bytes())
            with Image.open(label_path) as file:
                labels = np.array(file)
        except (OSError, ImageError) as error:
            raise BenchmarkError(f"{path} or its labels cannot be read: {error}. Restore the file.") from error
        if labels.shape != tuple(image.shape[-2:]):
            raise BenchmarkError(f"{label_path} is {labels.shape}, but its image {tuple(image.shape[-2:])}.")
        counted = labels[labels != IGNORED]
        if counted.size and int(counted.max()) >= len(self.classes):
            raise BenchmarkError(
                f"{label_path} holds class {int(counted.max())}, but {self.name} has {len(self.classes)} classes: "
                f"0 to {len(self.classes) - 1}, and {IGNORED} for pixels that do not count."
            )
        return LabelledImage(path.stem, image, torch.from_numpy(labels.astype(np.uint8)))


def _read_classes(description: Path) -> dict[str, tuple[str, ...]]:
    """Label -> names, in the order of the class ids."""
    content = yaml.safe_load(description.read_text())
    entries = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("label"), str) and isinstance(entry.get("names"), list)
        for entry in entries
    ):
        raise BenchmarkError(f"{description} must hold classes: [{{label: disc, names: [disc, circle]}}, ..].")
    classes = {entry["label"]: tuple(map(str, entry["names"])) for entry in entries}
    if len(classes) < len(entries) or not all(classes.values()):
        raise BenchmarkError(f"{description}: every class needs a label of its own and at least one name.")
    return classes
