"""What `spar predict` writes, a folder for each kind of result, named after the images.

labels/     PNG: class of each pixel, with the palette; with more than 256 classes 16 bits of grey
overlays/   PNG: the image with its classes in colour, and a legend
scores/     npz: scores (C, H, W) float16 and the labels (C)
features/   safetensors: features (h, w, d) float32
pca/        PNG: features as colours
classes.json
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.visualization.overlay import overlay
from spar_lightning.visualization.palette import palette

INDEXED: Final = 256  # colours that a PNG's palette holds


class PredictionFolder:
    """Results of one run of `spar predict`; those of another are written over, name by name.

    Args:
        root: The folder.
        classes: Label to names; a class has the same colour in every picture.

    Raises:
        UserError: It holds results of other classes.
    """

    def __init__(self, root: Path, classes: Mapping[str, Sequence[str]]) -> None:
        self.root = root
        self.labels = list(classes)
        self.colours = palette(len(classes))
        root.mkdir(parents=True, exist_ok=True)
        if classes:
            rows = [
                {"index": i, "label": label, "names": list(names), "colour": self.colours[i].tolist()}
                for i, (label, names) in enumerate(classes.items())
            ]
            text, path = json.dumps(rows, ensure_ascii=False, indent=1) + "\n", root / "classes.json"
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise UserError(f"--out {root} holds results of other classes ({path}). Give another --out.")
            path.write_text(text, encoding="utf-8")

    def path(self, kind: str, name: Path, suffix: str) -> Path:
        """Where a result goes; its folder is made."""
        path = self.root / kind / name.with_name(name.name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_labels(self, name: Path, pixels: Tensor, labels: Tensor) -> None:
        """A label map (H, W) and its overlay on the image (3, H, W) uint8."""
        classes = labels.numpy()
        if len(self.labels) <= INDEXED:
            picture = Image.fromarray(classes.astype(np.uint8))
            picture.putpalette(self.colours[: len(self.labels)].tobytes())
        else:
            picture = Image.fromarray(classes.astype(np.uint16))
        picture.save(self.path("labels", name, ".png"))
        image: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
        overlay(image, classes, self.labels, self.colours).save(self.path("overlays", name, ".png"))

    def write_scores(self, name: Path, scores: Tensor) -> None:
        """Scores (C, H, W)."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, scores=scores.half().numpy(), labels=np.array(self.labels))
        self.path("scores", name, ".npz").write_bytes(buffer.getvalue())

    def write_features(self, name: Path, features: Tensor, about: Mapping[str, str]) -> None:
        """Features (h, w, d), with what they are of in the file's header."""
        content = save({"features": features.float().cpu().contiguous()}, dict(about))
        self.path("features", name, ".safetensors").write_bytes(content)
