"""Tests of label maps: the values that the file stores, or an error that names the reason."""

import struct
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spar_lightning.evaluation.label_file import read_label_file
from spar_lightning.image.codec import ImageError

VALUES = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
PALETTE = [(7 * i) % 256 for i in range(768)]


def png(values: NDArray[np.integer], bits: int, palette: bool) -> bytes:
    """Encode a PNG with gray values or palette indices of any bit depth, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape
    digits = ["".join(f"{value:0{bits}b}" for value in row) for row in values.tolist()]
    rows = [b"\0" + int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in digits]
    header = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
    colors = chunk(b"PLTE", bytes(PALETTE[: 3 * 2**bits])) if palette else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colors + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(("bits", "palette"), [*product([1, 2, 4, 8], [False, True]), (16, False)])
def test_png_of_any_depth(bits: int, palette: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (5, 7))
    (tmp_path / "x.png").write_bytes(png(values, bits, palette))
    assert np.array_equal(read_label_file(tmp_path / "x.png"), values)


def tiff(values: NDArray[np.integer], bits: int, photometric: int, fill_order: int) -> bytes:
    """Encode a TIFF with gray values of any bit depth and order of bits, which Pillow cannot write."""
    height, width = values.shape
    digits = ["".join(f"{value:0{bits}b}" for value in row) for row in values.tolist()]
    rows = [text.ljust(-(-len(text) // 8) * 8, "0") for text in digits]
    packed = [row[i : i + 8][:: 1 if fill_order == 1 else -1] for row in rows for i in range(0, len(row), 8)]
    data = bytes(int(byte, 2) for byte in packed)
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 266: fill_order, 273: 8 + 2 + 10 * 12 + 4,
            277: 1, 278: height, 279: len(data)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_of_any_depth(bits: int, fill_order: int, tmp_path: Path) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (5, 7))
    (tmp_path / "x.tif").write_bytes(tiff(values, bits, 1, fill_order))
    assert np.array_equal(read_label_file(tmp_path / "x.tif"), values)
    (tmp_path / "x.tif").write_bytes(tiff(values, bits, 0, fill_order))
    with pytest.raises(ValueError, match=r"inverted|raw mode"):  # Pillow cannot read 8 bits in reverse order
        read_label_file(tmp_path / "x.tif")


@pytest.mark.parametrize(
    ("suffix", "more"),
    [("png", {}), ("bmp", {}), ("pgm", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}),
     ("tif", {"compression": "tiff_adobe_deflate"}), ("tif", {"compression": "packbits"})],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["gray", "palette", "16 bits"])
def test_formats_that_keep_values(suffix: str, more: dict[str, Any], kind: str, tmp_path: Path) -> None:
    if (kind, suffix) in (("palette", "pgm"), ("16 bits", "bmp")):
        pytest.skip("the format does not exist")
    values = VALUES.astype(np.uint16) * 200 if kind == "16 bits" else VALUES
    image = Image.fromarray(values)
    if kind == "palette":
        image.putpalette(PALETTE)
    image.save(tmp_path / f"x.{suffix}", **more)
    assert np.array_equal(read_label_file(tmp_path / f"x.{suffix}"), values)


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("x.jpg", {}, "JPEG"),
        ("x.png", {"format": "jpeg"}, "JPEG"),  # the content decides, not the name
        ("x.webp", {"lossless": True}, "WEBP"),
        ("x.jp2", {}, "JPEG2000"),
        ("x.gif", {}, "GIF"),
        ("x.tif", {"compression": "jpeg"}, "compressed with jpeg"),
        ("x.tif", {"tiffinfo": {262: 0}}, "inverted"),
        ("x.tif", {"save_all": True, "append_images": [Image.fromarray(VALUES)]}, "2 pages"),
        ("x.png", {"save_all": True, "append_images": [Image.fromarray(255 - VALUES)]}, "2 pages or frames"),
    ],
)
def test_files_that_do_not_keep_values(name: str, more: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    Image.fromarray(VALUES).save(tmp_path / name, **more)
    with pytest.raises(ValueError, match=sentence):
        read_label_file(tmp_path / name)


def test_bitmaps_and_other_maxima(tmp_path: Path) -> None:
    for name, content in {"a.pgm": b"P5 2 1 20 \x00\x14", "b.pbm": b"P4 2 1 \x80"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="Save it as PNG"):
            read_label_file(tmp_path / name)
    (tmp_path / "c.pgm").write_bytes(b"P2 3 1 255 0 20 255 ")
    assert read_label_file(tmp_path / "c.pgm").tolist() == [[0, 20, 255]]


def test_labels_with_an_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 3
    Image.fromarray(VALUES).save(tmp_path / "x.png", exif=exif)
    with pytest.raises(ValueError, match="EXIF orientation 3"):
        read_label_file(tmp_path / "x.png")


def test_damage_that_pillow_reports_in_its_own_way(tmp_path: Path) -> None:
    content = png(VALUES, 8, palette=False)
    start = content.index(b"IDAT") - 4  # the length of the chunk
    shorter = struct.pack(">I", struct.unpack_from(">I", content, start)[0] - 9)
    no_height = tiff(VALUES, 8, 1, 1).replace(struct.pack("<HHI", 257, 4, 1), struct.pack("<HHI", 999, 4, 1))
    files = {"x.png": content[:start] + shorter + content[start + 4 :], "x.tif": no_height}
    for name, damaged in files.items():  # SyntaxError and TypeError
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ImageError):
            read_label_file(tmp_path / name)
