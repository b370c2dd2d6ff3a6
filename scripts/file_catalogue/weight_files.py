"""Weights and weight files that the cases of the catalogue are made of."""

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from spar_lightning.backbones import Tiny

Tensors = Mapping[str, Tensor]
SMALL_CLIP = Path(__file__).parents[2] / "tests" / "data" / "ViT-Ti-16-test.json"
TINY = "model: {backbone: spar_lightning.backbones.Tiny, templates: ['{}'], stride: 32}\n"
HEADER = {"backbone": "spar_lightning.backbones.Tiny", "templates": ["{}"]}


@cache
def tiny() -> Tensors:
    """Return vision weights of Tiny that differ from the bundled ones."""
    torch.manual_seed(1)
    return {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in Tiny().vision_state_dict().items()}


@cache
def clip() -> Tensors:
    """Return the state dict of a small CLIP with random weights."""
    open_clip.add_model_config(SMALL_CLIP)
    torch.manual_seed(2)
    return dict(open_clip.create_model("ViT-Ti-16-test").state_dict())


def torch_bytes(content: Any, **options: Any) -> bytes:
    """Return the bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """Return tensors with a prefix in front of their names."""
    return {prefix + name: tensor.clone().contiguous() for name, tensor in tensors.items()}
