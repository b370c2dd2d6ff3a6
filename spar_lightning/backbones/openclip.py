"""CLIP backbones of open_clip with MaskCLIP dense features (Zhou et al., ECCV 2022), which need no training.

In the last block, the value path out_proj(W_v x) replaces attention; the residual connection and the MLP
are unchanged. ln_post and the projection are then applied to every patch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.open_clip_base import OpenClipModel
from spar_lightning.backbones.open_clip_config import model_config
from spar_lightning.backbones.packing import patch_tokens
from spar_lightning.backbones.pos_embed import positions
from spar_lightning.errors import UserError
from spar_lightning.image.resize import check_sides, drop


class OpenCLIP(OpenClipModel):
    """CLIP vision tower of open_clip with MaskCLIP dense features.

    Args:
        model: Name of a CLIP model with a ViT in open_clip, such as ViT-B-16. If OpenAI's weights are loaded from
            a path, use a name with -quickgelu; with a tag, QuickGELU is set automatically.
        pretrained: Pretrained tag of open_clip (downloaded once), path of a weight file or of a folder with one,
            or null for random weights.
        tokenizer: Folder with the tokenizer files, for models with a tokenizer on the Hugging Face Hub; null
            downloads them.
        text_pretrained: Pretrained tag or path of the text tower, needed if `pretrained` is a student without
            one; null uses `pretrained`.
    """

    paper_patch_fit = staticmethod(drop)
    prefix = 1  # the class token
    windowable = True

    def __init__(
        self,
        model: str = "ViT-B-16",
        pretrained: str | None = "laion2b_s34b_b88k",
        tokenizer: str | None = None,
        text_pretrained: str | None = None,
    ) -> None:
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        vision = model_config(model)["vision_cfg"]
        if "timm_model_name" in vision or isinstance(vision["layers"], list) or vision.get("attentional_pool"):
            raise UserError(
                f"OpenCLIP: the vision tower of {model} is not a plain CLIP ViT. Use a model such as ViT-B-16 or "
                "ViT-L-14, or the backbone SigLIP2 for SigLIP models."
            )
        super().__init__(
            model, pretrained, tokenizer, text_pretrained, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD
        )
        self.patch_size = self.visual.patch_size[0]
        self.grid: Grid = self.visual.grid_size
        self.window = self.grid[0] * self.patch_size
        self.embed_dim = self.visual.output_dim

    def embed(self, images: Tensor) -> Tensor:
        check_sides(images, self.patch_size)
        visual = self.visual
        patches = visual.conv1(images)  # (B, D, h, w)
        table = visual.positional_embedding[None]  # (1, 1 + N, D)
        of_patches = positions(table[:, 1:], (patches.shape[-2], patches.shape[-1]), self.grid, self.windowed)
        first = (visual.class_embedding + table[:, :1]).expand(images.shape[0], -1, -1)
        tokens: Tensor = visual.ln_pre(torch.cat([first, patches.flatten(2).transpose(1, 2) + of_patches], dim=1))
        return tokens

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        blocks = self.visual.transformer.resblocks
        for block in blocks[start:stop]:
            x = block.ln_1(tokens)
            if block is blocks[-1]:
                mixed = _values(block.attn, x)
            else:
                mixed = block.attn.out_proj(self.attend(*_qkv(block.attn, x), grids))
            tokens = tokens + block.ls_1(mixed)
            tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return tokens

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        features: Tensor = self.visual.ln_post(patch_tokens(tokens, grids, self.prefix)) @ self.visual.proj
        return features

    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.visual.ln_post
        return norm

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


# nn.MultiheadAttention.forward is not called: its fast path in eval mode does not support packed sequences.


def _qkv(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values (B, heads, n, D/heads) with the weights of an nn.MultiheadAttention."""
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def _values(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Compute the value path, that is, attention where each token attends only to itself."""
    width = attn.embed_dim
    values: Tensor = attn.out_proj(F.linear(x, attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :]))
    return values
