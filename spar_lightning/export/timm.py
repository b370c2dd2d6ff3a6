"""Export of students to timm: a folder for `local-dir:` with the weights and the architecture in config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from spar_lightning.backbones import DINOv3Text, OpenCLIP, SigLIP2, Tiny
from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.open_clip_config import model_config
from spar_lightning.errors import UserError
from spar_lightning.export.open_clip import before_last_block
from spar_lightning.export.recipe import Recipe, Recipes, normed, renamed
from spar_lightning.export.snippets import ANTIALIASED, TIMM_POOL, TIMM_TOKENS
from spar_lightning.student import Student

# Keys of an open_clip vision configuration that the plain ViTs of other libraries support.
PLAIN: Final = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "output_tokens"}

NAMES: Final = {
    "transformer.resblocks.": "blocks.", "conv1.": "patch_embed.proj.", "ln_pre.": "norm_pre.", "ln_post.": "norm.",
    ".ln_1.": ".norm1.", ".ln_2.": ".norm2.", ".in_proj_": ".qkv.", ".out_proj.": ".proj.", ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}  # fmt: skip


def save(
    folder: Path, backbone: Backbone, tensors: Mapping[str, Tensor], architecture: str, classes: int, **arguments: Any
) -> None:
    """Write config.json and model.safetensors.

    Args:
        folder: Output folder.
        backbone: Backbone whose window and normalization are recorded.
        tensors: Weights under timm's names.
        architecture: Name of a timm architecture.
        classes: Number of outputs of timm's `head`; 0 for a model without a head.
        arguments: Arguments of the architecture that differ from its defaults.
    """
    pretrained = {
        "input_size": [3, backbone.window, backbone.window], "num_classes": classes, "mean": backbone.mean,
        "std": backbone.std, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash",
        "classifier": "head", "first_conv": "patch_embed.proj",
    }  # fmt: skip
    content = {
        "architecture": architecture, "num_classes": classes, "model_args": arguments, "pretrained_cfg": pretrained
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})


def plain_vision(backbone: OpenCLIP, library: str) -> dict[str, Any]:
    """Return the vision configuration of open_clip, if other libraries support it.

    Raises:
        UserError: The vision tower has parts that the library lacks.
    """
    vision: dict[str, Any] = model_config(backbone.model)["vision_cfg"]
    if other := sorted(vision.keys() - PLAIN):
        raise UserError(
            f"{library} has no architecture for {backbone.model} (unsupported: {', '.join(other)}). Use --to open_clip."
        )
    return vision


def write_siglip2(student: Student, folder: Path) -> None:
    """Write the trunk, which is a timm model already."""
    backbone = student.backbone
    assert isinstance(backbone, SigLIP2)
    architecture = model_config(backbone.model)["vision_cfg"]["timm_model_name"]
    tensors = {name.removeprefix("visual.trunk."): t for name, t in backbone.vision_state_dict().items()}
    # Without img_size, timm would create a positional embedding of another size and resample ours to it.
    save(folder, backbone, tensors, architecture, 0, img_size=backbone.window, global_pool="map")


def write_openclip(student: Student, folder: Path) -> None:
    """Write the vision tower, with its projection as the head of the timm model."""
    backbone = student.backbone
    assert isinstance(backbone, OpenCLIP)
    vision, visual = plain_vision(backbone, "timm"), backbone.visual
    tensors = {renamed(n.removeprefix("visual."), NAMES): t for n, t in backbone.vision_state_dict().items()}
    tensors["cls_token"] = tensors.pop("class_embedding")[None, None]
    tensors["pos_embed"] = tensors.pop("positional_embedding")[None]
    tensors["head.weight"] = tensors.pop("proj").T
    tensors["head.bias"] = tensors["head.weight"].new_zeros(backbone.embed_dim)  # timm's head has a bias
    # One architecture with all arguments, since timm lacks names for some sizes.
    save(
        folder, backbone, tensors, "vit_base_patch16_clip_224", backbone.embed_dim, img_size=backbone.window,
        patch_size=backbone.patch_size, embed_dim=visual.conv1.out_channels, depth=backbone.depth,
        num_heads=visual.transformer.resblocks[0].attn.num_heads, mlp_ratio=vision.get("mlp_ratio", 4.0),
        act_layer="quick_gelu" if backbone.quick_gelu else "gelu",
    )  # fmt: skip


def write_dinov3(student: Student, folder: Path) -> None:
    """Write the trunk, which is a timm model already."""
    backbone = student.backbone
    assert isinstance(backbone, DINOv3Text)
    save(folder, backbone, backbone.vision_state_dict(), backbone.model, 0)


def write_tiny(student: Student, folder: Path) -> None:
    """Write a plain ViT with a head."""
    backbone = student.backbone
    assert isinstance(backbone, Tiny)
    save(
        folder, backbone, backbone.vision_state_dict(), "vit_small_patch16_224", backbone.embed_dim,
        img_size=backbone.window, patch_size=backbone.patch_size, embed_dim=backbone.embed_dim, depth=backbone.depth,
        num_heads=backbone.heads, class_token=False, global_pool="avg", fc_norm=False,
    )  # fmt: skip


LOAD: Final = """
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
"""

CLIP: Final = '''
import torch
import torch.nn.functional as F


def tokens(model, images):
    """Return the input of the last block, where MaskCLIP replaces the attention."""
    patches = model.patch_embed.proj(images)
    first, table = model.pos_embed[:, :1], model.pos_embed[:, 1:]
    table = table.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)
    table = F.interpolate(table, patches.shape[2:], mode="bicubic", align_corners=False)  # without antialiasing
    first = (model.cls_token + first).expand(len(images), -1, -1)
    x = model.norm_pre(torch.cat([first, (patches + table).flatten(2).transpose(1, 2)], dim=1))
    return model.blocks[:-1](x)


def dense(model, images):
    x, block = tokens(model, images)[:, 1:], model.blocks[-1]
    weight, bias = block.attn.qkv.weight.chunk(3)[2], block.attn.qkv.bias.chunk(3)[2]
    x = x + block.attn.proj(F.linear(block.norm1(x), weight, bias))  # values only, without attention
    x = x + block.mlp(block.norm2(x))
    h, w = (side // model.patch_embed.patch_size[0] for side in images.shape[2:])
    return model.head(model.norm(x)).unflatten(1, (h, w))
'''

DINOV3: Final = """
def tokens(model, images):
    return model.forward_features(images)  # RoPE supports any size


