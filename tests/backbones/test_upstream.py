"""Weights can be loaded into the model of the upstream library, which gives the same trunk tokens."""

from typing import Any

import open_clip
import pytest
import timm
import torch

from spar_lightning.backbones import DINOv3Text, OpenCLIP, SigLIP2
from tests.rounding import assert_rounded


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def upstream_visual(model: str, backbone: SigLIP2 | OpenCLIP) -> Any:
    clip = open_clip.create_model(model, require_pretrained=False)
    missing, unexpected = clip.load_state_dict(backbone.vision_state_dict(), strict=False)
    assert not unexpected and not any(name.startswith("visual.") for name in missing)
    return clip.visual.eval()


@torch.no_grad()
def test_siglip2_in_open_clip() -> None:
    backbone = SigLIP2("ViT-B-32-SigLIP2-256", pretrained=None)
    images = torch.randn(1, 3, 256, 256)
    tokens = backbone.trunk.norm(backbone.run_blocks(backbone.embed(images), [(8, 8)]))
    theirs = upstream_visual("ViT-B-32-SigLIP2-256", backbone).trunk.forward_features(images)
    assert_rounded(tokens, theirs, backbone.depth, backbone.embed_dim)


@pytest.mark.parametrize("model", ["ViT-S-32", "ViT-B-32-quickgelu"])
@torch.no_grad()
def test_openclip_in_open_clip(model: str) -> None:
    """Compare all blocks except the last, where MaskCLIP differs from the model."""
    backbone = OpenCLIP(model, pretrained=None)
    images = torch.randn(1, 3, 224, 224)
    tokens = backbone.run_blocks(backbone.embed(images), [(7, 7)], stop=-1)
    visual = upstream_visual(model, backbone)
    theirs = visual.forward_intermediates(
        images, indices=[backbone.depth - 2], intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    parts = (theirs["image_intermediates_prefix"][0], theirs["image_intermediates"][0])
    assert_rounded(tokens, torch.cat(parts, dim=1), backbone.depth, backbone.embed_dim)


@torch.no_grad()
def test_dinov3_in_timm() -> None:
    backbone = DINOv3Text("vit_tiny_patch16_dinov3_qkvb", window=64)
    for block in backbone.trunk.blocks:  # with timm's initial value of 1e-5, blocks would hardly affect the output
        block.gamma_1.fill_(1)
        block.gamma_2.fill_(1)
        block.attn.qkv.weight.mul_(8)  # make the attention less uniform
    model: Any = timm.create_model(backbone.model, num_classes=0).eval()
    model.load_state_dict(backbone.vision_state_dict())
    images = torch.randn(1, 3, 128, 192)

    def compare() -> None:
        theirs = model.forward_features(images)[:, 5:]
        assert_rounded(backbone(images).flatten(1, 2), theirs, backbone.depth, backbone.embed_dim)

    with pytest.raises(AssertionError):
        compare()  # timm's periods are not rounded
    model.rope.periods.copy_(backbone.trunk.rope.periods)
    compare()


def test_the_activation_is_part_of_the_identity() -> None:
    plain, quick = (OpenCLIP(model, pretrained=None) for model in ("ViT-B-32", "ViT-B-32-quickgelu"))
    quick.load_vision_state_dict(plain.vision_state_dict())
    assert plain.weights_digest() == quick.weights_digest() and plain.identity() != quick.identity()
