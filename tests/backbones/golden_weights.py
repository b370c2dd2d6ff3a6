"""Deterministic weights and images for features.safetensors; values depend only on names, not on RNG order."""

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def _normal(name: str, shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def open_clip_value(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the value of parameter `name` (as in open_clip, e.g. visual.trunk.blocks.0.norm1.weight)."""
    v = _normal(name, shape)
    if v.ndim <= 1:
        return 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    if "pos" in name:
        return 0.3 * v
    return torch.as_tensor(v / v[0].numel() ** 0.5)


def dinov3_value(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the value of tensor `name` of the official dino.txt model (names and shapes: dinov3_txt_keys.json)."""
    if name.endswith("periods"):
        periods: torch.Tensor = (100.0 ** (torch.arange(shape[0]).float() / shape[0])).bfloat16().float()
        return periods
    if name.endswith("bias_mask"):
        mask = torch.ones(tuple(shape))
        mask[shape[0] // 3 : 2 * shape[0] // 3] = 0
        return mask
    v = _normal(name, shape)
    if name.endswith("gamma"):
        return 0.3 + 0.1 * v
    if ("norm" in name or "ln_" in name) and name.endswith("weight"):
        return 1 + 0.1 * v
    if name.endswith("bias"):
        return 0.1 * v
    if name.endswith("weight") and v.ndim >= 2 and "embedding" not in name:
        return torch.as_tensor(v / v[0].numel() ** 0.5)
    return 0.05 * v


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return a smooth random image (1, 3, height, width) in [-1, 1], already normalized for the network."""
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, 3, height, width)
    for k in (4, 8, 16, 32, 64):
        coarse = torch.randn(1, 3, max(2, height // k), max(2, width // k), generator=g)
        x += F.interpolate(coarse, (height, width), mode="bilinear")
    return torch.as_tensor((x / 3).clamp(-1, 1))
