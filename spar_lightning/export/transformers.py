"""Export of students to transformers: folders in the layout of `save_pretrained`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from spar_lightning.backbones import DINOv3Text, NaFlex, OpenCLIP, SigLIP2
from spar_lightning.export.open_clip import before_last_block
from spar_lightning.export.recipe import Recipe, Recipes, normed, renamed
from spar_lightning.export.snippets import TRANSFORMERS_POOL
from spar_lightning.export.timm import plain_vision
from spar_lightning.student import Student

SIGLIP: Final = {
    "patch_embed.proj.": "embeddings.patch_embedding.", "blocks.": "encoder.layers.", ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.", ".attn.proj.": ".self_attn.out_proj.", "attn_pool.latent": "head.probe",
    "attn_pool.proj.": "head.attention.out_proj.", "attn_pool.norm.": "head.layernorm.", "attn_pool.mlp.": "head.mlp.",
}  # fmt: skip

CLIP: Final = {
    "transformer.resblocks.": "encoder.layers.", "conv1.": "embeddings.patch_embedding.", "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.", ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2.",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
}  # fmt: skip

DINOV3: Final = {
    "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
    "patch_embed.proj.": "embeddings.patch_embeddings.", "blocks.": "model.layer.",
    ".gamma_1": ".layer_scale1.lambda1", ".gamma_2": ".layer_scale2.lambda1", ".attn.proj.": ".attention.o_proj.",
    ".attn.q_bias": ".attention.q_proj.bias", ".attn.v_bias": ".attention.v_proj.bias", ".fc1_g.": ".gate_proj.",
    ".fc1_x.": ".up_proj.", ".fc1.": ".up_proj.", ".fc2.": ".down_proj.",
}  # fmt: skip


def split_qkv(tensors: Mapping[str, Tensor], joined: str, apart: str) -> dict[str, Tensor]:
    """Split tensors of joined query, key and value into three tensors; others are returned unchanged.

    Args:
        tensors: Tensors by name.
        joined: Part of the names of joined tensors, such as `.attn.qkv.`.
        apart: Replacement for `joined`, in which `{}` becomes q, k or v.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if joined in name:
            found |= {name.replace(joined, apart.format(p)): t for p, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            found[name] = tensor
    return found


def save(theirs: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load tensors strictly into a transformers model and write its config.json and model.safetensors."""
    theirs.load_state_dict(tensors)
    theirs.save_pretrained(folder)


def write_siglip2(student: Student, folder: Path) -> None:
    """Write a SiglipVisionModel."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    backbone = student.backbone
    assert isinstance(backbone, SigLIP2)
    trunk, block = backbone.trunk, backbone.trunk.blocks[0]
    config = SiglipVisionConfig(
        hidden_size=trunk.embed_dim, intermediate_size=block.mlp.fc1.out_features, num_hidden_layers=backbone.depth,
        num_attention_heads=block.attn.num_heads, image_size=backbone.window, patch_size=backbone.patch_size,
        hidden_act=_gelu(block.mlp.act), layer_norm_eps=block.norm1.eps,
    )  # fmt: skip
    tensors = {}
    for name, tensor in backbone.vision_state_dict().items():
        plain = name.removeprefix("visual.trunk.")
        tensors[f"post_layernorm.{plain.removeprefix('norm.')}" if plain.startswith("norm.") else plain] = tensor
    tensors = {renamed(name, SIGLIP): tensor for name, tensor in tensors.items()}
    tensors = split_qkv(tensors, ".attn.qkv.", ".self_attn.{}_proj.")
    tensors["embeddings.position_embedding.weight"] = tensors.pop("pos_embed")[0]
    for kind in ("weight", "bias"):  # nn.MultiheadAttention stores query, key and value in one tensor
        parts = [tensors.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
        tensors[f"head.attention.in_proj_{kind}"] = torch.cat(parts)
    save(SiglipVisionModel(config), tensors, folder)


def write_openclip(student: Student, folder: Path) -> None:
    """Write a CLIPVisionModelWithProjection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    backbone = student.backbone
    assert isinstance(backbone, OpenCLIP)
    plain_vision(backbone, "transformers")
    visual, block = backbone.visual, backbone.visual.transformer.resblocks[0]
    config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels, intermediate_size=block.mlp.c_fc.out_features,
        projection_dim=backbone.embed_dim, num_hidden_layers=backbone.depth, num_attention_heads=block.attn.num_heads,
        image_size=backbone.window, patch_size=backbone.patch_size, layer_norm_eps=block.ln_1.eps,
        hidden_act="quick_gelu" if backbone.quick_gelu else "gelu",
    )  # fmt: skip
    tensors = {name.removeprefix("visual."): t for name, t in backbone.vision_state_dict().items()}
    projection = tensors.pop("proj").T
    tensors = split_qkv(tensors, ".attn.in_proj_", ".self_attn.{}_proj.")
    tensors = {f"vision_model.{renamed(name, CLIP)}": tensor for name, tensor in tensors.items()}
    save(CLIPVisionModelWithProjection(config), {**tensors, "visual_projection.weight": projection}, folder)


def write_dinov3(student: Student, folder: Path) -> None:
    """Write a DINOv3ViTModel."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    backbone = student.backbone
    assert isinstance(backbone, DINOv3Text)
    trunk, block = backbone.trunk, backbone.trunk.blocks[0]
    gated = hasattr(block.mlp, "fc1_g")
    config = DINOv3ViTConfig(
        hidden_size=trunk.embed_dim, intermediate_size=block.mlp.fc2.in_features, num_hidden_layers=backbone.depth,
        num_attention_heads=block.attn.num_heads, num_register_tokens=trunk.num_prefix_tokens - 1,
        image_size=backbone.window, patch_size=backbone.patch_size, layer_norm_eps=block.norm1.eps,
        use_gated_mlp=gated, hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    tensors = {renamed(name, DINOV3): tensor for name, tensor in backbone.vision_state_dict().items()}
    tensors = split_qkv(tensors, ".attn.qkv.", ".attention.{}_proj.")
    unused = {"embeddings.mask_token": torch.zeros(1, 1, trunk.embed_dim)}
    save(DINOv3ViTModel(config), {**tensors, **unused}, folder)


def write_naflex(student: Student, folder: Path) -> None:
    """Write the Siglip2VisionModel of the backbone."""
    backbone = student.backbone
    assert isinstance(backbone, NaFlex)
    backbone.vision_model.config.name_or_path = ""  # may be a local path
    backbone.vision_model.save_pretrained(folder)


def _gelu(act: nn.Module) -> str:
    """Return the transformers name of a timm activation; SigLIP models use different ones."""
    tanh = type(act).__name__ == "GELUTanh" or getattr(act, "approximate", "none") == "tanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


LOAD: Final = """
from transformers import {model}

model, report = {model}.from_pretrained(".", output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"]
"""

# The official weights store the RoPE periods in bf16; transformers computes them.
ROUNDED: Final = """frequencies = model.rope_embeddings.inv_freq
frequencies.copy_(1 / (1 / frequencies).bfloat16().float())  # repeat after every change of dtype
"""

INTERPOLATED: Final = """
import torch.nn.functional as F


def tokens(model, images):
    return model(images, interpolate_pos_encoding=True).last_hidden_state
"""

CLIP_TOKENS: Final = '''
def tokens(model, images):
    """Return the input of the last layer, where MaskCLIP replaces the attention."""
    return model(images, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]


def dense(model, images):
    x, layer = tokens(model, images)[:, 1:], model.vision_model.encoder.layers[-1]
    x = x + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(x)))  # values only, without attention
    x = x + layer.mlp(layer.layer_norm2(x))
    h, w = (side // model.config.patch_size for side in images.shape[2:])
    return model.visual_projection(model.vision_model.post_layernorm(x)).unflatten(1, (h, w))
'''

DINOV3_TOKENS: Final = """
def tokens(model, images):
    return model(images).last_hidden_state  # RoPE supports any size


def dense(model, images):
    h, w = (side // model.config.patch_size for side in images.shape[2:])
    return tokens(model, images)[:, 1 + model.config.num_register_tokens :].unflatten(1, (h, w))
"""

NAFLEX_TOKENS: Final = """
import torch
import torch.nn.functional as F


def tokens(model, images):
    p = model.config.patch_size
    h, w = images.shape[2] // p, images.shape[3] // p
    # (B, 3, H, W) -> (B, h * w, p * p * 3): patches row by row, channels last
    patches = images.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 3, 5, 1).reshape(len(images), h * w, -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=images.device)  # without padding
    shapes = torch.tensor([[h, w]] * len(images))
    return model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
"""

SIZES: Final = (
    "transformers accepts only the native image size, unless `interpolate_pos_encoding=True` is passed. It then "
    "resizes the positional embedding as in training: bicubic, without antialiasing."
)
PERIODS: Final = (
    "transformers accepts any image size. It computes the RoPE periods without the bf16 rounding of the official "
    "weights. The last lines of the loading code round them; without them, features differ at every size."
)
NATIVE: Final = "transformers resizes the positional embedding as in training: bilinear, with antialiasing."

RECIPES: Final[Recipes] = {
    SigLIP2: Recipe(
        write_siglip2, LOAD.replace("{model}", "SiglipVisionModel"), INTERPOLATED + TRANSFORMERS_POOL, SIZES,
        normed("visual.trunk.norm"),
    ),
    OpenCLIP: Recipe(
        write_openclip, LOAD.replace("{model}", "CLIPVisionModelWithProjection"), CLIP_TOKENS, SIZES, before_last_block
    ),
    DINOv3Text: Recipe(
        write_dinov3, LOAD.replace("{model}", "DINOv3ViTModel") + ROUNDED, DINOV3_TOKENS, PERIODS,
        normed("trunk.norm"),
    ),
    NaFlex: Recipe(
        write_naflex, LOAD.replace("{model}", "Siglip2VisionModel"), NAFLEX_TOKENS + TRANSFORMERS_POOL, NATIVE,
        normed("vision_model.post_layernorm"),
    ),
}  # fmt: skip
