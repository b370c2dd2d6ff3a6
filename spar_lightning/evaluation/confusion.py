"""Confusion matrix of a benchmark, used by all evaluations, during training and on the command line.

One matrix accumulates all images. The mean IoU covers the classes that occur in the labels or predictions of the
benchmark, as in torchmetrics >= 1.0 and mmseg. torchmetrics.segmentation.MeanIoU averages per image, which is a
different metric. Sums of integers do not depend on their order, so any number of ranks and restarts gives the same
matrix as one process.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.boundary import boundary, distance

COLUMNS: Final = 8  # of the counts of images


@dataclass(frozen=True)
class Result:
    """Metrics of a confusion matrix.

    To add a metric, add a field here and a column in `report`.

    Attributes:
        miou: Mean IoU over the classes that occur, in percent.
        per_class: IoU of each class in percent; NaN if the class never occurs.
        frequency_weighted: Mean IoU in percent, in which a class counts by its number of labeled pixels.
        accuracy: Fraction of correctly classified pixels among the counted pixels, in percent.
        images: Number of counted images.
        boundary: Boundary IoU of each class in percent; NaN if the class never occurs.
    """

    miou: float
    per_class: list[float]
    frequency_weighted: float
    accuracy: float
    images: int
    boundary: list[float]


class ConfusionMatrix:
    """Confusion matrix over the pixels of labeled images.

    Args:
        num_classes: Number of classes C.
        device: Device of the segmentation maps.

    Attributes:
        matrix: (C, C) int64; rows are labels, columns are predictions.
        images: Indices of the counted images.
        per_image: Counts of each image, one row (n, 8) int64 for each class that occurs in it: image, class, correct
            pixels, labeled pixels, predicted pixels, and the same three of the boundary region of the class.
        milliseconds: Segmentation time of each counted image.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
        self.images: list[int] = []
        self.per_image: list[Tensor] = []
        self.milliseconds: list[float] = []

    def update(self, predicted: Tensor, labels: Tensor, image: int, milliseconds: float = 0.0) -> None:
        """Add an image.

        For boundary regions, ignored pixels are outside the image, in the prediction too.

        Args:
            predicted: Predicted class ids (H, W).
            labels: True class ids (H, W); pixels with the value `IGNORED` are not counted.
            image: Index of the image in the benchmark.
            milliseconds: Segmentation time.
        """
        assert predicted.shape == labels.shape
        labels = labels.long()
        classes = len(self.matrix)
        matrix = multiclass_confusion_matrix(
            predicted[None], labels[None], classes, ignore_index=IGNORED, validate_args=False
        )
        self.matrix += matrix
        width, counted = distance(*labels.shape), labels != IGNORED
        true = counted & boundary(labels, width)
        found = counted & boundary(predicted.where(counted, labels), width)
        common = true & found & (predicted == labels)
        regions = (labels[common], labels[true], predicted[found])
        columns = [matrix.diagonal(), matrix.sum(1), matrix.sum(0), *(r.bincount(minlength=classes) for r in regions)]
        counts = torch.stack(columns, dim=1).cpu()  # (C, 6)
        present = counts.any(1).nonzero()  # (n, 1)
        self.per_image.append(torch.cat([torch.full_like(present, image), present, counts[present[:, 0]]], dim=1))
        self.images.append(image)
        self.milliseconds.append(milliseconds)

    def merge(self, *others: "ConfusionMatrix") -> "ConfusionMatrix":
        """Return the sum of this matrix and others with the same classes, on the CPU."""
        total = ConfusionMatrix(len(self.matrix))
        for part in (self, *others):
            total.matrix += part.matrix.cpu()
            total.images += part.images
            total.per_image += part.per_image
            total.milliseconds += part.milliseconds
        return total

    def all_ranks(self) -> "ConfusionMatrix":
        """Return the sum over all ranks, on the CPU.

        All ranks must call this method.
        """
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
        labeled = matrix.sum(1)
        iou = 100 * hits / (matrix.sum(0) + labeled - hits)  # NaN if a class never occurs
        accuracy = (100 * hits.sum() / matrix.sum()).item()
        weighted = ((labeled * iou).nansum() / labeled.sum()).item()
        hits, labeled, predicted = self._sums()[:, 3:].double().unbind(1)
        boundary_iou = 100 * hits / (labeled + predicted - hits)
        return Result(iou.nanmean().item(), iou.tolist(), weighted, accuracy, len(self.images), boundary_iou.tolist())

    def _sums(self) -> Tensor:
        """Return the sums (C, 6) of the counts of images."""
        rows = torch.cat([torch.zeros(0, COLUMNS, dtype=torch.long), *self.per_image])
        return torch.zeros(len(self.matrix), COLUMNS - 2, dtype=torch.long).index_add_(0, rows[:, 1], rows[:, 2:])

    def to_bytes(self) -> bytes:
        """Return the matrix, image indices, counts of images and times as the content of an npz file."""
        buffer = io.BytesIO()
        images, milliseconds = np.array(self.images, np.int64), np.array(self.milliseconds, np.float64)
        per_image = torch.cat(self.per_image).numpy() if self.per_image else np.zeros((0, COLUMNS), np.int64)
        matrix = self.matrix.cpu().numpy()
        np.savez(buffer, matrix=matrix, per_image=per_image, images=images, milliseconds=milliseconds)
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path, num_classes: int) -> "ConfusionMatrix":
        """Load an npz file that was written from `to_bytes`.

        Raises:
            ValueError: If the file has a different number of classes, or not the counts of all images.
        """
        with np.load(path, allow_pickle=False) as file:
            matrix, images, milliseconds = (file[name] for name in ("matrix", "images", "milliseconds"))
            per_image = file["per_image"] if "per_image" in file else np.zeros((0, 0))  # version 0.1 has none
        if matrix.shape != (num_classes, num_classes):
            raise ValueError(f"the matrix has shape {matrix.shape}, but there are {num_classes} classes")
        if per_image.shape[1:] != (COLUMNS,):
            raise ValueError("it is of an earlier version, without the counts of each image")
        loaded = cls(num_classes)
        loaded.matrix += torch.from_numpy(matrix)
        loaded.images, loaded.milliseconds = images.tolist(), milliseconds.tolist()
        if per_image.dtype != np.int64 or not np.isin(per_image[:, 1], np.arange(num_classes)).all():
            raise ValueError("the counts of images are not those of classes")
        loaded.per_image = [torch.from_numpy(per_image)]
        correct, labeled, predicted = loaded._sums()[:, :3].unbind(1)
        parts = (loaded.matrix.diagonal(), loaded.matrix.sum(1), loaded.matrix.sum(0))
        if not all(torch.equal(*pair) for pair in zip((correct, labeled, predicted), parts, strict=True)):
            raise ValueError("the counts of images do not add up to the matrix")
        return loaded
