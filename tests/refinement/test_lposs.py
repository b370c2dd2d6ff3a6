"""Tests of LPOSS: equality with the dense solution in float64, including edge cases."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.refinement import LPOSS
from spar_lightning.refinement import lposs as module
from spar_lightning.refinement.lposs import TOLERANCE


def direct(lposs: LPOSS, features: Tensor, maps: Tensor, patch: int) -> Tensor:
    """Solve the dense system of all patches directly, as the paper describes the method."""
    height, width = features.shape[:2]
    unit = F.normalize(features.double().flatten(0, 1), dim=-1)
    count = len(unit)
    similarity = unit @ unit.T
    values, nearest = similarity.topk(min(lposs.k, count))
    kept = torch.zeros_like(similarity).scatter_(1, nearest, values).clamp(min=0) ** lposs.gamma
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = patch / 2 + patch * torch.stack([y, x], dim=-1).double().flatten(0, 1)
    kept = kept * torch.exp(-lposs.sigma * torch.cdist(centres, centres))
    weights = (kept + kept.T).fill_diagonal_(0)
    degree = weights.sum(1)
    degree[degree == 0] = 1
    normalised = weights / (degree[:, None] * degree).sqrt()
    scores = maps.double().flatten(1).T
    solution = torch.linalg.solve(torch.eye(count, dtype=torch.float64) - lposs.alpha * normalised, scores)
    refined: Tensor = solution.T.unflatten(1, (height, width))
    return refined


def check(lposs: LPOSS, features: Tensor, maps: Tensor) -> None:
    found, expected = lposs(features, maps, 16), direct(lposs, features, maps, 16)
    assert found.dtype == torch.float32
    condition = (1 + lposs.alpha) / (1 - lposs.alpha)  # the error is at most the condition number times the residual
    assert (found - expected).norm() < condition * TOLERANCE * expected.norm()
    assert torch.equal(found.argmax(0), expected.argmax(0))


def scene(height: int, width: int, channels: int = 32, seed: int = 0) -> Tensor:
    """Return features (h, w, d) of four regions, with noise and an offset common to all patches."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.randn(4, channels, generator=generator)
    rows, columns = torch.arange(height) * 2 // height, torch.arange(width) * 2 // width
    noise = torch.randn(height, width, channels, generator=generator)
    return 1 + regions[2 * rows[:, None] + columns] + 0.5 * noise


def cosines(features: Tensor, names: int) -> Tensor:
    text = F.normalize(torch.randn(names, features.shape[-1], generator=torch.Generator().manual_seed(9)), dim=-1)
    return torch.einsum("hwd,qd->qhw", F.normalize(features, dim=-1), text)


@pytest.mark.parametrize("gamma", [1.0, 3.0, 10.0])
@pytest.mark.parametrize(("size", "k"), [((12, 17), 40), ((30, 40), 400)])
def test_equals_the_direct_solution(gamma: float, size: tuple[int, int], k: int) -> None:
    features = scene(*size)
    check(LPOSS(gamma=gamma, k=k), features, cosines(features, 7))


def test_other_settings() -> None:
    features = scene(9, 14)
    check(LPOSS(gamma=2.0, alpha=0.99, k=15, sigma=0.0), features, cosines(features, 5))
    check(LPOSS(gamma=5.0, alpha=0.3, k=1, sigma=0.2), features, cosines(features, 5))
    maps = cosines(features, 5)
    assert torch.equal(LPOSS(alpha=0.0)(features, maps, 8), maps)


def test_more_neighbours_than_patches() -> None:
    features = scene(4, 5)
    check(LPOSS(k=400), features, cosines(features, 3))
    one = torch.randn(1, 1, 8)
    maps = cosines(one, 3)
    assert torch.equal(LPOSS()(one, maps, 16), maps)  # a single patch


def test_flat_regions() -> None:
    """Check that equal patches average their scores, and that unrelated patches keep theirs."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(16, generator=generator).expand(10, 12, 16)
    maps = torch.rand(4, 10, 12, generator=generator)
    check(LPOSS(k=400), flat, maps)
    check(LPOSS(k=400, sigma=0.0), flat, maps)
    opposite = torch.stack([torch.ones(8), -torch.ones(8)])[None]  # (1, 2, 8): negative similarity
    assert torch.equal(LPOSS()(opposite, maps[:, :1, :2], 16), maps[:, :1, :2])
    nothing = torch.zeros(3, 4, 8)  # features with norm 0
    assert torch.equal(LPOSS()(nothing, maps[:, :3, :4], 16), maps[:, :3, :4])


def test_a_single_class_and_one_that_is_nowhere() -> None:
    features = scene(8, 9)
    check(LPOSS(), features, cosines(features, 1))
    with_nothing = torch.cat([cosines(features, 2), torch.zeros(1, 8, 9)])
    refined = LPOSS()(features, with_nothing, 16)
    assert refined.isfinite().all() and refined[2].eq(0).all()


def test_rows_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = scene(9, 14)
    maps = cosines(features, 5)
    whole = LPOSS(k=20)(features, maps, 8)
    monkeypatch.setattr(module, "BAND", 500)
    torch.testing.assert_close(LPOSS(k=20)(features, maps, 8), whole)


def test_what_is_not_finite_stays_so() -> None:
    features = scene(4, 5)
    features[1, 2] = torch.nan
    assert not LPOSS()(features, cosines(features, 2), 8).isfinite().all()


def test_presets() -> None:
    paper = {"name": "LPOSS", "gamma": 1.0, "alpha": 0.95, "k": 400, "sigma": 0.01}
    assert LPOSS().identity() == paper
    assert LPOSS("spar").identity() == {**paper, "gamma": 10.0}
    assert LPOSS("spar", k=100).identity() == {**paper, "gamma": 10.0, "k": 100}  # other values come from the preset


@pytest.mark.parametrize("wrong", [{"gamma": 0}, {"alpha": 1.0}, {"k": 0}, {"sigma": -1}])
def test_settings_outside_their_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        LPOSS(**wrong)  # type: ignore[arg-type]