def dense(model, images):
    h, w = (side // model.patch_embed.patch_size[0] for side in images.shape[2:])
    return tokens(model, images)[:, model.num_prefix_tokens :].unflatten(1, (h, w))
"""

# The official weights store the RoPE periods in bf16; timm computes them.
ROUNDED: Final = """model.rope.periods.copy_(model.rope.periods.bfloat16())  # repeat after every change of dtype
"""

TINY: Final = """

def dense(model, images):
    h, w = (side // model.patch_embed.patch_size[0] for side in images.shape[2:])
    return model.head(tokens(model, images)).unflatten(1, (h, w))
"""

SIZES: Final = ANTIALIASED.format(library="timm", option="`dynamic_img_size` or `img_size`")

PERIODS: Final = (
    "timm accepts any image size. It computes the RoPE periods without the bf16 rounding of the official weights. The "
    "last line of the loading code rounds them; without it, features differ at every size."
)

RECIPES: Final[Recipes] = {
    SigLIP2: Recipe(
        write_siglip2,
        LOAD,
        (TIMM_TOKENS + TIMM_POOL).replace("{trunk}", "model"),
        SIZES,
        normed("visual.trunk.norm"),
    ),
    OpenCLIP: Recipe(write_openclip, LOAD, CLIP, SIZES, before_last_block),
    DINOv3Text: Recipe(
        write_dinov3, LOAD + ROUNDED, DINOV3, PERIODS,
        normed("trunk.norm"),
    ),
    Tiny: Recipe(
        write_tiny, LOAD, TIMM_TOKENS.replace("{trunk}", "model") + TINY, SIZES,
        normed("norm"),
    ),
}  # fmt: skip
