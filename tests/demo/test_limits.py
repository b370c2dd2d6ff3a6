"""Limits on what visitors of the page send: files and words."""

import io
import os
import zlib
from pathlib import Path
from struct import pack

import pytest
from PIL import Image

from spar_lightning.datasets.scene_renderer import render
from spar_lightning.demo.limits import MOST_BYTES, SHOWN, read_classes, read_upload
from spar_lightning.errors import UserError


def chunk(kind: bytes, data: bytes) -> bytes:
    return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """Return a PNG of a few bytes that claims to have side x side pixels."""
    header = pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def photograph(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(3, 0, 96, 130).image).save(buffer, kind)
    return buffer.getvalue()


def test_an_image_is_shrunk(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1500)).save(tmp_path / "a.png")
    assert tuple(read_upload(str(tmp_path / "a.png"), tmp_path).shape) == (3, SHOWN // 2, SHOWN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as an image"), (b"nothing", "cannot be read as an image"),
        (bomb(30_000), "too many pixels"), (bomb(10_000), "too many pixels"), (bomb(200), "cannot be read as an image"),
        (photograph("jpeg")[:1000], "cannot be read as an image"), (photograph("eps"), "Allowed: JPEG, PNG"),
        (b"\0" * (MOST_BYTES + 1), "At most 20 MiB"),
    ],
    ids=["empty", "text", "huge_bomb", "bomb", "damaged", "truncated", "postscript", "large"],
)  # fmt: skip
def test_files_that_are_rejected(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_upload(str(tmp_path / "a.png"), tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_only_uploads_are_read(tmp_path: Path) -> None:
    (folder := tmp_path / "uploads").mkdir()
    (tmp_path / "secret.png").write_bytes(photograph("png"))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe")
    paths = (tmp_path / "secret.png", folder / "link.png", folder / ".." / "secret.png", folder, folder / "pipe")
    for path in (*map(str, paths), "/etc/shadow", "/dev/zero", 3, ["a"]):
        with pytest.raises(UserError, match="was not uploaded"):
            read_upload(path, folder)
    with pytest.raises(UserError, match="not on the server anymore"):
        read_upload(str(folder / "gone.png"), folder)
    with pytest.raises(UserError, match="image is missing"):
        read_upload(None, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "class"), ("; ;", "class"), ("; ".join(f"plain {i}" for i in range(101)), "more than 100 class names"),
        ("a" * 101 + "; b", "more than 100 characters"), ("a" * 101 + ": b; c", "more than 100 characters"),
        ("a" * 10**6, "too long"), (None, "too long"), (["a"], "too long"),
    ],
)  # fmt: skip
def test_words_that_are_rejected(text: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_classes(text)
