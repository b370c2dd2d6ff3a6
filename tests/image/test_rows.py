"""Images read in rows have the pixels that Pillow decodes, whatever their format, and the same errors."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from spar_lightning.image import rows
from spar_lightning.image.codec import ImageError, decode_image
from spar_lightning.image.inputs import as_pixels
from spar_lightning.image.rows import ImageRows, as_rows

pyvips = pytest.importorskip("pyvips")
HEIGHT, WIDTH = 123, 157
RANDOM = np.random.default_rng(0)
SMOOTH = Image.fromarray(RANDOM.integers(0, 256, (9, 11, 3), np.uint8)).resize(
    (WIDTH, HEIGHT), Image.Resampling.BICUBIC
)
DEEP = RANDOM.integers(0, 2**16, (HEIGHT, WIDTH, 3)).astype(np.uint16)
Log = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read small files in bands of 31 rows, too."""
    monkeypatch.setattr(rows, "LARGE", 1)
    monkeypatch.setattr(rows, "BAND", 31 * WIDTH)


def pillow(mode: str, **options: Any) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        image = SMOOTH.convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(Image.fromarray(RANDOM.integers(0, 256, (HEIGHT, WIDTH), np.uint8)))
        image.save(path, **options)

    return save


def vips(values: np.ndarray[Any, Any], **options: Any) -> Callable[[Path], None]:
    return lambda path: pyvips.Image.new_from_array(values).write_to_file(str(path), **options)


def turned(orientation: int) -> Callable[[Path], None]:
    exif = Image.Exif()
    exif[0x112] = orientation
    return pillow("RGB", exif=exif)


def with_multiplied_alpha(path: Path) -> None:
    """Write a TIFF with colors that are multiplied by alpha."""
    pillow("RGBA")(path)
    tag = b"\x52\x01\x03\x00\x01\x00\x00\x00"  # ExtraSamples, one SHORT
    content = path.read_bytes()
    assert content.count(tag + b"\x02") == 1
    path.write_bytes(content.replace(tag + b"\x02", tag + b"\x01"))


def with_late_exif(path: Path) -> None:
    """Write a PNG with its orientation behind the pixels."""
    exif = Image.Exif()
    exif[0x112] = 6
    SMOOTH.save(path, exif=exif)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])


