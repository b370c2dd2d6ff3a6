"""Tests of the option that reproduces another implementation, by hand-made cases."""

from pathlib import Path

import pytest
import torch

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.probes.compatible import CompatibleImages, compatible_result, has_unlabeled_class
from tests import fake_benchmarks


def test_unlabeled_pixels_become_class_0_in_training_only(tmp_path: Path) -> None:
    fake_benchmarks.voc(tmp_path, [(8, 10)])
    benchmark = Benchmark("voc21", str(tmp_path))
    benchmark.open()
    assert not has_unlabeled_class(benchmark)
    assert benchmark[0].labels.unique().tolist() == [IGNORED, 0, 1, 7, 20]
    assert CompatibleImages(benchmark, True)[0].labels.unique().tolist() == [0, 1, 7, 20]
    assert CompatibleImages(benchmark, False)[0].labels.unique().tolist() == [IGNORED, 0, 1, 7, 20]


def test_the_value_0_of_ade20k_is_a_class(tmp_path: Path) -> None:
    fake_benchmarks.ade20k(tmp_path, [(8, 8)])
    benchmark = Benchmark("ade20k", str(tmp_path))
    benchmark.open()
    assert has_unlabeled_class(benchmark)
    assert benchmark[0].labels.unique().tolist() == [IGNORED, 0, 76, 149]
    assert CompatibleImages(benchmark, True)[0].labels.unique().tolist() == [0, 1, 77, 150]
    assert CompatibleImages(benchmark, False)[0].labels.unique().tolist() == [IGNORED, 1, 77, 150]


def test_predicted_classes_are_reassigned() -> None:
    """Classes 0 and 1 are exchanged in the prediction, and class 2 never occurs."""
    counts = ConfusionMatrix(3)
    counts.matrix = torch.tensor([[1, 9, 0], [8, 2, 0], [0, 0, 0]])
    plain, result = counts.results(), compatible_result(counts)
    assert plain.per_class[:2] == pytest.approx([100 / 18, 200 / 19])
    assert plain.miou == pytest.approx((100 / 18 + 200 / 19) / 2)
    # True class 0 (10 pixels) is matched to prediction 1 (11 pixels), class 1 (10) to prediction 0 (9).
    assert result.per_class == pytest.approx([100 * 9 / 12, 100 * 8 / 11, 0])
    assert result.miou == pytest.approx((75 + 800 / 11) / 3) and result.accuracy == pytest.approx(85)
