"""Plain ViTs of timm as a backbone of spar-lightning: patch tokens after the final norm."""

import torch

from spar_lightning.backbones import Backbone
from spar_lightning.backbones.position_table import resized
from spar_lightning.backbones.weights import check_fit
from spar_lightning.errors import UserError
from spar_lightning.packing import patch_tokens, per_image
from spar_lightning.sliding_window import check_sides


class TimmViT(Backbone):
    """A VisionTransformer of timm with a class token and learned positions.

    Args:
        model: timm's name, such as vit_small_patch16_224.
        pretrained: Whether to download timm's weights; otherwise they are random.
    """

    def __init__(self, model: str = "vit_tiny_patch16_224", pretrained: bool | None = None) -> None:
        import timm  # here, so that `spar` starts fast where another backbone runs

        super().__init__()
        self.vit = timm.create_model(model, pretrained=bool(pretrained), num_classes=0)
        self.patch_size, self.grid = self.vit.patch_embed.patch_size[0], self.vit.patch_embed.grid_size
        self.window, self.embed_dim = self.grid[0] * self.patch_size, self.vit.num_features
        self.mean, self.std = self.vit.pretrained_cfg["mean"], self.vit.pretrained_cfg["std"]
        self.eval()

    def embed(self, images):
        check_sides(images, self.patch_size)
        patches, table = self.vit.patch_embed.proj(images), self.vit.pos_embed
        tokens = patches.flatten(2).transpose(1, 2) + resized(table[:, 1:], patches.shape[-2:], self.grid)
        return torch.cat([(self.vit.cls_token + table[:, :1]).expand(len(images), -1, -1), tokens], dim=1)

    def run_blocks(self, tokens, grids, start=0, stop=None):
        for block in self.vit.blocks[start:stop]:
            tokens = tokens + block.ls1(per_image(block.attn, block.norm1(tokens), [1 + h * w for h, w in grids]))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return tokens

    def project(self, tokens, grids):
        return self.vit.norm(patch_tokens(tokens, grids, prefix=1))

    def parameter_groups(self):
        vit = self.vit
        groups = {
            "patch_embed": [*vit.patch_embed.parameters()],
            "pos_embed": [vit.pos_embed],
            "prefix": [vit.cls_token],
        }
        for i, block in enumerate(vit.blocks):
            groups[f"blocks.{i}"] = [*block.parameters()]
            groups[f"blocks.{i}.mlp"] = [*block.mlp.parameters()]
            groups[f"blocks.{i}.qkv"] = [*block.attn.qkv.parameters()]
        return {**groups, "norm": [*vit.norm.parameters()]}

    def vision_state_dict(self):
        return dict(self.vit.state_dict())

    def load_vision_state_dict(self, state_dict):
        check_fit(state_dict, self.vit.state_dict(), "the state dict", "TimmViT")
        self.vit.load_state_dict(state_dict)

    def build_text_tower(self):
        raise UserError("TimmViT has no text encoder: it cannot be judged by class names.")
