"""Small networks that accept any class name, for tests with class names that `Tiny` was not trained on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from spar_lightning.backbones import OpenCLIP, Tiny
from spar_lightning.backbones.base import TextTower

open_clip.add_model_config(Path(__file__).parent / "data" / "ViT-Ti-16-test.json")


class AnyWords(Tiny):
    """`Tiny` with a pseudo-random text embedding for each prompt."""

    def build_text_tower(self) -> TextTower:
        """Return a function that maps prompts to vectors seeded by their hash."""

        def encode(prompts: Sequence[str]) -> Tensor:
            seeds = [int(hashlib.sha256(p.encode()).hexdigest()[:8], 16) for p in prompts]
            return torch.stack([torch.randn(128, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

        return encode


class SmallCLIP(OpenCLIP):
    """CLIP with two blocks of 32 channels.

    Args:
        pretrained: Path of a weight file; null uses random weights.
    """

    def __init__(self, pretrained: str | None = None) -> None:
        super().__init__("ViT-Ti-16-test", pretrained)
