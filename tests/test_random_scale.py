"""Random resize of the student's images, and distillation from a single-pass teacher (Table 9 of the paper)."""

import numpy as np
import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.errors import UserError
from spar_lightning.random_scale import RandomScale
from tests.test_distillation import module, sample


def test_factors_are_log_uniform_and_depend_on_step_and_key() -> None:
    scale, image = RandomScale(0.5, 2), torch.randn(3, 800, 400)
    sizes = np.array([scale.image(image, 8, step, "sa_1").shape[1:] for step in range(200)])
    assert (sizes % 8 == 0).all() and sizes[:, 0].min() < 420 and sizes[:, 0].max() > 1550
    assert np.abs(sizes[:, 0] / sizes[:, 1] - 2).max() < 0.05
    assert 0.4 < (sizes[:, 0] < 800).mean() < 0.6  # half of the factors are below the geometric mean
    assert torch.equal(scale.image(image, 8, 7, "sa_1"), scale.image(image, 8, 7, "sa_1"))
    assert scale.image(image, 8, 7, "sa_1").shape != scale.image(image, 8, 7, "sa_2").shape
    assert scale.image(torch.randn(3, 8, 8), 8, 0, "sa_1").shape[1:] >= (8, 8)  # at least one patch


def test_linear_features_come_back() -> None:
    """Bilinear interpolation keeps a ramp, apart from the border."""
    ramp = torch.linspace(0, 1, 40).repeat(20, 1)[..., None]  # (h, w, 1)
    like = torch.zeros(40, 80, 1)
    back = RandomScale(1, 2).features(ramp, like)
    assert back.shape == like.shape
    torch.testing.assert_close(back[20, 2:-2, 0].diff(), torch.full((75,), 1 / 39 / 2))


def test_a_teacher_with_a_single_pass() -> None:
    distillation = module(teacher="single", student_scale=(1.4, 1.6))
    pixels = distillation.student.normalize(sample().image[None])
    target = distillation.build_teacher()(pixels)
    assert torch.equal(target, Tiny()(pixels))
    assert distillation.teacher_identity()["inference"] == "single"
    assert distillation.teacher_identity() != module().teacher_identity()

    seen = distillation.scale.image(pixels[0], 8, 0, "sa_1")
    student = distillation.scale.features(Tiny()(seen[None])[0], target[0])
    assert seen.shape != pixels.shape[1:]
    torch.testing.assert_close(distillation.batch_loss([sample()]), (student - target[0]).square().mean())
    cached = sample(features=target[0].half())
    torch.testing.assert_close(
        distillation.batch_loss([cached]), distillation.batch_loss([sample()]), rtol=1e-3, atol=0
    )
    assert module(teacher="single").batch_loss([sample()]) == 0  # nothing to learn at the same size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    scale, image = RandomScale(0.5, 0.6), torch.randn(3, 64, 48)
    small = scale.image(image.to(dtype), 8, 0, "sa_1")
    assert small.dtype == dtype and small.shape[1:] != image.shape[1:]
    torch.testing.assert_close(small.float(), scale.image(image, 8, 0, "sa_1"), rtol=0, atol=0.03)
    assert scale.features(small.permute(1, 2, 0), image.permute(1, 2, 0)).dtype == torch.float32


def test_settings_that_cannot_be_used() -> None:
    for factors in ((0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(UserError, match="student_scale must be two numbers above 0, the smaller first"):
            module(student_scale=factors)
    with pytest.raises(UserError, match="teacher must be sliding or single, but got 'whole'"):
        module(teacher="whole")
    with pytest.raises(UserError, match=r"data\.cache_activations: false, or model.student_scale"):
        _ = module(student_scale=(0.5, 2.0)).frozen_blocks
