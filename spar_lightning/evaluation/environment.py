"""Versions and hardware of an evaluation; they are reported, but not part of any hash."""

from importlib import metadata
from typing import Any

import torch
from lightning.fabric import Fabric

PACKAGES = ("spar-lightning", "torch", "lightning", "timm", "open_clip_torch", "transformers")


def environment(fabric: Fabric) -> dict[str, Any]:
    """Return package versions, device and number of ranks, and what else can affect the numerics.

    On CUDA these are the enabled attention kernels and the float32 matmul precision, otherwise the number of threads.
    """
    device = fabric.device
    facts: dict[str, Any] = {package: metadata.version(package) for package in PACKAGES}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts["processes"] = fabric.world_size
    if device.type == "cuda":
        cuda = torch.backends.cuda
        allowed = {
            "flash": cuda.flash_sdp_enabled(),
            "memory efficient": cuda.mem_efficient_sdp_enabled(),
            "cudnn": cuda.cudnn_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
        }
        facts["attention"] = ", ".join(name for name, on in allowed.items() if on)
        facts["float32_matmul"] = torch.get_float32_matmul_precision()  # "highest" disables TF32
    else:
        facts["threads"] = torch.get_num_threads()
    return facts
