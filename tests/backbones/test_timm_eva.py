"""EVA02-CLIP and PE-Core give the features of timm and open_clip with the same weights, at two sizes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from spar_lightning.backbones import EVA02CLIP, PECore
from spar_lightning.backbones.open_clip_base import both_towers
from spar_lightning.errors import UserError
from tests.backbones.small_models import CONFIGS, randomized

MODELS = [(EVA02CLIP, "EVA02-Tiny"), (EVA02CLIP, "EVA02-Post"), (PECore, "PE-Core-Nano"), (PECore, "PE-Core-T-16-384")]


def tokens_of_timm(backbone: Any, name: str, images: Tensor, blocks: int) -> Any:
    """Return the tokens after the first blocks of timm's own model at any size."""
    model: Any = timm.create_model(name, num_classes=backbone.embed_dim, dynamic_img_size=True).eval()
    model.load_state_dict(backbone.trunk.state_dict())
    tokens, rope = model._pos_embed(model.patch_embed(images))
    tokens = model.norm_pre(tokens)
    for block in model.blocks[:blocks]:
        tokens = block(tokens, rope=rope)
    return tokens


@pytest.mark.parametrize(("cls", "model"), MODELS)
@torch.no_grad()
def test_tokens_equal_timm_at_two_sizes(cls: Any, model: str) -> None:
    backbone = randomized(cls(model, pretrained=None))
    name = CONFIGS[model][0] if model in CONFIGS else "vit_pe_core_tiny_patch16_384"
    side = backbone.grid[0]
    blocks = backbone.depth - backbone.value_path  # MaskCLIP changes the last block
    for h, w in ((side, side), (side + 3, side - 1)):
        images = torch.randn(2, 3, 16 * h, 16 * w)
        expected = tokens_of_timm(backbone, name, images, blocks)
        found = backbone.trunk_tokens(images, stop=blocks)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_one_token_attends_to_itself() -> None:
    """With one token, attention is the value path: dense features equal open_clip's image embedding of that token."""
    for cls, model in ((EVA02CLIP, "EVA02-Tiny"), (EVA02CLIP, "EVA02-Post"), (PECore, "PE-Core-Nano")):
        backbone = randomized(cls(model, pretrained=None))
        trunk, width = backbone.trunk, backbone.trunk.num_features
        token = torch.randn(1, 1, width)
        after = trunk.blocks[-1](token) if backbone.value_path else token
        if backbone.value_path:
            ours = backbone.run_blocks(token, [(1, 1)], start=backbone.depth - 1)
            torch.testing.assert_close(ours, after, rtol=0, atol=1e-5)
        padded = torch.cat([torch.zeros(1, backbone.prefix, width), after], dim=1)
        expected = trunk.head(trunk.fc_norm(trunk.attn_pool(trunk.norm(after)))) if cls is PECore else None
        if expected is None:
            expected = trunk.head(trunk.norm(after)[:, 0])
        torch.testing.assert_close(backbone.project(padded, [(1, 1)])[:, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("cls", "model"), MODELS[:3])
@torch.no_grad()
def test_both_towers_load_from_a_file_of_open_clip(cls: Any, model: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    clip = both_towers(model, quick_gelu=False, warn=False).eval()
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    backbone = cls(model, str(tmp_path))
    for name, tensor in clip.visual.state_dict().items():
        assert torch.equal(backbone.vision_state_dict()[f"visual.{name}"], tensor)
    tokens = cls(model, str(tmp_path)).encode_text(["a road", "a tree"])
    expected = clip.encode_text(torch.tensor(_tokens(model, ["a road", "a tree"])))
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


def _tokens(model: str, prompts: list[str]) -> list[list[int]]:
    import open_clip

    tokens: list[list[int]] = open_clip.get_tokenizer(model)(prompts).tolist()
    return tokens


def test_other_models_are_rejected() -> None:
    with pytest.raises(UserError, match=r"ViT-B-16 is not an EVA-CLIP"):
        EVA02CLIP("ViT-B-16", None)
    with pytest.raises(UserError, match=r"EVA02-B-16 is not a Perception"):
        PECore("EVA02-B-16", None)
    with pytest.raises(UserError, match="open_clip has no model 'PE-Core-X'"):
        PECore("PE-Core-X", None)
    backbone = randomized(EVA02CLIP("EVA02-Tiny", pretrained=None))
    backbone.trunk.rope.ref_feat_shape = None
    with pytest.raises(UserError, match=r"RotaryEmbeddingCat with other settings"):
        backbone.read_facts()
    backbone.trunk.blocks[1] = vars(timm.create_model("vit_tiny_patch14_reg1_tipsv2"))["_modules"]["blocks"][0]
    with pytest.raises(UserError, match=r"block 1 .*is a Block"):
        backbone.read_facts()
