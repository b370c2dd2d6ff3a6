"""CLIP models of open_clip in MaskCLIP mode (Zhou et al., ECCV 2022): dense features without training.

In the last block the value path, out_proj(W_v x), replaces attention; residual and MLP stay. Then
ln_post and the projection, for every patch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones import open_clip_models
from spar_lightning.backbones.base import Backbone, TextTower
from spar_lightning.backbones.position_table import resized
from spar_lightning.errors import UserError
from spar_lightning.geometry import drop
from spar_lightning.packing import Grid, patch_tokens, per_image
from spar_lightning.sliding_window import check_sides


class OpenCLIP(Backbone):
    """A CLIP vision tower of open_clip, dense by MaskCLIP.

    Args:
        model: open_clip's name of a model with a ViT, such as ViT-B-16. OpenAI's weights given by a path need
            a name with -quickgelu; a tag knows it by itself.
        pretrained: open_clip's tag of weights (downloaded once), the path of a file or folder with
            them, or null for random weights.
        tokenizer: Folder with the tokenizer's files, for models whose tokenizer lies on the hub.
        text_pretrained: Tag or path of the text tower where `pretrained` is a student without one.
    """

    paper_geometry = staticmethod(drop)
    prefix = 1  # the class token

    def __init__(
        self,
        model: str = "ViT-B-16",
        pretrained: str | None = "laion2b_s34b_b88k",
        tokenizer: str | None = None,
        text_pretrained: str | None = None,
    ) -> None:
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        from open_clip.transformer import VisionTransformer

        super().__init__()
        self.model, self.pretrained, self.tokenizer = model, pretrained, tokenizer
        self.text_pretrained = text_pretrained or pretrained
        known = open_clip_models.pretrained_config(model, pretrained)
        self.quick_gelu = open_clip_models.quick_gelu(model, pretrained)
        self.visual: Any = open_clip_models.vision_tower(model, self.quick_gelu)
        if type(self.visual) is not VisionTransformer or self.visual.attn_pool is not None:
            raise UserError(
                f"OpenCLIP: the vision tower of {model} is no plain CLIP ViT. Give a model such as ViT-B-16 or "
                "ViT-L-14; for SigLIP models choose the backbone SigLIP2."
            )
        self.patch_size = self.visual.patch_size[0]
        self.grid: Grid = self.visual.grid_size
        self.window = self.grid[0] * self.patch_size
        self.embed_dim = self.visual.output_dim
        self.mean = known.get("mean", OPENAI_DATASET_MEAN)
        self.std = known.get("std", OPENAI_DATASET_STD)
        if pretrained is not None:
            self.load_vision_state_dict(open_clip_models.weights(model, pretrained))
        self.eval()

    def embed(self, images: Tensor) -> Tensor:
        check_sides(images, self.patch_size)
        visual = self.visual
        patches = visual.conv1(images)  # (B, D, h, w)
        table = visual.positional_embedding[None]  # (1, 1 + N, D)
        positions = resized(table[:, 1:], (patches.shape[-2], patches.shape[-1]), self.grid)
        first = (visual.class_embedding + table[:, :1]).expand(len(images), -1, -1)
        tokens: Tensor = visual.ln_pre(torch.cat([first, patches.flatten(2).transpose(1, 2) + positions], dim=1))
        return tokens

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        lengths = [self.prefix + h * w for h, w in grids]
        blocks = self.visual.transformer.resblocks
        for block in blocks[start:stop]:
            x = block.ln_1(tokens)
            if block is blocks[-1]:
                mixed = _values(block.attn, x)
            else:
                mixed = per_image(lambda part, attn=block.attn: _attention(attn, part), x, lengths)
            tokens = tokens + block.ls_1(mixed)
            tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return tokens

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        features: Tensor = self.visual.ln_post(patch_tokens(tokens, grids, self.prefix)) @ self.visual.proj
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        visual = self.visual
        groups = {
            "patch_embed": list(visual.conv1.parameters()),
            "pos_embed": [visual.positional_embedding],
            "prefix": [visual.class_embedding],
        }
        for i, block in enumerate(visual.transformer.resblocks):
            groups[f"blocks.{i}"] = list(block.parameters())
            groups[f"blocks.{i}.mlp"] = list(block.mlp.parameters())
            groups[f"blocks.{i}.qkv"] = [block.attn.in_proj_weight, block.attn.in_proj_bias]
        norm = [*visual.ln_pre.parameters(), *visual.ln_post.parameters()]
        return {**groups, "norm": norm, "head": [visual.proj]}

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "quick_gelu": self.quick_gelu}  # the same weights serve both

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())  # open_clip's names: visual. ..

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        open_clip_models.load_vision(self.visual, state_dict, self.pretrained or "the state dict", self.model)

    def build_text_tower(self) -> TextTower:
        return open_clip_models.text_tower(self.model, self.text_pretrained, self.tokenizer)


# nn.MultiheadAttention.forward is not called: its fast path in eval mode knows no packs.


def _attention(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Self-attention (B, n, D) with the weights of an nn.MultiheadAttention."""
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, n, D/heads) each
    out: Tensor = attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return out


def _values(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The value path: what a token would give if it attended to itself alone."""
    width = attn.embed_dim
    values: Tensor = attn.out_proj(F.linear(x, attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :]))
    return values
