"""Export of students to open_clip: a folder for `local-dir:` with the configuration and one file of both towers."""

import json
from pathlib import Path
from typing import Final

from safetensors.torch import save_file
from torch import Tensor

from spar_lightning.backbones import OpenCLIP, SigLIP2
from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.open_clip_base import FILES, OpenClipModel, both_towers, weights
from spar_lightning.backbones.open_clip_config import CONFIG, model_config, quick_gelu
from spar_lightning.backbones.weights import check_fit
from spar_lightning.errors import UserError
from spar_lightning.export.recipe import Recipe, Recipes, normed
from spar_lightning.export.snippets import ANTIALIASED, TIMM_POOL, TIMM_TOKENS
from spar_lightning.student import Student


def write(student: Student, folder: Path) -> None:
    """Write the vision tower of the student and the text tower of its base model.

    Raises:
        UserError: The towers have different activations, which the format cannot express.
    """
    backbone = student.backbone
    assert isinstance(backbone, OpenClipModel)
    if quick_gelu(backbone.model, backbone.text_pretrained) != backbone.quick_gelu:
        raise UserError(
            f"--to open_clip: the text tower {backbone.text_pretrained!r} has another activation than the vision tower "
            f"{backbone.pretrained!r} (QuickGELU and GELU). Set pretrained to a folder with the weights and {CONFIG}."
        )
    config = {**model_config(backbone.model), "quick_gelu": backbone.quick_gelu}  # some pretrained tags require it
    preprocess = {"mean": backbone.mean, "std": backbone.std, "interpolation": "bicubic", "resize_mode": "squash"}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n")
    clip, base = both_towers(backbone.model, backbone.quick_gelu, warn=False), backbone.text_pretrained
    # If the base model has random weights, so has its text tower.
    tensors = dict(clip.state_dict()) if base is None else weights(backbone.model, base)
    tensors = {name: t for name, t in tensors.items() if not name.endswith("position_ids")}
    tensors |= backbone.vision_state_dict()
    for name, own in clip.state_dict().items():
        if name in tensors and own.ndim == 0:  # some files store the logit scale with shape (1,)
            tensors[name] = tensors[name].reshape(())
    check_fit(tensors, clip.state_dict(), base or "random", backbone.model)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / FILES[0], {"format": "pt"})


def before_last_block(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the input of the last block, where MaskCLIP replaces the attention."""
    return backbone.trunk_tokens(images, backbone.depth - 1)


LOAD: Final = """
import open_clip

model = open_clip.create_model("local-dir:.", require_pretrained=True).eval()
"""

CLIP: Final = '''
import torch
import torch.nn.functional as F


def tokens(model, images):
    """Return the input of the last block, where MaskCLIP replaces the attention."""
    visual = model.visual
    patches = visual.conv1(images)
    first, table = visual.positional_embedding[:1], visual.positional_embedding[1:]
    table = table.T.unflatten(1, visual.grid_size)[None]
    table = F.interpolate(table, patches.shape[2:], mode="bicubic", align_corners=False)  # without antialiasing
    first = (visual.class_embedding + first).expand(len(images), 1, -1)
    x = visual.ln_pre(torch.cat([first, (patches + table).flatten(2).transpose(1, 2)], dim=1))
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x


def dense(model, images):
    visual, block = model.visual, model.visual.transformer.resblocks[-1]
    x = tokens(model, images)[:, 1:]
    weight, bias = block.attn.in_proj_weight.chunk(3)[2], block.attn.in_proj_bias.chunk(3)[2]
    x = x + block.ls_1(block.attn.out_proj(F.linear(block.ln_1(x), weight, bias)))  # values only, without attention
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    h, w = images.shape[2] // visual.patch_size[0], images.shape[3] // visual.patch_size[1]
    return (visual.ln_post(x) @ visual.proj).unflatten(1, (h, w))
'''

SIZES: Final = ANTIALIASED.format(library="open_clip", option="`force_image_size`")

RECIPES: Final[Recipes] = {
    SigLIP2: Recipe(
        write,
        LOAD,
        (TIMM_TOKENS + TIMM_POOL).replace("{trunk}", "model.visual.trunk"),
        SIZES,
        normed("visual.trunk.norm"),
    ),
    OpenCLIP: Recipe(write, LOAD, CLIP, SIZES, before_last_block),
}
