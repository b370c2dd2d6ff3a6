"""Conversion of user input (path, PIL image, array or tensor) to an image tensor (3, H, W) uint8."""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.files.home import expand_home
from spar_lightning.image.codec import ImageError, decode_image, from_pillow
from spar_lightning.image.resize import at_most

ImageLike = str | Path | Image.Image | NDArray[np.generic] | Tensor


def as_pixels(image: ImageLike, max_side: int | None = None) -> Tensor:
    """Convert user input to an image tensor (3, H, W) uint8.

    Args:
        image: One of:

            - a path or a PIL image; the EXIF orientation is applied
            - an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); alpha is dropped
            - a tensor (3, H, W)

            Arrays and tensors contain uint8, uint16, or floating-point values from 0 to 1.
        max_side: Maximum long side in pixels; larger images are shrunk. None sets no limit.

    Raises:
        ImageError: The file does not exist or cannot be decoded, or the range of its pixel values is unknown.
        UserError: The type of the input, or the shape, dtype or range of its values is not supported.
    """
    if isinstance(image, str | Path):
        path = Path(expand_home(image))
        if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
            raise ImageError(f"No such image file: {path}. Pass the path of a file, a PIL image, an array or a tensor.")
        try:
            with path.open("rb") as file:
                return decode_image(file, upright=True, name=str(path), max_side=max_side)
        except (ImageError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ImageError(f"{path} cannot be read as an image: {reason}.") from error
    if isinstance(image, Image.Image):
        try:
            return from_pillow(image, upright=True, max_side=max_side)
        except (ValueError, OSError) as error:  # the file behind it is damaged, or its mode has no conversion to RGB
            raise ImageError(f"The PIL image (mode {image.mode}) cannot be converted to RGB: {error}.") from error
    pixels = _of_values(image)
    return pixels if max_side is None else at_most(pixels, max_side)


def _of_values(image: NDArray[np.generic] | Tensor) -> Tensor:
    if isinstance(image, np.ndarray):
        return _of_array(image)
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise UserError(
                f"Image tensors must have shape (3, H, W), but got {tuple(image.shape)}. An array may be (H, W, 3)."
            )
        return _in_bytes(image)
    raise UserError(f"Images must be a path, a PIL image, an array or a tensor, but got {type(image).__name__}.")


def _of_array(array: NDArray[np.generic]) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise UserError(
            f"Image arrays must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), but got {array.shape}. "
            "Pass one image at a time, with the channels last."
        )
    kind = array.dtype.newbyteorder("=")  # torch has no other byte order, and no longdouble
    if not (kind in (np.uint8, np.uint16) or np.issubdtype(kind, np.floating)):
        raise UserError(_TYPES.format(array.dtype))
    colours = array[..., :3].astype(np.float64 if kind == np.longdouble else kind, order="C")
    return _in_bytes(torch.from_numpy(colours).permute(2, 0, 1).expand(3, -1, -1).contiguous())


def _in_bytes(pixels: Tensor) -> Tensor:
    """Convert pixels of a supported dtype to uint8."""
    if pixels.layout != torch.strided or pixels.is_meta:
        raise UserError(
            f"Image tensors must be dense and contain values, but got the layout {pixels.layout} on the device "
            f"{pixels.device}. Call to_dense() first."
        )
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.uint16:
        return (pixels.to(torch.int32) >> 8).to(torch.uint8)
    if not pixels.is_floating_point():
        raise UserError(_TYPES.format(pixels.dtype))
    pixels = pixels.float() if pixels.itemsize == 1 else pixels  # fp8 has no comparisons
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):  # False for NaN, too
        low, high = pixels.min().item(), pixels.max().item()
        raise UserError(
            f"Floating-point pixels must be from 0 to 1, but got {low:.4g} to {high:.4g}. Divide by the "
            "maximum (such as 255), or undo the normalization by mean and std, which is done internally."
        )
    return (pixels.float() * 255).round().to(torch.uint8)


_TYPES = "Pixels must be uint8, uint16, or floating point from 0 to 1, but got {}."
