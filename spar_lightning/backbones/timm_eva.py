"""Forward pass of timm's Eva, a ViT with rotary positional embedding (RoPE), for EVA02-CLIP, PE-Core and DINOv3."""

from abc import ABC
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.pos_embed import antialiased, placed
from spar_lightning.backbones.timm_vit import TimmTrunk
from spar_lightning.errors import UserError


class EvaTrunk(TimmTrunk, ABC):
    """Base class of backbones with timm's Eva: a learned positional embedding, and RoPE if the trunk has it.

    At other sizes, features equal timm's with `dynamic_img_size`: the positional embedding is resized bicubic with
    antialiasing, and RoPE covers the image with the coordinates of the native grid.
    """

    def check_blocks(self) -> None:
        from timm.layers import RotaryEmbeddingCat  # type: ignore[attr-defined]  # exported, but not in __all__
        from timm.models.eva import EvaBlock, EvaBlockPostNorm

        name, rope = type(self).__name__, self.trunk.rope
        for i, block in enumerate(self.trunk.blocks):
            grouped = getattr(block.attn, "num_kv_groups", 1) > 1
            if type(block) not in (EvaBlock, EvaBlockPostNorm) or getattr(block.attn, "gate", None) or grouped:
                raise UserError(
                    f"{name}: block {i} of the trunk is a {type(block).__name__}. Allowed: EvaBlock and "
                    "EvaBlockPostNorm of timm, without a gate or grouped queries. For other models, implement "
                    "run_blocks in the backbone."
                )
        if rope is not None and (type(rope) is not RotaryEmbeddingCat or rope.in_pixels or rope.ref_feat_shape is None):
            raise UserError(
                f"{name}: the trunk has {type(rope).__name__} with other settings. Allowed: RotaryEmbeddingCat of timm "
                "with ref_feat_shape. For other models, implement run_blocks in the backbone."
            )

    def positions(self, grid: Grid, table: Tensor) -> Tensor:
        return placed(partial(antialiased, table, native=self.grid, mode="bicubic"), grid, self.grid, self.windowed)

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        rope = None if self.trunk.rope is None else torch.cat([self.rotation(grid) for grid in grids])
        for block in self.trunk.blocks[start:stop]:
            attend = partial(self.rotated_attention, block, grids=grids, rope=rope)
            if hasattr(block, "gamma_1"):  # EvaBlock
                tokens = tokens + _scaled(attend(block.norm1(tokens)), block.gamma_1)
                tokens = tokens + _scaled(block.mlp(block.norm2(tokens)), block.gamma_2)
            else:  # EvaBlockPostNorm
                tokens = tokens + block.norm1(attend(tokens))
                tokens = tokens + block.norm2(block.mlp(tokens))
        return tokens

    def rotated_attention(self, block: Any, x: Tensor, grids: Sequence[Grid], rope: Tensor | None) -> Tensor:
        """Return the output (B, T, D) of a block's attention; `rope` has the sines and cosines of `rotation`."""
        from timm.layers import apply_rot_embed_cat  # type: ignore[attr-defined]  # exported, but not in __all__

        attn = block.attn
        q, k, v = _qkv(attn, x)
        if self.value_path and block is self.trunk.blocks[-1]:
            mixed = v.transpose(1, 2).flatten(2)
        else:
            q, k = attn.q_norm(q), attn.k_norm(k)
            if rope is not None:
                q, k = (apply_rot_embed_cat(part, rope, half=attn.rotate_half).type_as(v) for part in (q, k))
            mixed = self.attend(q, k, v, grids)
        output: Tensor = attn.proj(attn.norm(mixed))
        return output

    def rotation(self, grid: Grid) -> Tensor:
        """Return the sines and cosines of RoPE (prefix+N, 2 * head width); class and register tokens do not rotate.

        Equal to timm's, which converts h to a Python number, so that an export would not have dynamic sizes.
        """
        rope, device = self.trunk.rope, self.trunk.pos_embed.device
        axes = []
        for n, reference, native in zip(grid, rope.ref_feat_shape, self.grid, strict=True):
            axis = (torch.arange(n, device=device, dtype=torch.float32) + rope.grid_offset) / n * reference
            if self.windowed is not None and self.windowed.positions == "windowed":  # distances as in the native grid
                axis = axis * (torch.ones_like(axis).sum() / native).clamp(min=1)
            axes.append(axis)
        places = torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2), y before x
        if rope.grid_indexing == "xy":
            places = places.flip(-1)
        count = rope.dim // 4
        bands = 1 / rope.temperature ** (torch.arange(count, device=device, dtype=torch.float32) / count)
        angles = (places[:, :, None] * bands).flatten(1)  # (N, head width / 2)
        half = self.trunk.blocks[0].attn.rotate_half
        angles = angles.tile(2) if half else angles.repeat_interleave(2, dim=-1)
        angles = F.pad(angles, (0, 0, self.prefix, 0))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().parameter_groups()
        if self.value_path and self.trunk.blocks[-1].attn.qkv is None:  # separate queries and keys, not used
            attn, name = self.trunk.blocks[-1].attn, f"blocks.{len(self.trunk.blocks) - 1}"
            unused = {id(p) for part in (attn.q_proj, attn.k_proj) for p in part.parameters()}
            for key in (name, f"{name}.qkv"):
                groups[key] = [p for p in groups[key] if id(p) not in unused]
        return groups

    def qkv_parameters(self, attn: Any) -> list[nn.Parameter]:
        parts = [attn.q_proj, attn.k_proj, attn.v_proj] if attn.qkv is None else [attn.qkv]
        biases = [getattr(attn, name, None) for name in ("q_bias", "v_bias")]
        return [p for part in parts for p in part.parameters()] + [bias for bias in biases if bias is not None]


def _qkv(attn: Any, x: Tensor) -> list[Tensor]:
    """Compute queries, keys and values (B, heads, T, head width)."""
    if attn.qkv is None:
        parts = [attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)]
    elif getattr(attn, "q_bias", None) is None:
        parts = attn.qkv(x).chunk(3, dim=-1)
    else:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        parts = list(F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1))
    return [part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts]


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale * x
