"""Arrays, tensors and PIL images in the Python API: dtypes, layouts, byte orders and value ranges."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.file_catalogue.case import Case, Same
from scripts.file_catalogue.picture import RGB, saved, scene, stacked
from scripts.file_catalogue.pictures import image_gray
from spar_lightning.image.inputs import as_pixels

IMAGE = scene(31, 47)
BYTES = IMAGE.astype(np.float64)

# Arrays with the values of IMAGE. A value of 16 bits loses its lower byte, a float is rounded to 8 bits.
DTYPES: dict[str, Any] = {
    "uint8": IMAGE,
    "uint16": IMAGE.astype(np.uint16) * 257,
    "float16": (BYTES / 255).astype(np.float16),
    "float32": (BYTES / 255).astype(np.float32),
    "float64": BYTES / 255,
    "longdouble": (BYTES / 255).astype(np.longdouble),
    "big-endian uint16": (IMAGE.astype(np.uint16) * 257).astype(">u2"),
    "big-endian float32": (BYTES / 255).astype(">f4"),
    "big-endian float64": (BYTES / 255).astype(">f8"),
}
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "contiguous": np.ascontiguousarray,
    "Fortran order": np.asfortranarray,
    "transposed view": lambda array: np.ascontiguousarray(array.transpose(1, 0, 2)).transpose(1, 0, 2),
    "step 2 view": lambda array: np.repeat(array, 2, 1)[:, ::2],
    "negative strides": lambda array: np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
    "read-only": lambda array: _read_only(array),
    "masked": lambda array: np.ma.masked_array(array, mask=np.zeros(array.shape, bool)),
    "memory map": lambda array: _mapped(array),
}
CHANNELS: dict[str, Callable[[Any], tuple[Any, RGB]]] = {
    "H x W x 3": lambda array: (array, IMAGE),
    "H x W": lambda array: (array[..., 0], stacked(IMAGE[..., 0])),
    "H x W x 1": lambda array: (array[..., :1], stacked(IMAGE[..., 0])),
    "H x W x 4": lambda array: (np.concatenate([array, array[..., :1]], -1), IMAGE),
}
WRONG: dict[str, Any] = {
    "int64": IMAGE.astype(np.int64),
    "int8": (IMAGE >> 1).astype(np.int8),
    "uint32": IMAGE.astype(np.uint32),
    "bool": IMAGE > 127,
    "complex": IMAGE.astype(complex),
    "object": IMAGE.astype(object),
    "text": np.array([["a", "b"]]),
    "structured": np.zeros((4, 4), [("r", "u1"), ("g", "u1")]),
    "float 0 to 255": BYTES,
    "float -1 to 1": BYTES / 127.5 - 1,
    "NaN": np.where(IMAGE > 250, np.nan, BYTES / 255),
    "infinity": np.where(IMAGE > 100, np.inf, BYTES / 255),
    "3 x H x W": IMAGE.transpose(2, 0, 1),
    "H x W x 2": IMAGE[..., :2],
    "H x W x 5": np.repeat(IMAGE[..., :1], 5, -1),
    "batch": IMAGE[None],
    "one dimension": IMAGE.reshape(-1),
    "no pixels": IMAGE[:0],
    "scalar": np.uint8(3),
    "list": IMAGE.tolist(),
    "bytes": IMAGE.tobytes(),
    "None": None,
    "number": 7,
    "open file": io.BytesIO(saved(Image.fromarray(IMAGE), "png")),
    "tensor H x W x 3": torch.from_numpy(IMAGE.copy()),
    "tensor batch": torch.zeros(1, 3, 8, 8),
    "tensor H x W": torch.zeros(8, 8),
    "tensor without pixels": torch.zeros(3, 0, 8),
    "tensor int64": torch.zeros(3, 8, 8, dtype=torch.int64),
    "tensor bool": torch.zeros(3, 8, 8, dtype=torch.bool),
    "tensor complex": torch.zeros(3, 8, 8, dtype=torch.complex64),
    "tensor float 0 to 255": torch.full((3, 8, 8), 255.0),
    "tensor NaN": torch.full((3, 8, 8), float("nan")),
    "tensor sparse": torch.ones(3, 8, 8).to_sparse(),
    "tensor meta": torch.zeros(3, 8, 8, device="meta"),
}


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    for dtype, array in DTYPES.items():
        for layout, arranged in LAYOUTS.items():
            for shape, channels in CHANNELS.items():
                given, expected = channels(array)
                name = f"array {dtype}, {layout}, {shape}"
                if layout == "transposed view" and given.ndim == 2:
                    continue
                yield _case(name, partial(arranged, given), expected, 1 if "16" in dtype else 0)
    yield from _tensors()
    yield from _pictures()
    for name, value in WRONG.items():
        error = ("bytes",) if name == "bytes" else ()
        yield Case("arrays", f"wrong: {name}", partial(_given, partial(_itself, value)), None, error)


def _case(name: str, make: Callable[[], Any], expected: RGB | None, most: int = 0, either: bool = False) -> Case:
    right = None if expected is None else Same(expected, most)
    return Case("arrays", name, partial(_given, make), right, () if either or expected is None else None)


def _given(make: Callable[[], Any], folder: Path) -> torch.Tensor:
    return as_pixels(make())


def _itself(value: Any) -> Any:
    return value


def _read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


def _mapped(array: Any) -> Any:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    buffer.seek(0)
    loaded = np.load(buffer)
    loaded.flags.writeable = False
    return loaded.view(np.ndarray)


def _tensors() -> Iterator[Case]:
    channels = torch.from_numpy(IMAGE.transpose(2, 0, 1).copy())
    floats = channels.double() / 255
    made: dict[str, tuple[torch.Tensor, int]] = {
        "uint8": (channels, 0),
        "uint16": ((channels.int() * 257).to(torch.uint16), 0),
        "float16": (floats.half(), 0),
        "bfloat16": (floats.bfloat16(), 1),
        "float32": (floats.float(), 0),
        "float64": (floats, 0),
    }
    for dtype, (tensor, most) in made.items():
        layouts = {
            "contiguous": tensor,
            "channels last": tensor[None].contiguous(memory_format=torch.channels_last)[0],
            "expanded": tensor[:, :1].expand(3, 31, 47),
            "view with step": tensor.repeat_interleave(2, 2)[..., ::2],
            "conj/neg view": tensor.clone(),
        }
        for layout, value in layouts.items():
            expected = np.ascontiguousarray(np.broadcast_to(IMAGE[:1], IMAGE.shape)) if layout == "expanded" else IMAGE
            yield _case(f"tensor {dtype}, {layout}", partial(_itself, value), expected, most)
        if tensor.is_floating_point():
            tracked = tensor.clone().requires_grad_()
            yield _case(f"tensor {dtype}, requires_grad", partial(_itself, tracked), IMAGE, most)
            yield _case(f"tensor {dtype}, from a graph", partial(_itself, tracked * 1), IMAGE, most)
    eighths = torch.full((3, 4, 4), 0.5).to(torch.float8_e4m3fn)
    yield _case("tensor float8", lambda: eighths, np.full((4, 4, 3), 128, np.uint8), 1, either=True)


def _pictures() -> Iterator[Case]:
    """Yield PIL images of all modes; a mode is right if it shows the colors, with naive conversions of the mode."""
    whole = Image.fromarray(IMAGE)
    gray = stacked(IMAGE[..., 0])
    channel = Image.fromarray(IMAGE[..., 0])
    wide = IMAGE[..., 0].astype(np.uint16) * 257
    colors = whole.quantize(64)
    transparent = whole.quantize(64)
    transparent.info["transparency"] = 3
    made: dict[str, tuple[Callable[[], Image.Image], RGB | None, int, bool]] = {
        "RGB": (lambda: whole, IMAGE, 0, False),
        "L": (lambda: channel, gray, 0, False),
        "1": (lambda: Image.fromarray(IMAGE[..., 0] > 127), stacked((IMAGE[..., 0] > 127) * 255), 0, False),
        "P": (lambda: colors, np.array(colors.convert("RGB")), 0, False),
        "P with transparency": (lambda: transparent, np.array(colors.convert("RGB")), 0, False),
        "RGBA": (lambda: whole.convert("RGBA"), IMAGE, 0, False),
        "RGBX": (lambda: whole.convert("RGBX"), IMAGE, 0, False),
        "RGBa": (lambda: whole.convert("RGBA").convert("RGBa"), IMAGE, 0, True),
        "LA": (lambda: channel.convert("LA"), gray, 0, False),
        "La": (lambda: channel.convert("LA").convert("La"), gray, 0, True),
        "PA": (lambda: colors.convert("PA"), np.array(colors.convert("RGB")), 0, True),
        "CMYK": (lambda: whole.convert("CMYK"), IMAGE, 1, False),
        "YCbCr": (lambda: whole.convert("YCbCr"), IMAGE, 4, False),
        "HSV": (lambda: whole.convert("HSV"), IMAGE, 16, True),
        "I;16": (lambda: Image.fromarray(wide), gray, 1, False),
        "I;16B": (lambda: Image.frombytes("I;16B", (47, 31), wide.astype(">u2").tobytes()), gray, 1, True),
        "I": (lambda: channel.convert("I"), None, 0, True),
        "F": (lambda: channel.convert("F"), None, 0, True),
        "lazy crop": (lambda: whole.crop((3, 2, 20, 19)), IMAGE[2:19, 3:20], 0, False),
        "from an open file": (lambda: Image.open(io.BytesIO(saved(whole, "png"))), IMAGE, 0, False),
        "truncated file": (lambda: Image.open(io.BytesIO(saved(whole, "png")[:-300])), None, 0, True),
        "closed": (lambda: _closed(whole), None, 0, True),
        "0 x 0": (lambda: Image.new("RGB", (0, 0)), None, 0, True),
        "0 x 5": (lambda: Image.new("RGB", (0, 5)), None, 0, True),
    }
    for name, (make, expected, most, either) in made.items():
        yield _case(f"PIL {name}", make, expected, most, either)
    luma = Image.fromarray(IMAGE).convert("L")
    yield _case("PIL luma", lambda: luma, stacked(image_gray(IMAGE)), 1)


def _closed(image: Image.Image) -> Image.Image:
    other = image.copy()
    other.close()
    return other
