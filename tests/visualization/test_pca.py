"""Tests of feature colors: three directions from the teacher, shared by all panels."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spar_lightning.visualization.pca import Basis, draw_pca


def features(seed: int, height: int = 9, width: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([5.0, 3.0, 2.0, *[0.1] * 13])
    mixed = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(7))).Q
    rows: torch.Tensor = (torch.randn(height, width, 16, generator=generator) * spread) @ mixed + 3
    return rows


def test_the_basis_is_that_of_a_singular_value_decomposition() -> None:
    teacher = features(0)
    basis, rows = Basis.of(teacher), teacher.flatten(0, 1).double()
    v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:3].T
    assert torch.allclose((v.T @ basis.components).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert all(column[column.abs().argmax()] > 0 for column in basis.components.T)


def test_colours_are_of_one_range_and_signs_do_not_turn() -> None:
    teacher = features(0)
    basis = Basis.of(teacher)
    own, other = basis.colours(teacher), basis.colours(features(1))
    assert own.shape == (9, 14, 3) and own.min() == 0 and own.max() == 1
    assert 0.02 < np.mean((own == 0) | (own == 1)) < 0.04  # 1 % of the values at each end
    again = Basis.of(teacher.flip(0)).colours(teacher)  # the same features in another order
    assert np.allclose(own, again, rtol=0, atol=1e-12)
    assert not np.allclose(own, other, atol=0.1)
    assert np.allclose(basis.colours(teacher + 0), own)


def test_a_single_patch_and_long_images_are_drawn(tmp_path: Path) -> None:
    for i, (height, width) in enumerate(((1, 1), (1, 40), (30, 2))):
        teacher = features(i, height, width)
        panels = {"teacher": teacher, "student": teacher}
        path = tmp_path / f"{i}.png"
        draw_pca(np.zeros((8 * height, 8 * width, 3), np.uint8), panels, Basis.of(teacher), path)
        assert min(Image.open(path).size) > 80
