"""mIoU of one benchmark over all processes: one confusion matrix for the whole set.

A class counts if it occurs in labels or predictions of the set (torchmetrics >= 1.0 and mmseg agree
on this); averaging per image, as torchmetrics.segmentation.MeanIoU does, is another quantity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.aggregation import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from spar_lightning.datamodules.sample import IGNORED


@dataclass(frozen=True)
class Result:
    """What a confusion matrix says.

    Attributes:
        miou: Mean IoU in percent, over classes that occur.
        per_class: IoU in percent of each class, nan where it never occurs.
        accuracy: Share of the counted pixels that are right, in percent.
        images: Images counted.
    """

    miou: float
    per_class: list[float]
    accuracy: float
    images: int

    @classmethod
    def of(cls, matrix: Tensor, images: int) -> "Result":
        """The result of a confusion matrix (C, C), rows are labels."""
        matrix = matrix.double()
        hits = matrix.diagonal()
        iou = 100 * hits / (matrix.sum(0) + matrix.sum(1) - hits)  # nan where a class never occurs
        return cls(iou.nanmean().item(), iou.tolist(), (100 * hits.sum() / matrix.sum()).item(), images)


class Score:
    """Counts pixels of (predicted, true) classes; `compute` sums over processes.

    Args:
        num_classes: Number of classes.
        device: Where label maps live.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._matrix = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False).to(device)
        self._images = SumMetric().to(device)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add one image: two maps (H, W)."""
        assert predicted.shape == labels.shape
        self._matrix.update(predicted[None], labels[None].long())
        self._images.update(1)

    @property
    def matrix(self) -> Tensor:
        """Confusion matrix (C, C) int64 of this process alone, rows are labels."""
        counts: Tensor = self._matrix.confmat
        return counts

    def compute(self) -> Result:
        """Collective: every process calls it, with at least one image each."""
        return Result.of(self._matrix.compute(), int(self._images.compute()))
