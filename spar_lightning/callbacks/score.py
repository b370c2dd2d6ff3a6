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
    """mIoU in percent, IoU in percent of each class (nan where it never occurs), and the images counted."""

    miou: float
    per_class: list[float]
    images: int


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

    def compute(self) -> Result:
        """Collective: every process calls it, with at least one image each."""
        matrix = self._matrix.compute().double()  # (C, C), rows are labels
        hits = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hits
        iou = 100 * hits / union  # nan where a class never occurs
        return Result(iou.nanmean().item(), iou.tolist(), int(self._images.compute()))
