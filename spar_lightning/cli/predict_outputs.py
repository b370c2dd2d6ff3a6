"""Output of `spar predict`: one folder per kind of result, with files named after the images.

labels/       PNG: class index of each pixel, with a palette; 16-bit grayscale with more than 256 classes
overlays/     PNG: image with its classes in color, and a legend
scores/       npz: scores (C, H, W) float16 and labels (C)
features/     safetensors: features (h, w, d) float32
pca/          PNG: features as colors
classes.json  index, label, names and color of each class
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.visualization.overlay import overlay
from spar_lightning.visualization.palette import palette

INDEXED: Final = 256  # largest number of colors in the palette of a PNG
NO_CLASSES: Final = b"[]\n"  # content of classes.json if there are only features
KINDS: Final = ("labels", "overlays", "scores", "features", "pca")


class PredictionFolder:
    """Folder for the results of `spar predict`; earlier results with the same name are overwritten.

    Args:
        root: Path of the folder.
        classes: Mapping of class label to names. A class has the same color in all images.

    Raises:
        UserError: The folder contains results for other classes, or files that `spar predict` has not written.
    """

    def __init__(self, root: Path, classes: Mapping[str, Sequence[str]]) -> None:
        self.root = root
        self.labels = list(classes)
        self.colours = palette(len(classes))
        root.mkdir(parents=True, exist_ok=True)
        path = root / "classes.json"
        if not path.exists() and (theirs := next((kind for kind in KINDS if (root / kind).exists()), None)):
            raise UserError(
                f"--out {root} contains {theirs}, which spar predict has not written (classes.json is missing). Pass "
                "another --out."
            )
        rows = [
            {"index": i, "label": label, "names": list(names), "colour": self.colours[i].tolist()}
            for i, (label, names) in enumerate(classes.items())
        ]
        content = (json.dumps(rows, ensure_ascii=False, indent=1) + "\n").encode()
        earlier = path.read_bytes() if path.exists() else NO_CLASSES
        if classes and earlier not in (NO_CLASSES, content):
            raise UserError(f"--out {root} contains results for other classes ({path}). Pass another --out.")
        if classes or not path.exists():
            path.write_bytes(content)

    @property
    def dtype(self) -> torch.dtype:
        """Smallest type of segmentation maps that PNG can store."""
        return torch.uint8 if len(self.labels) <= INDEXED else torch.uint16

    def path(self, kind: str, name: Path, suffix: str) -> Path:
        """Return the path of a result such as labels/NAME.png, and create its folder."""
        path = self.root / kind / name.with_name(name.name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_labels(self, name: Path, pixels: Tensor, labels: Tensor) -> None:
        """Write a segmentation map (H, W) of type `dtype`, and its overlay on the image.

        The image `pixels` (3, h, w) uint8 may be smaller than the segmentation map.
        """
        classes = labels.numpy()
        picture = Image.fromarray(classes)
        if self.dtype == torch.uint8:
            picture.putpalette(self.colours[: len(self.labels)].tobytes())
        picture.save(self.path("labels", name, ".png"))
        image: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
        overlay(image, classes, self.labels, self.colours).save(self.path("overlays", name, ".png"))

    def write_scores(self, name: Path, scores: Tensor) -> None:
        """Write scores (C, H, W)."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, scores=scores.half().numpy(), labels=np.array(self.labels))
        self.path("scores", name, ".npz").write_bytes(buffer.getvalue())

    def write_features(self, name: Path, features: Tensor, about: Mapping[str, str]) -> None:
        """Write features (h, w, d); `about` becomes the metadata of the safetensors file."""
        readable = {key: value.encode(errors="backslashreplace").decode() for key, value in about.items()}
        content = save({"features": features.float().cpu().contiguous()}, readable)
        self.path("features", name, ".safetensors").write_bytes(content)
