"""Losses that compare the features of student and teacher.

A loss is an `nn.Module` that is called with the features (h, w, d) of one image, in float32, and returns a scalar. The
paper uses `torch.nn.MSELoss`, the default of `model.loss`. A vector of zeros has no direction: its cosine similarity to
any vector is 0, without gradient.
"""

import logging
import math
from collections.abc import Sequence
from typing import Final

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]  # exported, but not by the name mypy wants
from torch import Tensor, nn

from spar_lightning.errors import UserError, check_at_least
from spar_lightning.evaluation.benchmark_config import class_names
from spar_lightning.segmentation.text_embeddings import TextClassifiers

SMALLEST: Final = 1e-4  # standard deviation; squares of smaller features vanish in 16-bit numbers

log = logging.getLogger("spar_lightning")


def warn_if_tiny(targets: Sequence[Tensor]) -> None:
    """Log a warning if the features (h, w, d) of all images are so small that any loss looks good."""
    deviation = max(float(target.float().std(correction=0)) for target in targets)
    if deviation < SMALLEST:
        log.warning(
            "The teacher's features have a standard deviation of %.1e, so the loss is small whatever the student does. "
            "Check the weights and the projection of the backbone.",
            deviation,
        )


class CosineLoss(nn.Module):
    """Mean over patches of one minus the cosine similarity of student and teacher.

    It ignores the lengths of the features.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1 - (_directions(student) * _directions(teacher)).sum(-1).mean()


class MSECosineLoss(nn.Module):
    """Sum of the mean squared error and the weighted cosine loss.

    The default weight gives the plain sum, as in PH-Reg. The mean squared error grows with the square of the features'
    scale and the cosine loss does not, so a good weight depends on the backbone.

    Args:
        cosine_weight: Weight of the cosine loss, a positive number.

    Raises:
        UserError: If the weight is not a positive number.
    """

    def __init__(self, cosine_weight: float = 1.0) -> None:
        super().__init__()
        _check_positive("cosine_weight of MSECosineLoss", cosine_weight)
        self.cosine_weight = cosine_weight
        self.mse = nn.MSELoss()
        self.cosine = CosineLoss()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        loss: Tensor = self.mse(student, teacher) + self.cosine_weight * self.cosine(student, teacher)
        return loss


class GramLoss(nn.Module):
    """Weighted mean squared difference of the patch-patch cosine similarities of student and teacher, plus a base loss.

    The similarities are those of DINOv3's Gram anchoring: all pairs of patches of an image. They do not change if all
    features are rotated, so without a base loss the features can lose their alignment with the text embeddings.

    With `rows`, a random sample of patches is compared with all patches, which takes rows x N instead of N x N values.
    The sample is an unbiased estimate: its expectation is the loss with all rows. Equal teacher features give equal
    rows. An image thus has the same rows in every epoch and on every rank, and a run continues with the same rows.

    Args:
        weight: Weight of the difference, a positive number.
        rows: Maximum number of patches per image that are compared with all patches; null compares all.
        base: Loss module to which the difference is added; null adds nothing.

    Raises:
        UserError: If the weight is not a positive number, or `rows` is below 1.
    """

    def __init__(
        self, weight: float = 1.0, rows: int | None = 512, base: nn.Module | None = lazy_instance(nn.MSELoss)
    ) -> None:
        super().__init__()
        _check_positive("weight of GramLoss", weight)
        check_at_least(1, rows=rows)
        self.weight = weight
        self.rows = rows
        self.base = base

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        patches = teacher.shape[:-1].numel()
        rows = slice(None) if self.rows is None or self.rows >= patches else _sample(teacher, patches, self.rows)
        loss = self.weight * gram_difference(student, teacher, rows)
        return loss if self.base is None else self.base(student, teacher) + loss


class ClassSimilarityLoss(nn.Module):
    """Mean squared difference of the patch-class cosine similarities of student and teacher (paper, Table 9).

    The similarities are those of inference: each patch with the text embedding of each class name. They do not change
    if a feature changes orthogonally to all text embeddings, so the student is only trained for these classes.

    Args:
        classes: Where the class names come from: the name of a bundled benchmark, such as ade20k or cityscapes, the
            path of a YAML file with `classes`, as for a benchmark, or that of a .txt or .json file with class names.

    Raises:
        UserError: If the file does not exist or contains no classes.
    """

    def __init__(self, classes: str) -> None:
        super().__init__()
        self.classes = class_names(classes)
        self._embeddings: Tensor | None = None  # (Q, d), not in the state dict

    def encode(self, classifiers: TextClassifiers) -> None:
        """Compute the text embeddings of the class names, if that has not been done."""
        if self._embeddings is None:
            self._embeddings = classifiers(self.classes).embeddings

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        assert self._embeddings is not None
        self._embeddings = self._embeddings.to(student)
        difference = (_directions(student) - _directions(teacher)) @ self._embeddings.T  # (h, w, Q)
        return difference.square().mean()


def gram_difference(student: Tensor, teacher: Tensor, rows: Tensor | slice) -> Tensor:
    """Compute the mean squared difference of the cosine similarities between some patches and all patches.

    Args:
        student: Features of the student (h, w, d).
        teacher: Features of the teacher (h, w, d).
        rows: Indices of the patches that are compared with all patches.
    """
    s, t = _directions(student).flatten(0, -2), _directions(teacher).flatten(0, -2)  # (N, d)
    with torch.autocast(s.device.type, enabled=False):  # bf16 cannot separate similar patches
        return (s[rows] @ s.T - t[rows] @ t.T).square().mean()  # of a matrix (rows, N)


def _directions(features: Tensor) -> Tensor:
    """Return features of length 1; zero vectors stay zero and have no gradient."""
    length: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / length.masked_fill(length == 0, math.inf)


def _sample(teacher: Tensor, patches: int, rows: int) -> Tensor:
    """Return random indices of patches that depend only on the teacher's features.

    The global random state is not used, because Lightning does not restore it when a run continues.
    """
    seed = int(teacher.view(torch.int32).sum())  # a sum of integers is exact on every device, in any order
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(patches, generator=generator)[:rows].to(teacher.device)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be a positive number, but got {value}.")
