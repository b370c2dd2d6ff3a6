"""Forward pass of timm's VisionTransformer at any image size and in packed sequences, for SigLIP2 and plugins."""

from abc import ABC
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spar_lightning.backbones.base import Backbone, Grid
from spar_lightning.backbones.pos_embed import positions
from spar_lightning.errors import UserError
from spar_lightning.image.resize import check_sides


class TimmTrunk(Backbone, ABC):
    """Base class of backbones with timm's VisionTransformer and a learned positional embedding.

    A subclass sets `trunk`, `mean` and `std`, calls `read_facts`, and implements `project` and the methods that
    load and save weights.

    Attributes:
        trunk: VisionTransformer of timm.
        grid: Native patch grid.
        value_path: Whether the value path replaces attention in the last block (MaskCLIP, Zhou et al., ECCV 2022).
    """

    trunk: Any
    grid: Grid
    windowable = True
    value_path = False

    def read_facts(self) -> None:
        """Set the attributes patch_size, grid, window, embed_dim and prefix from the trunk.

        Raises:
            UserError: The blocks do not have the attention of a plain ViT, which `run_blocks` computes, or the trunk
                has tokens or positions that `embed` does not know.
        """
        self.check_blocks()
        known = [token for token in (self.trunk.cls_token, self.trunk.reg_token) if token is not None]
        if sum(token.shape[1] for token in known) != self.trunk.num_prefix_tokens or self.trunk.pos_embed is None:
            table = "no" if self.trunk.pos_embed is None else "a"
            raise UserError(
                f"{type(self).__name__}: the trunk has {self.trunk.num_prefix_tokens} tokens before its patches, and "
                f"{table} learned positional embedding. Allowed: a class token, registers and a learned positional "
                "embedding. For other models, such as distilled DeiT, implement embed in the backbone."
            )
        self.patch_size, self.grid = self.trunk.patch_embed.patch_size[0], self.trunk.patch_embed.grid_size
        self.window, self.embed_dim = self.grid[0] * self.patch_size, self.trunk.num_features
        self.prefix = self.trunk.num_prefix_tokens

    def check_blocks(self) -> None:
        """Raise UserError if the blocks of the trunk compute anything else than `run_blocks`."""
        from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]  # not in __all__

        for i, block in enumerate(self.trunk.blocks):
            gated = getattr(block.attn, "gate", None) is not None  # not in all versions of timm
            if type(block.attn) is not Attention or gated:
                found = "gated attention" if gated else type(block.attn).__name__
                raise UserError(
                    f"{type(self).__name__}: block {i} of the trunk has {found}. Allowed: timm's Attention without a "
                    "gate. For other models, implement run_blocks in the backbone."
                )

    def embed(self, images: Tensor) -> Tensor:
        check_sides(images, self.patch_size)
        trunk = self.trunk
        # timm's PatchEmbed accepts only the native image size, so its projection is called directly.
        patches = trunk.patch_embed.proj(images)  # (B, D, h, w)
        tokens = patches.flatten(2).transpose(1, 2)
        held = 0 if trunk.no_embed_class or trunk.pos_embed is None else self.prefix  # rows for class and registers
        if trunk.pos_embed is not None:
            tokens = tokens + self.positions((patches.shape[-2], patches.shape[-1]), trunk.pos_embed[:, held:])
        if prefix := [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]:
            first = torch.cat(prefix, dim=1)
            first = first + trunk.pos_embed[:, :held] if held else first
            tokens = torch.cat([first.expand(images.shape[0], -1, -1), tokens], dim=1)
        normed: Tensor = trunk.norm_pre(tokens)
        return normed

    def positions(self, grid: Grid, table: Tensor) -> Tensor:
        """Return the positional embedding (1, h * w, D) of a patch grid, from a table of the native grid (1, N, D)."""
        return positions(table, grid, self.grid, self.windowed)

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        for block in self.trunk.blocks[start:stop]:
            tokens = tokens + block.ls1(self.attention(block, block.norm1(tokens), grids))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return tokens

    def attention(self, block: Any, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the output (B, T, D) of a block's attention for its normalized input."""
        attn = block.attn
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, width)
        if self.value_path and block is self.trunk.blocks[-1]:
            mixed = v.transpose(1, 2).flatten(2)
        else:
            mixed = self.attend(attn.q_norm(q), attn.k_norm(k), v, grids)
        output: Tensor = attn.proj(attn.norm(mixed))
        return output

    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.trunk.norm
        return norm

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        trunk = self.trunk
        groups = {"patch_embed": list(trunk.patch_embed.parameters())}
        if trunk.pos_embed is not None:
            groups["pos_embed"] = [trunk.pos_embed]
        if prefix := [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]:
            groups["prefix"] = prefix
        for i, block in enumerate(trunk.blocks):
            groups[f"blocks.{i}"] = list(block.parameters())
            groups[f"blocks.{i}.mlp"] = list(block.mlp.parameters())
            groups[f"blocks.{i}.qkv"] = self.qkv_parameters(block.attn)
        norm = [*trunk.norm_pre.parameters(), *trunk.norm.parameters()]  # C-RADIO has none
        return {**groups, "norm": norm} if norm else groups

    def qkv_parameters(self, attn: Any) -> list[nn.Parameter]:
        """Return the parameters that compute queries, keys and values."""
        return list(attn.qkv.parameters())
