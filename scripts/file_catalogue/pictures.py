"""Writers of image files with known pixels: formats x modes x bit depths.

Each writer returns the pixels (H, W, 3) that the file shows, and how far a decoder may be off.
"""

import io
import struct
import zlib
from functools import partial
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms

from scripts.file_catalogue.picture import RGB, Picture, Writer, saved, stacked
from scripts.file_catalogue.png import chunk, packed_bits, png


def _gray_png(bits: int, interlaced: bool, image: RGB) -> Picture:
    wide = image[..., 0].astype(np.int64)
    values = (wide * 257 if bits == 16 else wide >> (8 - bits))[..., None]
    shown = stacked(values[..., 0] >> 8 if bits == 16 else values[..., 0] * (255 // (2**bits - 1)))
    return Picture(png(values, 0, bits, interlaced=interlaced), shown, most=int(bits == 16))


def _palette_png(bits: int, transparent: bool, image: RGB) -> Picture:
    colors = np.random.default_rng(bits).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    values = image[..., :1] >> (8 - bits)
    before = chunk(b"PLTE", colors.tobytes()) + (chunk(b"tRNS", bytes([0, 128][: 2**bits])) if transparent else b"")
    return Picture(png(values, 3, bits, before), colors[values[..., 0]])


def _color_png(color: int, bits: int, image: RGB, before: bytes = b"", after: bytes = b"") -> Picture:
    alpha = 255 - image[..., 1:2]
    values = {2: image, 6: np.concatenate([image, alpha], -1), 4: np.concatenate([image[..., :1], alpha], -1)}[color]
    shown = stacked(image[..., 0]) if color == 4 else image
    wide = values.astype(np.int64) * 257 if bits == 16 else values
    return Picture(png(wide, color, bits, before, after), shown, most=int(bits == 16))


def _dark_png(bits: int, channels: int, image: RGB) -> Picture:
    """Return a 16-bit PNG with values of fewer bits, as scientific cameras write them."""
    values = image[..., :channels].astype(np.int64) << (bits - 8)
    shown = values >> 8
    shown = np.repeat(shown, 3, -1) if channels == 1 else shown
    return Picture(png(values, 0 if channels == 1 else 2, 16), shown.astype(np.uint8), most=1, lost=True)


def _with_text(size: int, compressed: bool, image: RGB) -> Picture:
    text = b"Comment\0" + (b"\0" + zlib.compress(b"x" * size) if compressed else b"x" * size)
    return _color_png(2, 8, image, chunk(b"zTXt" if compressed else b"tEXt", text))


def _with_profile(size: int, image: RGB) -> Picture:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + b"\0" * size
    return _color_png(2, 8, image, chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(profile)))


def _apng(image: RGB) -> Picture:
    frames = [Image.fromarray(image), Image.fromarray(255 - image)]
    return Picture(saved(frames[0], "png", save_all=True, append_images=frames[1:]), image, lost=True)


def _transparent_gray(image: RGB) -> Picture:
    values = image[..., :1]
    return Picture(png(values, 0, 8, chunk(b"tRNS", b"\0\x05")), stacked(values[..., 0]))


def _lossy(kind: str, mean: float, image: RGB, mode: str = "RGB", **options: Any) -> Picture:
    given = Image.fromarray(image).convert(mode)
    shown = stacked(image_gray(image)) if mode == "L" else image
    if kind == "jpeg":
        options = {"quality": 95, "subsampling": 0 if mode != "L" else -1, **options}
    return Picture(saved(given, kind, **options), shown, most=90, mean=mean)


def image_gray(image: RGB) -> NDArray[Any]:
    """Return luma (H, W) of an image by ITU-R 601, as Pillow and cameras compute it."""
    luma: NDArray[Any] = np.round(image @ np.array([0.299, 0.587, 0.114]))
    return luma


def _cmyk_jpeg(black: int, image: RGB) -> Picture:
    ink = np.concatenate([255 - image, np.full((*image.shape[:2], 1), black, np.uint8)], -1)
    shown = (image.astype(np.int64) * (255 - black) + 127) // 255
    content = saved(Image.fromarray(ink, "CMYK"), "jpeg", quality=95, subsampling=0)
    return Picture(content, shown.astype(np.uint8), most=60, mean=6)


def _pillow(kind: str, mode: str, image: RGB, most: int = 0, **options: Any) -> Picture:
    """Return a lossless file of a mode that Pillow writes."""
    given = Image.fromarray(image)
    if mode == "L":
        given, shown = Image.fromarray(image[..., 0]), stacked(image[..., 0])
    elif mode == "1":
        bright = image[..., 0] > 127
        given, shown = Image.fromarray(bright), stacked(bright * 255)
    elif mode == "P":
        given = given.quantize(64)
        shown = np.array(given.convert("RGB"))
    elif mode == "LA":
        alpha = Image.fromarray(255 - image[..., 1])
        given, shown = Image.merge("LA", (Image.fromarray(image[..., 0]), alpha)), stacked(image[..., 0])
    elif mode == "RGBA":
        given, shown = Image.fromarray(np.concatenate([image, 255 - image[..., :1]], -1)), image
    else:
        shown = image
    return Picture(saved(given, kind, **options), shown, most)


def _frames(kind: str, image: RGB, **options: Any) -> Picture:
    first = Image.fromarray(image)
    if kind == "gif":
        first = first.quantize(128)
    others = [Image.fromarray(255 - image)]
    shown = np.array(first.convert("RGB"))
    return Picture(saved(first, kind, save_all=True, append_images=others, **options), shown, lost=True)


def _mpo(image: RGB) -> Picture:
    first, second = Image.fromarray(image), Image.fromarray(255 - image)
    content = saved(first, "mpo", save_all=True, append_images=[second], quality=95, subsampling=0)
    return Picture(content, image, most=60, mean=4)


def _ico(image: RGB) -> Picture:
    """Return an icon of two sizes; the larger one counts."""
    side = min(image.shape[0], image.shape[1], 128)
    square = Image.fromarray(np.ascontiguousarray(image[:side, :side]))
    sizes = [(side, side)] if side < 32 else [(16, 16), (side, side)]
    return Picture(saved(square, "ico", sizes=sizes), image[:side, :side])


def _tiff(image: RGB, lost: bool = False, most: int = 0, shown: RGB | None = None, **options: Any) -> Picture:
    """Return a TIFF written by tifffile, which stores what it is given."""
    buffer = io.BytesIO()
    values = options.pop("values", image)
    tifffile.imwrite(buffer, values, **options)
    return Picture(buffer.getvalue(), image if shown is None else shown, most, lost=lost)


def _tiff_gray(image: RGB, inverted: bool = False, **options: Any) -> Picture:
    gray = image[..., 0]
    kind = "miniswhite" if inverted else "minisblack"
    return _tiff(image, values=255 - gray if inverted else gray, shown=stacked(gray), photometric=kind, **options)


def _tiff_bits(bits: int, inverted: bool, image: RGB) -> Picture:
    """Return a gray TIFF with few bits per pixel, written by hand."""
    values = image[..., 0] >> (8 - bits)
    shown = stacked(values.astype(np.int64) * (255 // (2**bits - 1)))
    stored = (2**bits - 1 - values) if inverted else values
    data = b"".join(packed_bits(row, bits) for row in stored.astype(np.int64))
    return Picture(tiff_file(image.shape[0], image.shape[1], bits, 0 if inverted else 1, data), shown)


def tiff_file(height: int, width: int, bits: int, photometric: int, data: bytes, extra: dict[int, int] = {}) -> bytes:  # noqa: B006
    """Return a TIFF of one strip with one sample per pixel."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags |= extra
    padded = data + b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    header = struct.pack("<2sHI", b"II", 42, 8 + len(padded))
    return header + padded + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def _tiff16(image: RGB, kind: str, **options: Any) -> Picture:
    wide = image.astype(np.uint16) * 257
    gray = kind == "gray"
    values = wide[..., 0] if gray else wide
    return _tiff(
        image,
        values=values,
        shown=stacked(image[..., 0]) if gray else image,
        most=1,
        photometric="minisblack" if gray else "rgb",
        **options,
    )


def _unknown_range(dtype: str, image: RGB) -> Picture:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, (image[..., 0] / 255).astype(dtype), photometric="minisblack")
    return Picture(buffer.getvalue(), None)


def _portable(kind: str, maximum: int, image: RGB) -> Picture:
    """Return a PGM or PPM with any largest value."""
    values = np.round((image[..., :1] if kind == "P5" else image) / 255 * maximum).astype(np.int64)
    shown = np.round(values / maximum * 255).astype(np.uint8)
    header = f"{kind}\n{image.shape[1]} {image.shape[0]}\n{maximum}\n".encode()
    raw = values.astype(">u2" if maximum > 255 else np.uint8).tobytes()
    return Picture(header + raw, np.repeat(shown, 3, -1) if kind == "P5" else shown, most=1)


def _portable_text(image: RGB) -> Picture:
    header = f"P3\n# by hand\n{image.shape[1]} {image.shape[0]}\n255\n"
    return Picture((header + " ".join(map(str, image.reshape(-1).tolist())) + "\n").encode(), image)


def _portable_bits(image: RGB) -> Picture:
    dark = image[..., 0] < 128
    header = f"P4\n{image.shape[1]} {image.shape[0]}\n".encode()
    return Picture(header + np.packbits(dark, axis=1).tobytes(), stacked(~dark * 255))


def _float_map(image: RGB) -> Picture:
    header = f"Pf\n{image.shape[1]} {image.shape[0]}\n-1.0\n".encode()
    return Picture(header + (image[::-1, :, 0] / 255).astype("<f4").tobytes(), None)


def _bmp(bits: int, image: RGB) -> Picture:
    """Return a BMP with 4 or 16 bits per pixel, which Pillow does not write."""
    height, width = image.shape[:2]
    if bits == 4:
        colors = np.random.default_rng(4).integers(0, 256, (16, 3), dtype=np.uint8)
        values = image[..., 0] >> 4
        shown, table = colors[values], np.pad(colors[:, ::-1], ((0, 0), (0, 1))).tobytes()
        rows = [packed_bits(row.astype(np.int64), 4) for row in values]
    else:  # five bits per color
        five = image.astype(np.int64) >> 3
        shown, table = (five * 255 // 31).astype(np.uint8), b""
        rows = [row.astype("<u2").tobytes() for row in (five[..., 0] << 10) | (five[..., 1] << 5) | five[..., 2]]
    data = b"".join(row + b"\0" * (-len(row) % 4) for row in reversed(rows))
    start = 54 + len(table)
    header = struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(data), 2835, 2835, 0, 0)
    return Picture(header + info + table + data, shown, most=1)


def _top_down_bmp(image: RGB) -> Picture:
    height, width = image.shape[:2]
    data = b"".join(row[:, ::-1].tobytes() + b"\0" * (-3 * width % 4) for row in image)
    header = struct.pack("<2sIHHI", b"BM", 54 + len(data), 0, 0, 54)
    return Picture(
        header + struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 24, 0, len(data), 0, 0, 0, 0) + data, image
    )


def _psd(image: RGB) -> Picture:
    """Return a Photoshop file without layers."""
    height, width = image.shape[:2]
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, height, width, 8, 3)
    return Picture(header + b"\0" * 12 + b"\0\0" + image.transpose(2, 0, 1).tobytes(), image)


def _sun(image: RGB) -> Picture:
    height, width = image.shape[:2]
    data = b"".join(row[:, ::-1].tobytes() + b"\0" * (3 * width % 2) for row in image)
    return Picture(struct.pack(">8I", 0x59A66A95, width, height, 24, len(data), 1, 0, 0) + data, image)


WRITERS: dict[str, tuple[str, Writer]] = {
    **{f"png gray {bits} bit": (".png", partial(_gray_png, bits, False)) for bits in (1, 2, 4, 8, 16)},
    **{f"png gray {bits} bit interlaced": (".png", partial(_gray_png, bits, True)) for bits in (1, 4, 8, 16)},
    **{f"png palette {bits} bit": (".png", partial(_palette_png, bits, False)) for bits in (1, 2, 4, 8)},
    **{f"png palette {bits} bit tRNS": (".png", partial(_palette_png, bits, True)) for bits in (1, 8)},
    **{f"png color type {c}, {b} bit": (".png", partial(_color_png, c, b)) for c in (2, 4, 6) for b in (8, 16)},
    **{f"png 16 bit with {b} bit gray": (".png", partial(_dark_png, b, 1)) for b in (10, 12)},
    **{f"png 16 bit with {b} bit RGB": (".png", partial(_dark_png, b, 3)) for b in (10, 12)},
    "png gray tRNS": (".png", _transparent_gray),
    "png gAMA": (".png", lambda image: _color_png(2, 8, image, chunk(b"gAMA", struct.pack(">I", 100000)))),
    "png unknown chunk": (".png", lambda image: _color_png(2, 8, image, chunk(b"spAr", b"x"))),
    "png text 2 MB": (".png", partial(_with_text, 2 << 20, False)),
    "png compressed text 2 MB": (".png", partial(_with_text, 2 << 20, True)),
    "png text 2 MB at the end": (
        ".png", lambda image: _color_png(2, 8, image, after=chunk(b"tEXt", b"Comment\0" + b"x" * (2 << 20)))
    ),
    "png profile": (".png", partial(_with_profile, 0)),
    "png profile 2 MB": (".png", partial(_with_profile, 2 << 20)),
    "apng": (".png", _apng),
    "jpeg": (".jpg", partial(_lossy, "jpeg", 3)),
    "jpeg 4:2:0": (".jpg", partial(_lossy, "jpeg", 6, subsampling=2)),
    "jpeg progressive": (".jpg", partial(_lossy, "jpeg", 3, progressive=True)),
    "jpeg gray": (".jpg", partial(_lossy, "jpeg", 3, mode="L")),
    "jpeg profile": (".jpg", partial(_lossy, "jpeg", 3, icc_profile=b"\0" * 70000)),
    "jpeg restart markers": (".jpg", partial(_lossy, "jpeg", 3, restart_marker_rows=1)),
    "jpeg CMYK": (".jpg", partial(_cmyk_jpeg, 0)),
    "jpeg CMYK black": (".jpg", partial(_cmyk_jpeg, 100)),
    "mpo": (".jpg", _mpo),
    "webp lossy": (".webp", partial(_lossy, "webp", 9, quality=95)),
    "webp lossless": (".webp", partial(_pillow, "webp", "RGB", lossless=True)),
    "webp lossless RGBA": (".webp", partial(_pillow, "webp", "RGBA", lossless=True, exact=True)),
    "webp animated": (".webp", partial(_frames, "webp", lossless=True)),
    "avif": (".avif", partial(_lossy, "avif", 5, quality=95, subsampling="4:4:4")),
    "avif gray": (".avif", partial(_lossy, "avif", 5, mode="L", quality=95)),
    "jpeg 2000 lossless": (".jp2", partial(_pillow, "jpeg2000", "RGB", irreversible=False)),
    "jpeg 2000 gray": (".jp2", partial(_pillow, "jpeg2000", "L", irreversible=False)),
    "jpeg 2000 RGBA": (".jp2", partial(_pillow, "jpeg2000", "RGBA", irreversible=False)),
    "jpeg 2000 lossy": (
        ".jp2", partial(_lossy, "jpeg2000", 8, irreversible=True, quality_mode="dB", quality_layers=[45])
    ),
    "jpeg 2000 codestream": (".j2k", partial(_pillow, "jpeg2000", "RGB", irreversible=False, no_jp2=True)),
    "bmp 1 bit": (".bmp", partial(_pillow, "bmp", "1")),
    "bmp 4 bit": (".bmp", partial(_bmp, 4)),
    "bmp 8 bit gray": (".bmp", partial(_pillow, "bmp", "L")),
    "bmp 8 bit palette": (".bmp", partial(_pillow, "bmp", "P")),
    "bmp 16 bit": (".bmp", partial(_bmp, 16)),
    "bmp 24 bit": (".bmp", partial(_pillow, "bmp", "RGB")),
    "bmp 32 bit": (".bmp", partial(_pillow, "bmp", "RGBA")),
    "bmp top-down": (".bmp", _top_down_bmp),
    "gif": (".gif", partial(_pillow, "gif", "P")),
    "gif gray": (".gif", partial(_pillow, "gif", "L")),
    "gif interlaced": (".gif", partial(_pillow, "gif", "P", interlace=1)),
    "gif animated": (".gif", partial(_frames, "gif")),
    **{f"tiff gray {b} bit": (".tif", partial(_tiff_bits, b, False)) for b in (1, 2, 4)},
    **{f"tiff gray {b} bit MinIsWhite": (".tif", partial(_tiff_bits, b, True)) for b in (1, 2, 4)},
    "tiff gray 8 bit": (".tif", _tiff_gray),
    "tiff gray 8 bit MinIsWhite": (".tif", partial(_tiff_gray, inverted=True)),
    **{f"tiff RGB {c}": (".tif", partial(_tiff, photometric="rgb", compression=c))
       for c in ("none", "zlib", "adobe_deflate")},
    **{f"tiff RGB {c}": (".tif", partial(_pillow, "tiff", "RGB", compression=c))
       for c in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd")},
    "tiff RGB jpeg": (".tif", partial(_lossy, "tiff", 8, compression="jpeg", quality=95)),
    "tiff tiled": (".tif", partial(_tiff, photometric="rgb", tile=(16, 16))),
    "tiff planar": (
        ".tif", lambda image: _tiff(image, values=image.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    ),
    "tiff big-endian": (".tif", partial(_tiff, photometric="rgb", byteorder=">")),
    "bigtiff": (".tif", partial(_tiff, photometric="rgb", bigtiff=True)),
    "tiff palette": (".tif", partial(_pillow, "tiff", "P")),
    "tiff RGBA": (".tif", partial(_pillow, "tiff", "RGBA")),
    "tiff LA": (".tif", partial(_pillow, "tiff", "LA")),
    "tiff CMYK": (".tif", partial(_lossy, "tiff", 3, mode="CMYK")),
    "tiff gray 16 bit MinIsWhite": (
        ".tif", lambda image: _tiff(image, values=65535 - image[..., 0].astype(np.uint16) * 257,
                                    shown=stacked(image[..., 0]), most=1, photometric="miniswhite")
    ),
    "tiff gray 16 bit with 12 bit": (
        ".tif", lambda image: _tiff(image, values=image[..., 0].astype(np.uint16) << 4,
                                    shown=stacked(image[..., 0] >> 4), lost=True, photometric="minisblack")
    ),
    "tiff bilevel group 4": (".tif", partial(_pillow, "tiff", "1", compression="group4")),
    "tiff multi-page": (
        ".tif", lambda image: _tiff(image, values=np.stack([image, 255 - image]), photometric="rgb", lost=True)
    ),
    "tiff gray 16 bit": (".tif", partial(_tiff16, kind="gray")),
    "tiff gray 16 bit big-endian": (".tif", partial(_tiff16, kind="gray", byteorder=">")),
    "tiff RGB 16 bit": (".tif", partial(_tiff16, kind="color")),
    "tiff RGB 16 bit big-endian": (".tif", partial(_tiff16, kind="color", byteorder=">")),
    **{f"tiff {dtype}": (".tif", partial(_unknown_range, dtype))
       for dtype in ("float32", "float64", "int32", "uint32", "int16", "float16")},
    **{f"pgm maxval {m}": (".pgm", partial(_portable, "P5", m)) for m in (1, 15, 100, 255, 256, 1023, 4095, 65535)},
    **{f"ppm maxval {m}": (".ppm", partial(_portable, "P6", m)) for m in (1, 100, 255, 1023, 4095, 65535)},
    "ppm text": (".ppm", _portable_text),
    "pbm": (".pbm", _portable_bits),
    "pfm": (".pfm", _float_map),
    "tga": (".tga", partial(_pillow, "tga", "RGB")),
    "tga RLE": (".tga", partial(_pillow, "tga", "RGB", compression="tga_rle")),
    "tga gray": (".tga", partial(_pillow, "tga", "L")),
    "tga RGBA": (".tga", partial(_pillow, "tga", "RGBA")),
    "pcx": (".pcx", partial(_pillow, "pcx", "RGB")),
    "pcx gray": (".pcx", partial(_pillow, "pcx", "L")),
    "sgi": (".sgi", partial(_pillow, "sgi", "RGB")),
    "sgi gray": (".sgi", partial(_pillow, "sgi", "L")),
    "dds": (".dds", partial(_pillow, "dds", "RGB")),
    "dds RGBA": (".dds", partial(_pillow, "dds", "RGBA")),
    "qoi": (".qoi", partial(_pillow, "qoi", "RGB")),
    "im": (".im", partial(_pillow, "im", "RGB")),
    "dib": (".dib", partial(_pillow, "dib", "RGB")),
    "msp": (".msp", partial(_pillow, "msp", "1")),
    "ico": (".ico", _ico),
    "psd": (".psd", _psd),
    "sun": (".ras", _sun),
    "spider": (
        ".spider", lambda image: Picture(saved(Image.fromarray(image[..., 0] / np.float32(255)), "spider"), None)
    ),
}  # fmt: skip
