"""Tests of mIoU against torchmetrics' Jaccard index and a reference confusion matrix, for any number of ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.confusion import ConfusionMatrix


@given(st.integers(2, 300), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_equals_two_other_computations(classes: int, images: int, ranks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    present = torch.randperm(classes, generator=generator)[: max(1, classes - 1)]  # one class may be absent
    counts = [ConfusionMatrix(classes) for _ in range(ranks)]
    jaccard = MulticlassJaccardIndex(classes, ignore_index=IGNORED)
    matrix = np.zeros((classes, classes))
    for i in range(images):
        labels = present[torch.randint(len(present), (13, 7), generator=generator)]
        labels[torch.rand(13, 7, generator=generator) < 0.2] = IGNORED
        predicted = torch.randint(classes, (13, 7), generator=generator)
        counts[i % ranks].update(predicted, labels.to(torch.int16), i)
        jaccard.update(predicted[None], labels[None])
        for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if t != IGNORED:
                matrix[t, p] += 1
    total = counts[0].merge(*counts[1:])
    assert total.matrix.dtype == torch.int64 and np.array_equal(total.matrix.numpy(), matrix)
    assert sorted(total.images) == list(range(images))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou = matrix.diagonal()[union > 0] / union[union > 0]
    result = total.results()
    assert result.miou == pytest.approx(100 * iou.mean(), abs=1e-9)
    assert result.miou == pytest.approx(100 * float(jaccard.compute()), abs=1e-3)
    assert result.accuracy == pytest.approx(100 * matrix.diagonal().sum() / matrix.sum(), abs=1e-9)


def test_a_class_that_never_occurs_does_not_count() -> None:
    counts = ConfusionMatrix(3)
    counts.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]], dtype=torch.int16), 0)
    result = counts.results()
    assert result.miou == 100 and result.images == 1
    assert math.isnan(result.per_class[2])


def test_predictions_where_nothing_counts_are_no_mistakes() -> None:
    counts = ConfusionMatrix(2)
    counts.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, IGNORED]], dtype=torch.int16), 0)
    assert counts.results().per_class == [100, 100]


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    counts = ConfusionMatrix(2)
    counts.update(torch.tensor([[0, 1]]), torch.tensor([[1, 1]], dtype=torch.int16), 7, 1.5)
    (tmp_path / "x.npz").write_bytes(counts.to_bytes())
    loaded = ConfusionMatrix.load(tmp_path / "x.npz", 2)
    assert torch.equal(loaded.matrix, counts.matrix) and (loaded.images, loaded.milliseconds) == ([7], [1.5])
    with pytest.raises(ValueError, match="3 classes"):
        ConfusionMatrix.load(tmp_path / "x.npz", 3)
