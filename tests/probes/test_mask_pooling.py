"""Tests of pooling features under masks."""

import torch

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.probes.mask_pooling import areas, pooled


def test_a_patch_counts_by_its_covered_fraction() -> None:
    """Two patches of 4 x 4 pixels: segment 0 covers the first and a quarter of the second."""
    ids = torch.full((4, 8), 1)
    ids[:, :5] = 0
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    means = pooled(features, ids, 2, "area")
    assert torch.allclose(means, torch.tensor([[0.8, 0.2], [0.0, 1.0]]))
    assert areas(ids, 2).tolist() == [20, 12]


def test_ignored_pixels_are_in_no_segment() -> None:
    ids = torch.tensor([[0, 0, IGNORED, 1]])
    features = torch.tensor([[[1.0], [5.0]]])
    assert pooled(features, ids, 2, "area").tolist() == [[1.0], [5.0]]
    assert areas(ids, 2).tolist() == [2, 1]


def test_a_small_segment_vanishes_only_with_binary_masks() -> None:
    ids = torch.zeros(64, 64, dtype=torch.long)
    ids[3, 3] = 1
    features = torch.ones(4, 4, 2)
    assert pooled(features, ids, 2, "area").tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert pooled(features, ids, 2, "binary").tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_binary_masks_are_averaged_over_whole_patches() -> None:
    ids = torch.full((4, 8), 1)
    ids[:, :6] = 0
    features = torch.tensor([[[1.0], [3.0]]])
    assert pooled(features, ids, 2, "binary")[0].tolist() == [2.0]


def test_no_segments() -> None:
    assert pooled(torch.ones(2, 2, 3), torch.full((8, 8), IGNORED), 0, "area").shape == (0, 3)
