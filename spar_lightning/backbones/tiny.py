"""Tiny backbone: a ViT with 1.3 M parameters and weights in the package, for the quickstart and the tests.

Tiny is a complete vision-language model: it has a learned absolute positional embedding, one training
resolution (64 px, see scripts/pretrain_tiny.py) and a text encoder over words for class names. Vision
parameters have timm's names: `vision_state_dict` can be loaded into timm's VisionTransformer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from spar_lightning.backbones.base import Backbone, Grid, TextTower
from spar_lightning.backbones.pos_embed import positions
from spar_lightning.backbones.weights import check_fit, read, skipped
from spar_lightning.errors import UserError, nearest
from spar_lightning.image.resize import check_sides


class UnknownWordError(UserError):
    """Error for a prompt with a word that is not in the vocabulary of the text encoder."""


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Apply attention to tokens (B, T, dim); `attend` is `Backbone.attend` for the grids of the images."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, dim/heads) each
        out: Tensor = self.proj(attend(q, k, v))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers to tokens (B, T, dim)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Apply the block to tokens (B, T, dim), with the same `attend` as `Attention`."""
        x = x + self.attn(self.norm1(x), attend)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """Patch embedding: a linear projection of each patch."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images: (B, 3, H, W) -> (B, dim, h, w)."""
        patches: Tensor = self.proj(images)
        return patches


class WordEncoder(nn.Module):
    """Text tower: word and positional embeddings, a transformer, and the mean over words."""

    max_words = 24

    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.words = _vocabulary()
        self._index = {word: i for i, word in enumerate(self.words, start=1)}  # 0 is padding
        self.token_embedding = nn.Embedding(len(self.words) + 1, dim, padding_idx=0)
        self.pos_embed = nn.Parameter(torch.randn(1, self.max_words, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return word indices (Q, words of the longest prompt), padded with 0.

        Case and the punctuation at words are ignored.
        """
        rows = [self._words(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def _words(self, prompt: str) -> list[int]:
        # A piece without a letter, such as an emoji, is an unknown word.
        words = [word for piece in prompt.lower().split() for word in re.findall(r"\w+", piece) or [piece]]
        if not 0 < len(words) <= self.max_words:
            raise UserError(f"Tiny accepts prompts of 1 to {self.max_words} words, but got {len(words)} in {prompt!r}.")
        for word in words:
            if word not in self._index:
                raise UnknownWordError(
                    f"Tiny does not know the word {word!r} of the class name or prompt {prompt!r}. "
                    f"{nearest(word, self.words)}"
                    f"Its {len(self.words)} words are listed in spar_lightning/backbones/tiny_words.txt. "
                    "For other words, use a backbone with a full text encoder."
                )
        return [self._index[word] for word in words]

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Return text embeddings (Q, d) of the prompts, without L2 normalization."""
        tokens = self.tokenize(prompts).to(self.pos_embed.device)
        x = self.token_embedding(tokens) + self.pos_embed[:, : tokens.shape[1]]
        x = self.norm(self.blocks(x, src_key_padding_mask=tokens == 0))
        present = (tokens > 0).unsqueeze(-1)
        out: Tensor = self.proj((x * present).sum(1) / present.sum(1))
        return out


class Tiny(Backbone):
    """Small ViT (patch 8, window 64) for the quickstart, with a text encoder for the words of the synthetic images.

    Args:
        pretrained: `scenes` for the weights in the package, path of a weight file with the same tensors, or
            null for random weights.
    """

    patch_size = 8
    window = 64
    embed_dim = 128
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    heads = 4
    windowable = True

    def __init__(self, pretrained: str | None = "scenes") -> None:
        super().__init__()
        dim, side = self.embed_dim, self.window // self.patch_size
        self.pretrained = pretrained
        self.patch_embed = PatchEmbed(self.patch_size, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, side**2, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, self.heads) for _ in range(6))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, dim)
        if pretrained is not None and not skipped():
            self.load_vision_state_dict(_weights(pretrained, "vision."))
        self.eval()

    def embed(self, images: Tensor) -> Tensor:
        check_sides(images, self.patch_size)
        tokens: Tensor = self.patch_embed(images)
        grid, side = (tokens.shape[-2], tokens.shape[-1]), self.window // self.patch_size
        return tokens.flatten(2).transpose(1, 2) + positions(self.pos_embed, grid, (side, side), self.windowed)

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        for block in self.blocks[start:stop]:
            tokens = block(tokens, partial(self.attend, grids=grids))
        return tokens

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        features: Tensor = self.head(self.norm(tokens))
        return features

    def final_norm(self) -> nn.Module:
        return self.norm

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {"patch_embed": list(self.patch_embed.parameters()), "pos_embed": [self.pos_embed]}
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            groups[f"blocks.{i}"] = list(block.parameters())
            groups[f"blocks.{i}.mlp"] = list(block.mlp.parameters())
            groups[f"blocks.{i}.qkv"] = list(block.attn.qkv.parameters())
        return {**groups, "norm": list(self.norm.parameters()), "head": list(self.head.parameters())}

    def vision_state_dict(self) -> dict[str, Tensor]:
        return dict(self.state_dict())

    def load_vision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        check_fit(state_dict, self.state_dict(), "The file", "Tiny")
        self.load_state_dict(state_dict)

    def random_weights(self) -> str | None:
        return "Set pretrained to scenes or a path." if self.pretrained is None else None

    def licence(self) -> str:
        return "Apache-2.0, the license of spar_lightning. The base weights are part of that package."

    def build_text_tower(self) -> TextTower:
        tower = WordEncoder(self.embed_dim, self.heads, depth=1)
        if self.pretrained is not None:
            tensors = _weights(self.pretrained, "text.")
            check_fit(tensors, tower.state_dict(), self.pretrained, "the text encoder of Tiny")
            tower.load_state_dict(tensors)
        return tower.eval().requires_grad_(False)


def _vocabulary() -> list[str]:
    return resources.files(__package__).joinpath("tiny_words.txt").read_text(encoding="ascii").split()


def _weights(source: str, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one tower, from the package or from a file; all tensors if the file has one tower."""
    if source == "scenes":
        with resources.as_file(resources.files(__package__).joinpath("tiny.safetensors")) as path:
            tensors = load_file(path)
    elif Path(source).is_file():
        tensors = read(source)
    else:
        raise UserError(
            f"Tiny(pretrained={source!r}): no such file. Allowed: 'scenes' (the weights in the package), "
            "the path of a weight file with the same tensors, or null for random weights."
        )
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return inside or tensors
