"""Differences of the usual open implementation of kNN segmentation, for numbers that must be compared with it.

- Unlabeled pixels of training images are counted as class 0 (background in PASCAL VOC, but road in Cityscapes).
- If the value 0 is unlabeled (ADE20K), it is a class that can be predicted, but never occurs.
- Predicted classes are reassigned to true ones so that the sum of IoUs is largest, as for clusters.
- The mean includes classes that never occur, with an IoU of 0.
"""

from importlib.util import find_spec

import torch
from torch.utils.data import Dataset

from spar_lightning.datasets.samples import IGNORED, LabelledImage
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.confusion import ConfusionMatrix, Result

UNLABELED = "unlabeled"


def has_unlabeled_class(benchmark: Benchmark) -> bool:
    """Return whether the value 0 of label maps is unlabeled, so that it becomes a class."""
    return any(kind.reduce_zero_label for kind in benchmark.description.labels)


class CompatibleImages(Dataset[LabelledImage]):
    """Images of a benchmark whose class ids are shifted by one if the value 0 is unlabeled.

    Args:
        benchmark: Opened benchmark.
        training: Whether unlabeled pixels become class 0; otherwise they stay ignored.
    """

    def __init__(self, benchmark: Benchmark, training: bool) -> None:
        self._benchmark, self._training = benchmark, training
        self._shift = int(has_unlabeled_class(benchmark))

    def __len__(self) -> int:
        return len(self._benchmark)

    def __getitem__(self, index: int) -> LabelledImage:
        image = self._benchmark[index]
        unlabeled = image.labels == IGNORED
        labels = torch.where(unlabeled, 0 if self._training else IGNORED, image.labels + self._shift)
        return image._replace(labels=labels.to(image.labels.dtype))


def check_compatible(benchmark: Benchmark, training: Benchmark) -> None:
    """Check that the metrics can be computed.

    Raises:
        UserError: If scipy is not installed, or if the value 0 is unlabeled in only one of the two.
    """
    if find_spec("scipy") is None:
        raise UserError("--compatible needs scipy. Run: pip install 'spar-lightning[knn]'")
    if has_unlabeled_class(benchmark) != has_unlabeled_class(training):
        raise UserError(
            "--compatible: reduce_zero_label is true in the YAML file of the benchmark or of its training images, but "
            "not in both. Leave out --compatible."
        )


def compatible_result(counts: ConfusionMatrix) -> Result:
    """Compute the metrics after the reassignment of predicted classes."""
    from scipy.optimize import linear_sum_assignment

    matrix = counts.matrix.cpu().double()
    union = matrix.sum(1, keepdim=True) + matrix.sum(0) - matrix  # (true, predicted)
    iou = matrix / union.clamp(min=1)
    true, predicted = linear_sum_assignment(iou.numpy(), maximize=True)
    assigned = 100 * iou[true, predicted]
    accuracy = 100 * matrix[true, predicted].sum() / matrix.sum()
    weighted = (matrix.sum(1) * assigned).sum() / matrix.sum()
    boundary = [float("nan")] * len(assigned)  # not defined for reassigned classes
    images = len(counts.images)
    return Result(assigned.mean().item(), assigned.tolist(), weighted.item(), accuracy.item(), images, boundary)
