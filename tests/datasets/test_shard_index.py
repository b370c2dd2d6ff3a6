"""Tests of the shard index: every defect of a shard raises an error that names it."""

import errno
import functools
import gzip
import http.server
import os
import tarfile
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spar_lightning.datasets import folder_reader
from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.shard_index import expand, scan, scan_all
from spar_lightning.datasets.shard_stream import ShardStream
from spar_lightning.files.walk import FolderError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def keys(images: Images) -> list[str]:
    return [images[i].key for i in range(len(images))]


MEMBERS = {f"./sa_{i}.{suffix}": f"{suffix} {i}".encode() * 300 for i in range(1, 6) for suffix in ("jpg", "json")}
KEYS = ["sa_1", "sa_2", "sa_3", "sa_4", "sa_5"]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "sa_000000.tar", MEMBERS)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serve the temporary folder over HTTP and return the URL."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_images_in_order_with_their_bytes(shard: Path) -> None:
    images = scan(str(shard))
    assert keys(images) == KEYS
    assert [images[i].read() for i in range(5)] == [f"jpg {i}".encode() * 300 for i in range(1, 6)]


def test_every_kind_of_source_gives_the_same(shard: Path, web: str) -> None:
    packed = shard.with_name("packed.tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    folder = shard.with_name("folder")
    folder.mkdir()
    for name, content in MEMBERS.items():
        (folder / name).write_bytes(content)
    whole = scan(str(shard))
    locations = [str(packed), str(folder), f"pipe:cat {shard}", f"pipe:gzip -dc {packed}", f"{web}/{shard.name}"]
    for location in [*locations, f"{web}/{packed.name}"]:
        images = scan(location)
        assert keys(images) == KEYS, location
        assert (images.rows["digest"] == whole.rows["digest"]).all(), location
        for i in (3, 1, 4, 4):  # forward, back, and the same image again
            assert images[i].read() == f"jpg {i + 1}".encode() * 300, location


def test_folders_keep_their_paths_as_keys(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg", "b/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert keys(scan(str(tmp_path))) == ["a/1", "b/1"]


def test_sizes_come_from_the_headers(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    rows = scan(str(tmp_path)).rows
    assert rows["height"].tolist() == [30, 0] and rows["width"].tolist() == [20, 0]


def test_changed_bytes_are_refused(shard: Path) -> None:
    source = scan(str(shard))[0]
    content = bytearray(shard.read_bytes())
    content[source.offset] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=r"sa_000000\.tar: .*sa_1"):
        source.read()
    shard.unlink()
    with pytest.raises(ShardError, match=r"sa_000000\.tar: sa_1 .*No such file"):
        source.read()


@pytest.mark.parametrize("streamed", [False, True])
def test_every_cut_is_noticed(shard: Path, streamed: bool) -> None:
    whole = shard.read_bytes()
    end = whole.rstrip(b"\0")  # a tar ends with zeros; the first two blocks are the end-of-archive mark
    location = f"pipe:cat {shard}" if streamed else str(shard)
    for cut in [*range(512, len(end), 777), len(end), (len(end) // 512 + 1) * 512]:
        shard.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"sa_000000\.tar .*byte \d+"):
            scan(location)


def test_a_cut_gzip_is_noticed(shard: Path) -> None:
    packed = gzip.compress(shard.read_bytes() + os.urandom(1000))
    path = shard.with_name("cut.tar.gz")
    for cut in range(20, len(packed) - 1200, 300):
        path.write_bytes(packed[:cut])
        with pytest.raises(ShardError, match=r"cut\.tar\.gz .*byte \d+"):
            scan(str(path))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_damaged_header_is_noticed(shard: Path, streamed: bool) -> None:
    content = bytearray(shard.read_bytes())
    content[scan(str(shard))[1].offset - 507] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=r"byte \d+"):
        scan(f"pipe:cat {shard}" if streamed else str(shard))


def test_a_failing_command_or_server_is_an_error(shard: Path, web: str) -> None:
    with pytest.raises(ShardError, match=r"nothing\.tar 2>/dev/null .*\b1\b"):
        scan(f"pipe:cat {shard.parent}/nothing.tar 2>/dev/null")
    with pytest.raises(ShardError, match=r"nothing\.tar .*404"):
        scan(f"{web}/nothing.tar")
    with pytest.raises(ShardError, match=r"\b3\b"):
        scan(f"pipe:cat {shard}; exit 3")


def test_empty_missing_and_imageless(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    with pytest.raises(ShardError, match=r"empty\.tar .*0 bytes"):
        scan(str(tmp_path / "empty.tar"))
    with pytest.raises(ShardError, match=r"\b2\b.*sa_0\.tar"):
        expand(str(tmp_path / "sa_{0..1}.tar"))
    with pytest.raises(ShardError, match=r"\.jpg"):
        scan(str(write_tar(tmp_path / "texts.tar", {"a.txt": b"a"})))
    with pytest.raises(ShardError, match=r"data\.shards"):
        expand([])
    (tmp_path / "page.tar").write_text("<html>not found</html>" * 100)
    with pytest.raises(ShardError, match=r"page\.tar .*web page"):
        scan(str(tmp_path / "page.tar"))


def test_brace_patterns(shard: Path) -> None:
    assert expand(str(shard.parent / "sa_00000{0..0}.tar")) == [str(shard)]
    assert expand("https://host/sa_{000..002}.tar")[1:] == ["https://host/sa_001.tar", "https://host/sa_002.tar"]


@pytest.mark.parametrize("name", ["a{1,2}.tar", "b\\c.tar", "c{x.tar"])
def test_an_existing_path_is_not_a_pattern(tmp_path: Path, name: str) -> None:
    path = str(write_tar(tmp_path / name, MEMBERS))
    assert expand(path) == [path] and keys(scan(path)) == KEYS


def test_a_missing_path_is_shown_as_given_and_commands_keep_their_backslashes(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"b\\c\.tar"):
        expand(str(tmp_path / "b\\c.tar"))
    assert expand("pipe:printf 'a\\n'") == ["pipe:printf 'a\\n'"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_shards_are_not_called_missing_or_damaged(shard: Path) -> None:
    shard.chmod(0)
    with pytest.raises(ShardError, match=r"sa_000000\.tar .*Permission denied"):
        scan(str(shard))
    shard.parent.chmod(0)
    try:
        with pytest.raises(ShardError, match=r"sa_000000\.tar .*Permission denied"):
            expand(str(shard))
    finally:
        shard.parent.chmod(0o700)


def test_an_unreadable_shard_is_not_called_damaged(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ShardStream, size: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ShardStream, "read", fail)
    with pytest.raises(ShardError, match=r"sa_000000\.tar .*Input/output error.*intact"):
        scan(str(shard))


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    scandir = os.scandir

    def fail(path: str) -> Any:
        if path.endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(FolderError, match=r"/b .*Permission denied"):
        scan(str(tmp_path))


HIDDEN = ("._sa_1.jpg", "__MACOSX/sa_1.jpg", "a/.cache/sa_2.jpg", ".sa_3.jpg")


def test_hidden_files_are_not_images(tmp_path: Path) -> None:
    names = ["./sa_1.jpg", "../x/sa_2.jpg", "a..b/..c.d/sa_3.jpg", *HIDDEN]
    assert keys(scan(str(write_tar(tmp_path / "a.tar", {name: name.encode() for name in names})))) == ["sa_1", "sa_2"]
    for name in ("sa_1.jpg", *HIDDEN):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    assert keys(scan(str(tmp_path / "folder"))) == ["sa_1"]
    with pytest.raises(ShardError, match="hidden"):
        scan(str(write_tar(tmp_path / "b.tar", dict.fromkeys(HIDDEN, b"x"))))


def test_images_named_after_others_are_counted_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scan(str(write_tar(tmp_path / "a.tar", MEMBERS)))
    assert not caplog.messages
    scan(str(write_tar(tmp_path / "b.tar", {name: name.encode() for name in ("x.jpg", "x.seg.png", "y.2.jpg")})))
    (message,) = caplog.messages
    assert "b.tar" in message and "1 of 3" in message and "x.seg" in message


def test_names_that_are_too_long(tmp_path: Path) -> None:
    name = "/".join(["n" * 250] * 3) + ".jpg"
    assert keys(scan(str(write_tar(tmp_path / "a.tar", {name: b"x"})))) == ["n" * 250]
    with pytest.raises(ShardError, match=r"nnn.* 1258 bytes"):
        scan(str(write_tar(tmp_path / "b.tar", {"/".join(["n" * 250] * 5) + ".jpg": b"x"})))


def test_devices_in_a_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    os.mkfifo(tmp_path / "b.jpg")
    assert keys(scan(str(tmp_path))) == ["a"]


def test_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder, they are not read as a whole, with the same result."""
    Image.fromarray(render(1, 0, 64, 72).image).save(tmp_path / "a.png")
    expected = scan(str(tmp_path))
    monkeypatch.setattr(folder_reader, "WHOLE", 1000)
    found = scan(str(tmp_path))
    assert found[0] == expected[0] and found.rows["height"] == 64 and found[0].size > 1000


def test_a_complete_index_elsewhere_is_only_read(shard: Path, tmp_path: Path) -> None:
    scan_all([str(shard)], tmp_path / "known", show=False)
    assert keys(scan_all([str(shard)], tmp_path / "new", show=False, known=tmp_path / "known")) == KEYS
    assert not (tmp_path / "new").exists()


def test_one_key_for_two_images(shard: Path, tmp_path: Path) -> None:
    other = write_tar(shard.with_name("other.tar"), {"sa_3.jpg": b"another image", "sa_9.jpg": b"x"})
    with pytest.raises(ShardError, match=r"sa_3 .*sa_000000\.tar .*other"):
        scan_all([str(shard), str(other)], tmp_path / "a")
    twin = write_tar(shard.with_name("twin.tar"), MEMBERS)  # the same bytes twice are one image
    images = scan_all([str(shard), str(twin)], tmp_path / "b")
    assert keys(images) == KEYS and images[4].location == str(shard)


def test_a_scan_is_kept_until_the_shard_changes(shard: Path, tmp_path: Path) -> None:
    scan_all([str(shard)], tmp_path, show=False)
    (kept,) = (tmp_path / "scans").iterdir()
    time = kept.stat().st_mtime_ns
    assert keys(scan_all([str(shard)], tmp_path, show=False)) == KEYS and kept.stat().st_mtime_ns == time
    write_tar(shard, {"sa_7.jpg": b"new"})
    assert keys(scan_all([str(shard)], tmp_path, show=False)) == ["sa_7"]


def test_a_damaged_scan_is_refused_by_name(shard: Path, tmp_path: Path) -> None:
    whole = scan_all([str(shard)], tmp_path, show=False)
    (kept,) = (tmp_path / "scans").iterdir()
    content = kept.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(content), 50):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        kept.write_bytes(damaged)
        try:
            found = scan_all([str(shard)], tmp_path, show=False)
            assert (found.rows == whole.rows).all() and found.locations == whole.locations
        except ShardError as error:
            assert str(kept) in str(error) and "Delete that file" in str(error)
            refused += 1
    assert refused > 25


@pytest.mark.parametrize("streamed", [False, True])
def test_a_hole_of_zeros_is_not_taken_for_the_end(tmp_path: Path, streamed: bool) -> None:
    """Blocks of zeros as in an interrupted download with reserved space, and two concatenated tars."""
    path = write_tar(tmp_path / "sa_0.tar", {f"sa_{i}.jpg": b"x" * 5000 for i in range(20)})
    whole = path.read_bytes()
    location = f"pipe:cat {path}" if streamed else str(path)
    middle = whole[: 11 * 5632] + bytes(4 * 5632) + whole[15 * 5632 :]
    for content in (whole[: 11 * 5632] + bytes(len(whole) - 11 * 5632), middle, whole + whole):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=r"sa_0\.tar.* byte \d+"):
            scan(location)


def test_names_and_links_that_cannot_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    (folder / "again").symlink_to(folder)
    assert keys(scan(str(folder))) == ["a"]  # a folder with a link to itself is entered once
    (folder / "b.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(ShardError, match=r"b\.jpg .*link"):
        scan_all([str(folder)], tmp_path, show=False)
    (folder / "b.jpg").unlink()
    with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    with pytest.raises(ShardError, match="UTF-8"):
        scan(str(folder))
    with pytest.raises(ShardError, match=r"data\.shards.*\{"):
        expand("sa_{000..002.tar")


@pytest.mark.parametrize("streamed", [False, True])
def test_every_length_of_a_whole_tar_is_accepted(tmp_path: Path, streamed: bool) -> None:
    """Test every position of the end within a record; tarfile pads to records of 10 240 bytes."""
    for blocks in range(1, 22):
        path = write_tar(tmp_path / "sa_0.tar", {"sa_1.jpg": b"x" * 512 * blocks, "sa_1.json": b"{}"})
        assert keys(scan(f"pipe:cat {path}" if streamed else str(path))) == ["sa_1"]
