"""Tests of reading tar files: links, sparse members and other kinds; local, gzipped and piped."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.shard_index import scan
from spar_lightning.datasets.shard_stream import LARGEST, is_streamed
from tests.datasets.test_shard_index import keys

Add = Callable[..., None]


def build(path: Path, fill: Callable[[Add], None], form: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar; `fill` gets a function that adds a member with attributes of TarInfo."""
    with tarfile.open(path, "w", format=form) as tar:

        def add(name: str, content: bytes = b"", **attributes: object) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content) if content else None)

        fill(add)
    return path


def forms(path: Path) -> list[str]:
    """Return locations of the same tar: local, gzipped under the name of a plain tar, and piped."""
    packed = path.with_name(f"packed-{path.name}")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return [str(path), str(packed), f"pipe:cat {path}"]


HARD, SYMBOLIC = {"type": tarfile.LNKTYPE}, {"type": tarfile.SYMTYPE}


def test_links_are_the_images_of_their_targets(tmp_path: Path) -> None:
    def fill(add: Add) -> None:
        add("./d/early.jpg", linkname="../c.jpg", **SYMBOLIC)  # points forward
        add("./a.jpg", b"a" * 700)
        add("./hard.jpg", linkname="./a.jpg", **HARD)
        add("./c.jpg", b"c" * 900)
        add("./chain.png", linkname="d/early.jpg", **SYMBOLIC)
        add("./._hidden.jpg", linkname="nowhere.jpg", **SYMBOLIC)
        add("./note.txt", linkname="nowhere.txt", **SYMBOLIC)

    for location in forms(build(tmp_path / "a.tar", fill)):
        images = scan(location)
        assert keys(images) == ["a", "hard", "c", "early", "chain"]
        assert [images[i].read()[:1] for i in range(5)] == [b"a", b"a", b"c", b"c", b"c"]
        assert images[3].name == "./d/early.jpg"


@pytest.mark.parametrize("target", ["/data/x.jpg", "../x.jpg", "a.txt", "b.jpg"])
def test_links_without_an_image_are_an_error(tmp_path: Path, target: str) -> None:
    def fill(add: Add) -> None:
        add("a.jpg", b"a")
        add("a.txt", b"text")
        add("b.jpg", linkname=target, **SYMBOLIC)

    for location in forms(build(tmp_path / "a.tar", fill)):
        with pytest.raises(ShardError, match=r"a\.tar: 1 of 1 links .*'b\.jpg' .*tar -h"):
            scan(location)


def test_a_second_name_of_the_same_image_is_one_image(tmp_path: Path) -> None:
    def fill(add: Add) -> None:
        add("x/a.jpg", b"a")
        add("y/a.jpg", linkname="x/a.jpg", **HARD)

    assert keys(scan(str(build(tmp_path / "a.tar", fill)))) == ["a"]


SPARSE = {
    "1.0": ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4096"}, b"1\n0\n512\n"),
    "0.1": ({"GNU.sparse.map": "0,512", "GNU.sparse.size": "4096", "GNU.sparse.numblocks": "1"}, b""),
}


@pytest.mark.parametrize("version", ["1.0", "0.1", "old"])
@pytest.mark.parametrize("last", [True, False])
def test_sparse_members(tmp_path: Path, version: str, last: bool) -> None:
    def write(name: str) -> Path:
        def fill(add: Add) -> None:
            if version == "old":
                add(name, b"x" * 512, type=tarfile.GNUTYPE_SPARSE)
            else:
                headers, before = SPARSE[version]
                content = (before.ljust(512, b"\0") if before else b"") + b"x" * 512
                add(f"GNUSparseFile.0/{name}", content, pax_headers={**headers, "GNU.sparse.name": name})
            if not last:
                add("b.jpg", b"b")

        path = build(tmp_path / "a.tar", fill, tarfile.GNU_FORMAT if version == "old" else tarfile.PAX_FORMAT)
        if version == "old":
            path.write_bytes(old_sparse(path.read_bytes()))
        return path

    for location in forms(write("dark.bmp")):
        with pytest.raises(ShardError, match=r"dark\.bmp .*sparse.*-S"):
            scan(location)
    if not last:  # other files may be sparse
        for location in forms(write("dark.npy")):
            assert keys(scan(location)) == ["b"]


def old_sparse(tar: bytes) -> bytes:
    """Complete the first header of a tar as GNU's old format writes it: 512 of 4096 bytes are stored."""
    header = bytearray(tar[:512])
    header[257:265] = b"ustar  \0"
    header[345:512] = bytes(167)
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % 4096
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[512:]


def test_kinds_of_members_that_are_not_files(tmp_path: Path) -> None:
    def fill(add: Add) -> None:
        for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
            add("device.jpg", type=kind)
        add("a.jpg", b"a")

    for location in forms(build(tmp_path / "a.tar", fill)):
        assert keys(scan(location)) == ["a"]


def test_volumes_are_an_error(tmp_path: Path) -> None:
    path = build(tmp_path / "a.tar", lambda add: add("a.jpg", b"a", type=b"M"))
    with pytest.raises(ShardError, match=r"a\.jpg .*volume"):
        scan(str(path))


@pytest.mark.parametrize("size", [LARGEST + 1, 2**60, -512])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_sizes_that_would_exhaust_memory(tmp_path: Path, size: int, kind: bytes) -> None:
    def fill(add: Add) -> None:
        add("first.jpg", b"first")
        add("huge.jpg")

    path = build(tmp_path / "a.tar", fill, tarfile.GNU_FORMAT)
    info = tarfile.TarInfo("huge.jpg")
    info.size, info.type = size, kind
    content = path.read_bytes()
    path.write_bytes(content[:1024] + info.tobuf(tarfile.GNU_FORMAT) + content[1536:])
    for location in forms(path):
        with pytest.raises(ShardError, match=r"a\.tar"):
            scan(location)


@pytest.mark.parametrize("headers", [{"GNU.sparse.map": "x"}, {"GNU.sparse.size": "x"}, {"size": "1" * 30}])
def test_damaged_pax_headers(tmp_path: Path, headers: dict[str, str]) -> None:
    path = build(tmp_path / "a.tar", lambda add: add("a.jpg", b"a", pax_headers=headers))
    for location in forms(path):
        with pytest.raises(ShardError, match=r"a\.tar"):
            scan(location)


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form, encoding="latin-1") as tar:
            info = tarfile.TarInfo("Z\u00fcrich.jpg")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        if form == tarfile.PAX_FORMAT:
            assert keys(scan(str(tmp_path / "a.tar"))) == ["Z\u00fcrich"]
            continue
        with pytest.raises(ShardError, match=r"rich\.jpg.* UTF-8"):
            scan(str(tmp_path / "a.tar"))


def test_gzip_is_recognized_by_its_bytes(tmp_path: Path) -> None:
    path = build(tmp_path / "a.tar", lambda add: add("a.jpg", b"a"))
    plain = path.rename(tmp_path / "plain.tar.gz")
    assert not is_streamed(str(plain)) and scan(str(plain))[0].read() == b"a"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert is_streamed(str(path)) and scan(str(path))[0].read() == b"a"
    assert not is_streamed(str(tmp_path))
