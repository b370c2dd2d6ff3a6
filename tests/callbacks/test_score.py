"""mIoU equals torchmetrics' Jaccard index and a confusion matrix by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from spar_lightning.callbacks.score import Score


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_equals_two_other_computations(classes: int, images: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    present = torch.randperm(classes, generator=generator)[: max(1, classes - 1)]  # one class may be absent
    score = Score(classes, torch.device("cpu"))
    jaccard = MulticlassJaccardIndex(classes, ignore_index=255)
    matrix = np.zeros((classes, classes))
    for _ in range(images):
        labels = present[torch.randint(len(present), (13, 7), generator=generator)]
        labels[torch.rand(13, 7, generator=generator) < 0.2] = 255
        predicted = torch.randint(classes, (13, 7), generator=generator)
        score.update(predicted, labels.to(torch.uint8))
        jaccard.update(predicted[None], labels[None])
        for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if t != 255:
                matrix[t, p] += 1
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou = matrix.diagonal()[union > 0] / union[union > 0]
    result = score.compute()
    assert result.miou == pytest.approx(100 * iou.mean(), abs=1e-9)
    assert result.miou == pytest.approx(100 * float(jaccard.compute()), abs=1e-3)
    assert result.images == images


def test_a_class_that_never_occurs_does_not_count() -> None:
    score = Score(3, torch.device("cpu"))
    score.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]], dtype=torch.uint8))
    result = score.compute()
    assert result.miou == 100
    assert math.isnan(result.per_class[2])
