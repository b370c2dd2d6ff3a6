"""Tests of panoptic quality: hand-made cases, and torchmetrics on painted maps."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.detection import PanopticQuality as Reference

from spar_lightning.evaluation.panoptic_quality import PanopticQuality

THING = torch.tensor([False, False, True, True])  # two classes of stuff, two of things


def measured(areas: list[int], classes: list[int], predicted: list[int]) -> PanopticQuality:
    quality = PanopticQuality(THING)
    quality.update(torch.tensor(areas), torch.tensor(classes), torch.tensor(predicted))
    return quality


def test_all_right() -> None:
    found = measured([50, 10, 10, 5], [0, 2, 2, 3], [0, 2, 2, 3])
    assert found.results()["PQ"] == found.results()["SQ things"] == found.results()["RQ stuff"] == 100
    assert math.isnan(found.per_class()["PQ"][1])  # never occurs


def test_a_thing_is_predicted_as_another() -> None:
    """Class 2 has one match and one FN, class 3 one FP."""
    found = measured([10, 10], [2, 2], [2, 3])
    assert found.per_class()["PQ"][2:].tolist() == pytest.approx([100 * 1 / 1.5, 0])
    assert found.per_class()["SQ"][2:].tolist() == [100, 0]


def test_stuff_of_one_class_is_merged() -> None:
    """Stuff 1 (30 pixels) is absorbed by stuff 0 (60): the union is 90, so class 0 matches with IoU 2/3."""
    found = measured([60, 30], [0, 1], [0, 0])
    assert found.per_class()["PQ"][:2].tolist() == pytest.approx([100 * 2 / 3, 0])
    assert found.per_class()["RQ"][:2].tolist() == [100, 0]
    assert found.results()["PQ stuff"] == pytest.approx(100 / 3) and math.isnan(found.results()["PQ things"])


def test_an_iou_of_exactly_one_half_does_not_match() -> None:
    found = measured([40, 40], [0, 1], [0, 0])
    assert found.per_class()["PQ"][:2].tolist() == [0, 0] and not found.matched.any()
    assert measured([41, 40], [0, 1], [0, 0]).matched.tolist() == [1, 0, 0, 0]


def test_a_thing_is_absorbed_by_stuff() -> None:
    found = measured([60, 20], [0, 2], [0, 0])
    assert found.per_class()["PQ"].tolist()[0] == pytest.approx(75) and found.per_class()["PQ"][2] == 0
    assert found.predicted.tolist() == [1, 0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20))
def test_equals_torchmetrics_on_painted_maps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, height, width = PanopticQuality(THING), 12, 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = Reference(things={2, 3}, stuffs={0, 1, 9}, return_per_class=True, return_sq_and_rq=True)
    for _ in range(3):
        count = int(torch.randint(1, 7, (), generator=generator))
        ids = torch.randint(-1, count, (height, width), generator=generator)  # -1: not counted
        present = ids[ids >= 0].unique()
        ids = torch.where(ids >= 0, torch.searchsorted(present, ids.clamp(min=0)), -1)
        classes = torch.randint(0, 4, (len(present),), generator=generator)
        for stuff in (0, 1):  # one segment per class
            same = (classes == stuff).nonzero()[1:, 0]
            classes[same] = 2
        predicted = torch.randint(0, 4, (len(present),), generator=generator)
        ours.update(ids[ids >= 0].bincount(minlength=len(present)), classes, predicted)
        maps = []
        for chosen in (predicted, classes):
            category = torch.where(ids >= 0, chosen[ids.clamp(min=0)], 9)  # 9: void
            instance = torch.where(THING[category.clamp(max=3)] & (category < 9), ids + 1, 0)
            maps.append(torch.stack([category, instance], -1)[None])
        reference.update(*maps)
    # The order of torchmetrics: things, then stuff; void (9) is the last and always matches.
    expected = dict(zip((2, 3, 0, 1), reference.compute()[:4], strict=True))
    for index, (pq, sq, rq) in expected.items():
        if ours.true[index] + ours.predicted[index]:
            found = [ours.per_class()[name][index].item() / 100 for name in ("PQ", "SQ", "RQ")]
            assert found == pytest.approx([pq.item(), sq.item(), rq.item()], abs=1e-6)
