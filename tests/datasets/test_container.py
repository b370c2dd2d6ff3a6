"""Tests of the kinds of files that people have under the name of a shard."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.shard_index import scan
from tests.datasets.test_shard_index import KEYS, MEMBERS, keys, write_tar


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jpg", b"a")
    return buffer.getvalue()


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


TAR = tarfile.TarInfo("a.jpg").tobuf() + bytes(1024)
KINDS = [
    (lzma.compress(TAR), "xz"),
    (bz2.compress(TAR), "bzip2"),
    (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
    (gzip.compress(gzip.compress(TAR)), "twice"),
    (zipped(), "zip"),
    (b"7z\xbc\xaf\x27\x1c" + bytes(600), "7z"),
    *((picture(kind), "image") for kind in ("jpeg", "png", "gif", "webp", "bmp", "tiff")),
    (b"\n<!DOCTYPE html><html>" * 40, "page"),
    (b"", "0 bytes"),
]


# Without names, a test would be named after its content, and gzip stores the time in it.
@pytest.mark.parametrize(("content", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_each_kind_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "sa.tar"
    path.write_bytes(content)
    packed = tmp_path / "sa.tgz"
    packed.write_bytes(gzip.compress(content))
    for location in (str(path), str(packed), f"pipe:cat {path}"):
        with pytest.raises(ShardError, match=rf"sa\.t.*\b{kind}\b") as caught:
            scan(location)
        assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("name", ["BMW.jpg", "BZh.jpg", "PK\x03\x04.jpg", "GIF89.jpg", "7z.jpg"])
def test_the_first_name_in_a_tar_is_not_its_kind(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", {name: b"x", **MEMBERS})
    assert keys(scan(str(path)))[1:] == KEYS
