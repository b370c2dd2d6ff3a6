"""Images as bytes and as tensors (3, H, W) uint8."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def encode_image(image: Tensor) -> bytes:
    """Lossless PNG bytes of an image (3, H, W) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def decode_image(content: bytes) -> Tensor:
    """Image (3, H, W) uint8 from the bytes of any format that Pillow reads; OSError where they are damaged."""
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
