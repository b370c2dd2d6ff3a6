"""Tests of `TimmTrunk` with models whose attention it does not compute."""

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]  # not in __all__
from torch import nn

from spar_lightning.backbones import SigLIP2
from spar_lightning.errors import UserError


class Other(Attention):
    """Attention that differs from that of a plain ViT."""


@pytest.mark.parametrize("kind", ["Other", "gated"])
def test_another_attention_is_rejected(kind: str) -> None:
    backbone = SigLIP2("ViT-B-32-SigLIP2-256", pretrained=None)
    backbone.read_facts()
    attention = backbone.trunk.blocks[1].attn
    if kind == "Other":
        backbone.trunk.blocks[1].attn = Other(8, num_heads=1)
    else:
        attention.gate = nn.Linear(8, 8)
    with pytest.raises(UserError, match=rf"block 1 of the trunk has {kind}.*Allowed: timm's Attention"):
        backbone.read_facts()


def test_normalized_queries_and_outputs_are_computed_as_in_timm() -> None:
    backbone = SigLIP2("ViT-B-32-SigLIP2-256", pretrained=None)
    attention = Attention(
        768, num_heads=12, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm
    ).eval()
    for norm in (attention.q_norm, attention.k_norm, attention.norm):
        assert isinstance(norm, nn.LayerNorm)
        nn.init.normal_(norm.weight)
    block = backbone.trunk.blocks[0]
    block.attn = attention
    x = torch.randn(1, 12, 768)
    with torch.no_grad():
        torch.testing.assert_close(backbone.run_blocks(x, [(3, 4)], 0, 1), block(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"])
def test_another_trunk_is_rejected(model: str) -> None:
    backbone = SigLIP2("ViT-B-32-SigLIP2-256", pretrained=None)
    backbone.visual.trunk = timm.create_model(model, num_classes=0)
    with pytest.raises(UserError, match=r"Allowed: .*implement (embed|run_blocks) in the backbone"):
        backbone.read_facts()
