"""Packed sequences give the same features and gradients as the images one by one, for every backbone."""

import copy

import pytest
import torch
from torch import Tensor

from spar_lightning.backbones import Backbone, Tiny, packing
from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.packing import dense_features, features_of
from spar_lightning.backbones.parameter_groups import frozen_blocks, set_trainable
from tests.rounding import assert_rounded, rounding
from tests.testing.test_checks import FAMILIES, built

SIZES = [(2, 2), (1, 3), (3, 1), (2, 3)]  # patches (h, w)


def images(patch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, h * patch, w * patch, generator=generator) for h, w in SIZES]


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packs", [True, False])
def test_a_pack_equals_its_images_one_by_one(packs: bool) -> None:
    tiny = Tiny()
    tiny.packs = packs
    for image, features in zip(images(8), dense_features(tiny, images(8)), strict=True):
        assert_rounded(features, tiny(image[None])[0], tiny.depth, tiny.embed_dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_accumulated_steps_of_single_images(family: str, small_naflex: str) -> None:
    """Compare frozen blocks per image, then packed trainable blocks, with whole images one by one."""
    packed, single = (copy.deepcopy(built(family, small_naflex)) for _ in range(2))
    for backbone in (packed, single):
        set_trainable(backbone, backbone.parameter_groups(), ["blocks.-2", "blocks.-1"])
    start = frozen_blocks(packed, packed.depth)
    assert start == packed.depth - 2
    pixels = images(packed.patch_size)
    with torch.no_grad():
        tokens = [packed.run_blocks(packed.embed(x[None]), [g], 0, start) for x, g in zip(pixels, SIZES, strict=True)]
    together = features_of(packed, tokens, SIZES, start)
    torch.stack([features.square().mean() for features in together]).mean().backward()
    for image, features in zip(pixels, together, strict=True):
        alone = single(image[None])[0]
        assert_rounded(features, alone, packed.depth, packed.embed_dim)
        (alone.square().mean() / len(pixels)).backward()
    ours, theirs = gradients(packed), gradients(single)
    assert ours.keys() == theirs.keys() and ours
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in ours.items():  # the gradient of the key bias is 0 up to rounding
        # Backward doubles the depth; each gradient sums over all tokens of the sequence.
        terms = packed.embed_dim * sum(h * w for h, w in SIZES)
        atol = max(rounding(theirs[name], 2 * packed.depth, terms), torch.finfo(torch.float32).eps * largest)
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=atol, msg=name)


def test_sequences_are_cut_to_what_the_device_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, seen = Tiny(), list[list[Grid]]()
    run = Tiny.run_blocks

    def spy(self: Tiny, tokens: Tensor, grids: list[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        seen.append(list(grids))
        return run(self, tokens, grids, start, stop)

    monkeypatch.setattr(Tiny, "run_blocks", spy)
    dense_features(tiny, images(8))
    assert seen == [SIZES]
    monkeypatch.setattr(packing, "CPU_TOKENS", 7)
    dense_features(tiny, images(8))
    assert seen[1:] == [SIZES[:2], SIZES[2:3], SIZES[3:]]