FILES: dict[str, Callable[[Path], None]] = {
    **{f"{mode}.png": pillow(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    **{f"{mode}.tif": pillow(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    **{f"{mode}.jpg": pillow(mode) for mode in ("L", "RGB")},
    **{f"{name}.tif": pillow("RGB", compression=name) for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")},
    "group4.tif": pillow("1", compression="group4"),
    "lossless.webp": pillow("RGB", lossless=True),
    "progressive.jpg": pillow("RGB", progressive=True),
    "full.jpg": pillow("RGB", subsampling=0),
    "transparent.png": pillow("P", transparency=3),
    "16.png": lambda path: Image.fromarray(DEEP[..., 0]).save(path),
    "16.tif": lambda path: Image.fromarray(DEEP[..., 0]).save(path),
    "rgb16.png": vips(DEEP),
    "rgb16.tif": vips(DEEP),
    "tiled.tif": vips(np.array(SMOOTH), tile=True, tile_width=64, tile_height=64, compression="deflate"),
    "bigtiff.tif": vips(np.array(SMOOTH), bigtiff=True),
    "interlaced.png": vips(np.array(SMOOTH), interlace=True),
    "late.png": with_late_exif,
    "xmp.jpg": pillow("RGB", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="8"/>'),
    **{f"turned{n}.{end}": turned(n) for n in (1, 2, 3, 5, 6, 8) for end in ("png", "tif", "jpg")},
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    expected, read = as_pixels(tmp_path / name), as_rows(tmp_path / name)
    bands = list(read.bands())
    assert rows._streamed(tmp_path / name) is not None and len(bands) > 1
    assert torch.equal(torch.cat(bands, dim=1), expected) and read.size == tuple(expected.shape[1:])
    assert torch.equal(read.whole(), expected)  # it can be read again
    shrunk = decode_image((tmp_path / name).read_bytes(), upright=True, max_side=50)
    assert torch.equal(read.at_most(50), shrunk) and torch.equal(read.at_most(500), expected)


@pytest.mark.parametrize("save", [pillow("CMYK"), pillow("RGB", compression="zstd"), with_multiplied_alpha])
def test_pillow_decodes_what_libvips_would_not(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path / "x.tif")
    assert rows._streamed(tmp_path / "x.tif") is None
    assert torch.equal(as_rows(tmp_path / "x.tif").whole(), as_pixels(tmp_path / "x.tif"))


def test_images_in_memory() -> None:
    expected = as_pixels(SMOOTH)
    for image in (SMOOTH, np.array(SMOOTH), expected, ImageRows.of(expected)):
        read = as_rows(image)
        assert read.size == (HEIGHT, WIDTH) and torch.equal(read.whole(), expected)


@pytest.mark.parametrize("name", ["RGB.png", "RGB.tif", "RGB.jpg", "tiff_lzw.tif", "lossless.webp"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_files(name: str, damage: str, tmp_path: Path) -> None:
    """A file that Pillow rejects is rejected, with its path; a file that it accepts has the same size."""
    FILES[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    half = len(content) // 2
    tail = b"" if damage == "truncated" else bytes(200) + content[half + 200 :]
    (tmp_path / name).write_bytes(content[:half] + tail)
    try:
        expected = as_pixels(tmp_path / name)
    except ImageError:
        with pytest.raises(ImageError, match=rf"{name} cannot be read as an image"):
            as_rows(tmp_path / name).whole()
    else:
        assert as_rows(tmp_path / name).whole().shape == expected.shape


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_no_other_error(seed: int, tmp_path: Path) -> None:
    """A damaged file raises ImageError, or has rows of the size that it claims."""
    generator = np.random.default_rng(seed)
    name = ("RGB.png", "RGB.tif", "tiff_lzw.tif", "progressive.jpg")[seed % 4]
    FILES[name](tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    for place in generator.integers(0, min(len(content), 400), 6).tolist():  # most in the header
        content[place] = int(generator.integers(0, 256))
    (tmp_path / name).write_bytes(content)
    try:
        read = as_rows(tmp_path / name)
        assert read.whole().shape == (3, *read.size)
    except ImageError as error:
        assert name in str(error)


def test_a_png_with_too_many_texts_is_decoded(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2**22, zip=True)
    SMOOTH.save(tmp_path / "a.png", pnginfo=info)
    assert torch.equal(as_rows(tmp_path / "a.png").whole(), as_pixels(tmp_path / "a.png"))


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    for name in ("turned6.jpg", "turned1.png"):
        FILES[name](tmp_path / name)
        as_rows(tmp_path / name).whole()
        image = Image.open(tmp_path / name)
        Image.new("RGB", image.size, "red").save(tmp_path / name, exif=image.getexif())
        assert torch.equal(as_rows(tmp_path / name).whole(), as_pixels(tmp_path / name))


def test_a_pipe_is_not_an_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="No such image file"):
        as_rows(tmp_path / "pipe.png")


def test_a_file_that_is_missing_or_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ImageError, match="not an image in a known format"):
        as_rows(tmp_path / "text.png")
    with pytest.raises(ImageError, match="No such image file"):
        as_rows(tmp_path / "absent.png")


def test_lost_content_is_named(tmp_path: Path, caplog: Log) -> None:
    Image.fromarray(DEEP[..., 0] >> 5).save(tmp_path / "dark.png")
    as_rows(tmp_path / "dark.png").whole()
    assert "dark.png: its 16-bit values are all below 2048" in caplog.text
    SMOOTH.save(tmp_path / "pages.tif", save_all=True, append_images=[SMOOTH])
    as_rows(tmp_path / "pages.tif")
    assert "pages.tif: only the first of 2 pages is used" in caplog.text


def test_without_libvips(tmp_path: Path, caplog: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    SMOOTH.save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with caplog.at_level(logging.WARNING):
        read = as_rows(tmp_path / "a.png")
    assert torch.equal(read.whole(), as_pixels(SMOOTH))
    assert "a.png is decoded as a whole" in caplog.text and "spar-lightning[large]" in caplog.text
