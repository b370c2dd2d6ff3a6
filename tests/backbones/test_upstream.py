"""Weights go back where they came from: the upstream library's own model gives the same trunk tokens."""

from typing import Any

import open_clip
import pytest
import timm
import torch

from spar_lightning.backbones import DINOv3Text, OpenCLIP, SigLIP2


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
    torch.testing.assert_close(tokens, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["ViT-S-32", "ViT-B-32-quickgelu"])
@torch.no_grad()
def test_openclip_in_open_clip(model: str) -> None:
    """All blocks but the last, where MaskCLIP departs from the model."""
    backbone = OpenCLIP(model, pretrained=None)
    images = torch.randn(1, 3, 224, 224)
    tokens = backbone.run_blocks(backbone.embed(images), [(7, 7)], stop=-1)
    visual = upstream_visual(model, backbone)
    theirs = visual.forward_intermediates(
        images, indices=[backbone.depth - 2], intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    torch.testing.assert_close(tokens[:, 1:], theirs["image_intermediates"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, :1], theirs["image_intermediates_prefix"][0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_dinov3_in_timm() -> None:
    backbone = DINOv3Text("vit_tiny_patch16_dinov3_qkvb", window=64)
    model: Any = timm.create_model(backbone.model, num_classes=0).eval()
    model.load_state_dict(backbone.vision_state_dict())
    images = torch.randn(1, 3, 64, 96)

    def difference() -> float:
        return float((backbone(images).flatten(1, 2) - model.forward_features(images)[:, 5:]).abs().max())

    assert difference() < 1e-2  # timm's periods are not rounded
    model.rope.periods.copy_(backbone.trunk.rope.periods)
    assert difference() < 1e-5


def test_the_activation_is_part_of_the_identity() -> None:
    plain, quick = (OpenCLIP(model, pretrained=None) for model in ("ViT-B-32", "ViT-B-32-quickgelu"))
    quick.load_vision_state_dict(plain.vision_state_dict())
    assert plain.weights_digest() == quick.weights_digest() and plain.identity() != quick.identity()
