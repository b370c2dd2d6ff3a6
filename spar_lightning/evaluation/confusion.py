"""Confusion matrix of a benchmark: the one accumulator of every evaluation, in training and outside it.

One matrix serves the whole set. A class counts if it occurs in labels or predictions of the set (torchmetrics >= 1.0
and mmseg agree on this); averaging per image, as torchmetrics.segmentation.MeanIoU does, is another quantity. Sums of
integers do not depend on their order, so any number of ranks and of restarts gives the matrix of one process.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from spar_lightning.datasets.samples import IGNORED


@dataclass(frozen=True)
class Result:
    """Metrics of a confusion matrix; a new metric is a field here and a column in `report`.

    Attributes:
        miou: Mean IoU in percent, over classes that occur.
        per_class: IoU in percent of each class, nan where it never occurs.
        accuracy: Fraction of the counted pixels that are correct, in percent.
        images: Images counted.
    """

    miou: float
    per_class: list[float]
    accuracy: float
    images: int


class ConfusionMatrix:
    """Pixels of labelled images by true and predicted class.

    Args:
        num_classes: Number of classes C.
        device: Device of the segmentation maps.

    Attributes:
        matrix: (C, C) int64, rows are labels.
        images: Indices of the images that are counted.
        milliseconds: Time of each one's segmentation.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
        self.images: list[int] = []
        self.milliseconds: list[float] = []

    def update(self, predicted: Tensor, labels: Tensor, image: int, milliseconds: float = 0.0) -> None:
        """Add one image: two maps (H, W) of classes, of which labels may be `IGNORED`."""
        assert predicted.shape == labels.shape
        self.matrix += multiclass_confusion_matrix(
            predicted[None], labels[None].long(), len(self.matrix), ignore_index=IGNORED, validate_args=False
        )
        self.images.append(image)
        self.milliseconds.append(milliseconds)

    def merge(self, *others: "ConfusionMatrix") -> "ConfusionMatrix":
        """Return the sum with others of the same classes, on the CPU."""
        total = ConfusionMatrix(len(self.matrix))
        for part in (self, *others):
            total.matrix += part.matrix.cpu()
            total.images += part.images
            total.milliseconds += part.milliseconds
        return total

    def all_ranks(self) -> "ConfusionMatrix":
        """Return the sum over all ranks, on the CPU. Collective."""
        mine = self.merge()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return mine
        gathered: list[ConfusionMatrix] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, mine)
        return gathered[0].merge(*gathered[1:])

    def results(self) -> Result:
        """Compute the metrics in float64."""
        matrix = self.matrix.double()
        hits = matrix.diagonal()
        iou = 100 * hits / (matrix.sum(0) + matrix.sum(1) - hits)  # nan where a class never occurs
        accuracy = (100 * hits.sum() / matrix.sum()).item()
        return Result(iou.nanmean().item(), iou.tolist(), accuracy, len(self.images))

    def to_bytes(self) -> bytes:
        """Return the content of an npz file."""
        buffer = io.BytesIO()
        images, milliseconds = np.array(self.images, np.int64), np.array(self.milliseconds, np.float64)
        np.savez(buffer, matrix=self.matrix.cpu().numpy(), images=images, milliseconds=milliseconds)
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path, num_classes: int) -> "ConfusionMatrix":
        """Read an npz file.

        Raises:
            ValueError: It has another number of classes.
        """
        with np.load(path, allow_pickle=False) as file:
            matrix, images, milliseconds = (file[name] for name in ("matrix", "images", "milliseconds"))
        if matrix.shape != (num_classes, num_classes):
            raise ValueError(f"{matrix.shape} is not the shape of {num_classes} classes")
        loaded = cls(num_classes)
        loaded.matrix += torch.from_numpy(matrix)
        loaded.images, loaded.milliseconds = images.tolist(), milliseconds.tolist()
        return loaded
