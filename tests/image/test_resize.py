"""Tests of the rules for image sides that are not multiples of the patch size."""

import math

import pytest
import torch
import torch.nn.functional as F

from spar_lightning.backbones import DINOv3Text, OpenCLIP, SigLIP2, Tiny
from spar_lightning.errors import UserError
from spar_lightning.image.resize import Rule, aligned, at_most, drop, of_area, pad, rescaled, stretch
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.sliding_window import window_starts


@pytest.mark.parametrize(
    ("rule", "size"), [(aligned, (32, 48)), (pad, (48, 48)), (drop, (32, 32)), (stretch, (48, 48))]
)
def test_sizes(rule: Rule, size: tuple[int, int]) -> None:
    assert rule(torch.rand(2, 3, 37, 43), 16).shape == (2, 3, *size)
    fitting = torch.rand(1, 3, 32, 48)
    assert torch.equal(rule(fitting, 16), fitting)
    assert rule(torch.rand(1, 3, 5, 40), 16).shape[-2] == 16


def test_pad_and_drop_keep_the_pixels() -> None:
    images = torch.rand(1, 3, 37, 43)
    assert torch.equal(pad(images, 16)[..., :37, :43], images) and pad(images, 16)[..., 37:, :].eq(0).all()
    assert torch.equal(drop(images, 16), images[..., :32, :32])


@pytest.mark.parametrize(("family", "rule"), [(SigLIP2, pad), (OpenCLIP, drop), (DINOv3Text, stretch), (Tiny, aligned)])
def test_the_published_rule_of_each_family(family: type, rule: Rule) -> None:
    assert family.paper_patch_fit is rule  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("side", "size", "windows"),
    [
        (768, (544, 1088), 75),
        (1024, (720, 1456), 410),
        (1280, (912, 1808), 990),
        (1448, (1024, 2048), 1495),
        (1536, (1088, 2176), 1775),
        (2048, (1456, 2896), 4141),
    ],
)
def test_the_sizes_of_figure_3(side: int, size: tuple[int, int], windows: int) -> None:
    """Check sizes and window counts for Cityscapes with windows of 512 pixels and stride 24."""
    assert of_area(1024, 2048, side, 16) == size
    assert math.prod(len(window_starts(length, 512, 24)) for length in size) == windows


def test_an_area_for_any_aspect() -> None:
    assert of_area(3, 3000, 64, 16) == (16, 2016)  # at least one patch
    assert of_area(640, 427, 64, 8) == (80, 56)


class Padded(Tiny):
    """Tiny backbone that uses the SigLIP2 rule for patch_fit: paper."""

    paper_patch_fit = staticmethod(pad)


def test_the_segmenter_follows_the_rule() -> None:
    image = torch.randint(256, (3, 37, 43), dtype=torch.uint8)
    backbone = Padded()

    def grid(segmenter: Segmenter) -> tuple[int, ...]:
        return tuple(side // 8 for side in segmenter.pixels(image).shape[1:])

    assert grid(Segmenter(backbone, ["blue dot"])) == (5, 5)
    assert grid(Segmenter(backbone, ["blue dot"], InferenceConfig(patch_fit="paper"))) == (5, 6)
    assert grid(Segmenter(backbone, ["blue dot"], resize=(128, 64))) == (8, 9)  # 37 x 43 -> 64 x 74 -> 64 x 72
    assert Segmenter(backbone, ["blue dot"], InferenceConfig(patch_fit="paper"))(image).shape == (37, 43)
    with pytest.raises(UserError, match=r"patch_fit .* 'exact'"):
        InferenceConfig(patch_fit="exact")  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width", "side"), [(30, 400, 64), (700, 100, 333), (1, 900, 100), (65, 64, 64)])
def test_shrinking_in_bands(height: int, width: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    size = rescaled(height, width, (side, side))
    exact = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    whole = at_most(image, side)
    assert whole.shape[-2:] == size and (whole - exact).abs().max() <= 1.01  # rounded after columns and after rows
    monkeypatch.setattr("spar_lightning.image.resize.BAND", 7 * width)
    assert torch.equal(at_most(image, side), whole)
    assert at_most(image, max(height, width)) is image
