"""SigLIP2 and NaFlex give the same dense features as transformers with the same weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from spar_lightning.backbones import NaFlex, SigLIP2
from spar_lightning.backbones.open_clip_base import _tokenizer as open_clip_tokenizer
from spar_lightning.backbones.weights import WeightsError
from spar_lightning.errors import UserError
from tests.rounding import assert_rounded


def transformers_names(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's tensors as in SiglipVisionModel of transformers."""
    found = {
        "embeddings.patch_embedding.weight": trunk["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": trunk["patch_embed.proj.bias"],
        "embeddings.position_embedding.weight": trunk["pos_embed"][0],
        "post_layernorm.weight": trunk["norm.weight"],
        "post_layernorm.bias": trunk["norm.bias"],
        "head.probe": trunk["attn_pool.latent"],
    }
    for kind in ("weight", "bias"):
        q, kv = trunk[f"attn_pool.q.{kind}"], trunk[f"attn_pool.kv.{kind}"]
        found[f"head.attention.in_proj_{kind}"] = torch.cat([q, kv])
        found[f"head.attention.out_proj.{kind}"] = trunk[f"attn_pool.proj.{kind}"]
        found[f"head.layernorm.{kind}"] = trunk[f"attn_pool.norm.{kind}"]
        for name in ("fc1", "fc2"):
            found[f"head.mlp.{name}.{kind}"] = trunk[f"attn_pool.mlp.{name}.{kind}"]
        for i in range(12):
            ours, theirs = f"blocks.{i}", f"encoder.layers.{i}"
            for part, piece in zip("qkv", trunk[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                found[f"{theirs}.self_attn.{part}_proj.{kind}"] = piece
            found[f"{theirs}.self_attn.out_proj.{kind}"] = trunk[f"{ours}.attn.proj.{kind}"]
            for name in ("1", "2"):
                found[f"{theirs}.layer_norm{name}.{kind}"] = trunk[f"{ours}.norm{name}.{kind}"]
                found[f"{theirs}.mlp.fc{name}.{kind}"] = trunk[f"{ours}.mlp.fc{name}.{kind}"]
    return found


def test_dense_features_equal_transformers_at_the_native_size() -> None:
    torch.manual_seed(0)
    backbone = SigLIP2("ViT-B-32-SigLIP2-256", pretrained=None)
    for parameter in backbone.parameters():  # timm initializes biases and the pooling with zeros
        parameter.data += 0.02 * torch.randn_like(parameter)
    reference = SiglipVisionModel(SiglipVisionConfig(image_size=256, patch_size=32)).train(False)
    trunk = {name.removeprefix("visual.trunk."): t for name, t in backbone.vision_state_dict().items()}
    reference.load_state_dict(transformers_names(trunk))

    images = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        tokens = reference(images).last_hidden_state
        pool = reference.head.attention
        values = pool.out_proj(F.linear(tokens, pool.in_proj_weight[-768:], pool.in_proj_bias[-768:]))
        expected = values + reference.head.mlp(reference.head.layernorm(values))
        assert_rounded(backbone(images).flatten(1, 2), expected, backbone.depth, backbone.embed_dim)


def test_one_patch_is_the_pooled_image() -> None:
    """With a single token, attention has no effect: the dense feature equals the pooled embedding."""
    torch.manual_seed(0)
    backbone = SigLIP2("ViT-B-32-SigLIP2-256", pretrained=None)
    token = torch.randn(1, 1, 768)
    with torch.no_grad():
        pooled = backbone.trunk.attn_pool(backbone.trunk.norm(token))
        assert_rounded(backbone.project(token, [(1, 1)])[:, 0], pooled, 1, 4 * backbone.embed_dim)


def test_naflex_equals_transformers_own_model(small_naflex: str) -> None:
    backbone = NaFlex(small_naflex)
    images = torch.randn(1, 3, 48, 80)
    patches = images.unflatten(2, (3, 16)).unflatten(4, (5, 16)).permute(0, 2, 4, 3, 5, 1).reshape(1, 15, -1)
    with torch.no_grad():
        expected = backbone.vision_model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(1, 15, dtype=torch.long),
            spatial_shapes=torch.tensor([[3, 5]]),
        ).last_hidden_state
        tokens = backbone.run_blocks(backbone.embed(images), [(3, 5)])
        assert_rounded(backbone.vision_model.post_layernorm(tokens), expected, backbone.depth, backbone.embed_dim)


def test_a_local_tokenizer_pads_on_the_right_to_the_trained_length(tmp_path: Path) -> None:
    words = {"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left").save_pretrained(
        tmp_path
    )
    tokens = open_clip_tokenizer("ViT-B-16-SigLIP2-512", str(tmp_path))(["A Cat."])
    assert tokens.shape == (1, 64) and tokens[0, :3].tolist() == [2, 3, 0]
    with pytest.raises(UserError, match=r"/nowhere .*ViT-B-16-SigLIP2-512 .*`tokenizer`"):
        open_clip_tokenizer("ViT-B-16-SigLIP2-512", "/nowhere")


def test_naflex_from_a_weight_file_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = NaFlex(pretrained=None).state_dict()
    torch.save({"state_dict": {f"student.{name}": tensor for name, tensor in state.items()}}, tmp_path / "best.ckpt")
    loaded = NaFlex(str(tmp_path / "best.ckpt")).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_naflex_refuses_a_folder_that_lacks_tensors(small_naflex: str, tmp_path: Path) -> None:
    shutil.copytree(small_naflex, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in weights if name.endswith("post_layernorm.weight"))
    del weights[name]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"Siglip2VisionModel: 1 .*post_lay"):
        NaFlex(str(tmp_path / "model"))


def test_the_papers_parameter_counts() -> None:
    """Check the counts in Table 2 of the paper for ViT-B-16-SigLIP2-512, in millions."""
    from spar_lightning.backbones.parameter_groups import select

    backbone = SigLIP2(pretrained=None)
    groups = backbone.parameter_groups()

    def millions(*selectors: str) -> float:
        return round(sum(p.numel() for p in select(groups, selectors)) / 1e6, 1)

    assert round(sum(p.numel() for p in backbone.parameters()) / 1e6, 1) == 93.5
    assert millions("blocks.-1") == 7.1
    assert millions("blocks.-2", "blocks.-1") == 14.2
    assert millions("blocks.-3", "blocks.-2", "blocks.-1") == 21.3
    assert millions("patch_embed") == 0.6
    assert millions("pos_embed") == 0.8
    assert millions("blocks.-2.mlp", "blocks.-1.mlp") == 9.4
    assert millions("blocks.-2.qkv", "blocks.-1.qkv") == 3.5
