"""Small models of the large families, which the import registers in timm and open_clip."""

import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 2}


def built(cls: Any, options: dict[str, Any], **defaults: Any) -> Any:
    """Build a model from timm's options, without those of pretrained weights."""
    for name in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    model = cls(**{**SMALL, **defaults, **options})
    model.pretrained_cfg = {"mean": CLIP_MEAN, "std": CLIP_STD}
    return model


@register_model
def vit_tiny_patch14_reg1_tipsv2(**options: Any) -> Any:
    return built(VisionTransformer, options, img_size=56, patch_size=14, init_values=1.0, reg_tokens=1,
                 no_embed_class=True)  # fmt: skip


@register_model
def vit_tiny_patch16_radio_v4(**options: Any) -> Any:
    return built(VisionTransformer, options, img_size=512, patch_size=16, reg_tokens=9, no_embed_class=True,
                 final_norm=False)  # fmt: skip


@register_model
def eva02_tiny_patch16_clip_64(**options: Any) -> Any:
    return built(Eva, options, img_size=64, patch_size=16, qkv_fused=False, mlp_ratio=8 / 3, swiglu_mlp=True,
                 scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(16, 16),
                 global_pool="token")  # fmt: skip


@register_model
def eva02_post_patch16_clip_64(**options: Any) -> Any:
    return built(Eva, options, img_size=64, patch_size=16, mlp_ratio=4.0, use_post_norm=True, global_pool="token")


@register_model
def vit_pe_core_nano_patch16_64(**options: Any) -> Any:
    return built(Eva, options, img_size=64, patch_size=16, attn_type="rope", use_pre_transformer_norm=True,
                 use_rot_pos_emb=True, ref_feat_shape=(24, 24), rope_grid_offset=1.0, rope_grid_indexing="xy",
                 attn_pool_num_heads=8, attn_pool_mlp_ratio=4.0, global_pool="map")  # fmt: skip


CONFIGS = {
    "EVA02-Tiny": ("eva02_tiny_patch16_clip_64", "token"),
    "EVA02-Post": ("eva02_post_patch16_clip_64", "token"),
    "PE-Core-Nano": ("vit_pe_core_nano_patch16_64", "map"),
}


def randomized(backbone: Any) -> Any:
    """Add noise to all parameters, because the initial ones are so small that features hardly depend on the image."""
    torch.manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone


def register() -> None:
    """Make the models of `CONFIGS` known to open_clip, which reads configurations from files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (trunk, pool) in CONFIGS.items():
            vision = {"image_size": 64, "timm_model_name": trunk, "timm_model_pretrained": False, "timm_pool": pool,
                      "timm_proj": None}  # fmt: skip
            text = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
            config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
            Path(folder, f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)  # reads the files


register()
