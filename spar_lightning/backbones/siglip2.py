"""SigLIP2 (and SigLIP) through open_clip: ViTs of timm whose attention pooling leads into the text space.

Dense features take the value path of that pooling, token by token: v = out_proj(W_v x), then
v + MLP(LN(v)) (paper, section 3). The pooling query and the keys play no part in them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones import open_clip_models
from spar_lightning.backbones.base import Backbone, TextTower
from spar_lightning.backbones.position_table import resized
from spar_lightning.errors import UserError
from spar_lightning.geometry import pad
from spar_lightning.packing import Grid, per_image
from spar_lightning.sliding_window import check_sides


class SigLIP2(Backbone):
    """A SigLIP or SigLIP2 vision tower of open_clip, dense by the value path of its pooling.

    Args:
        model: open_clip's name, such as ViT-B-16-SigLIP2-512 or ViT-SO400M-14-SigLIP2-378.
        pretrained: open_clip's tag of weights (downloaded once), the path of a file or folder with
            them, or null for random weights.
        tokenizer: Folder with the tokenizer's files, where there is no network; null takes it from the hub.
        text_pretrained: Tag or path of the text tower where `pretrained` is a student without one.
    """

    paper_geometry = staticmethod(pad)

    def __init__(
        self,
        model: str = "ViT-B-16-SigLIP2-512",
        pretrained: str | None = "webli",
        tokenizer: str | None = None,
        text_pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.pretrained, self.tokenizer = model, pretrained, tokenizer
        self.text_pretrained = text_pretrained or pretrained
        config = open_clip_models.model_config(model)
        if config["vision_cfg"].get("timm_pool") != "map":
            raise UserError(f"SigLIP2: {model} has no attention pooling. Give a model with SigLIP in its name.")
        self.visual = open_clip_models.vision_tower(model)
        self.patch_size = self.trunk.patch_embed.patch_size[0]
        self.grid: Grid = self.trunk.patch_embed.grid_size
        self.window = self.grid[0] * self.patch_size
        self.embed_dim = self.trunk.num_features
        known = open_clip_models.pretrained_config(model, pretrained)
        self.mean = known.get("mean", (0.5, 0.5, 0.5))
        self.std = known.get("std", (0.5, 0.5, 0.5))
        if pretrained is not None:
            self.load_vision_state_dict(open_clip_models.weights(model, pretrained))
        self.eval()

    @property
    def trunk(self) -> Any:
        """Timm's VisionTransformer."""
        return self.visual.trunk

    def embed(self, images: Tensor) -> Tensor:
        check_sides(images, self.patch_size)
        # The projection alone: the whole of timm's PatchEmbed refuses other sizes than the native.
        patches = self.trunk.patch_embed.proj(images)  # (B, D, h, w)
        positions = resized(self.trunk.pos_embed, (patches.shape[-2], patches.shape[-1]), self.grid)
        tokens: Tensor = patches.flatten(2).transpose(1, 2) + positions
        return tokens

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        lengths = [h * w for h, w in grids]
        for block in self.trunk.blocks[start:stop]:
            tokens = tokens + block.ls1(per_image(block.attn, block.norm1(tokens), lengths))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return tokens

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        pool, width = self.trunk.attn_pool, self.embed_dim
        values = F.linear(self.trunk.norm(tokens), pool.kv.weight[width:], pool.kv.bias[width:])
        values = pool.proj(values)
        features: Tensor = values + pool.mlp(pool.norm(values))
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        trunk, pool = self.trunk, self.trunk.attn_pool
        groups = {"patch_embed": list(trunk.patch_embed.parameters()), "pos_embed": [trunk.pos_embed]}
        for i, block in enumerate(trunk.blocks):
            groups[f"blocks.{i}"] = list(block.parameters())
            groups[f"blocks.{i}.mlp"] = list(block.mlp.parameters())
            groups[f"blocks.{i}.qkv"] = list(block.attn.qkv.parameters())
        head = [p for part in (pool.kv, pool.proj, pool.norm, pool.mlp) for p in part.parameters()]
        return {**groups, "norm": list(trunk.norm.parameters()), "head": head}

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())  # open_clip's names: visual.trunk. ..

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        open_clip_models.load_vision(self.visual, state_dict, self.pretrained or "the state dict", self.model)

    def build_text_tower(self) -> TextTower:
        return open_clip_models.text_tower(self.model, self.text_pretrained, self.tokenizer)
