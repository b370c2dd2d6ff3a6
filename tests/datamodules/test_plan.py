"""A strict scan: every way in which a tar can be wrong is a sentence that names it."""

import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from spar_lightning.datamodules.plan import ShardError, expand, list_keys, scan


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = {f"./sa_{i}.{suffix}": f"{suffix} {i}".encode() * 300 for i in range(1, 6) for suffix in ("jpg", "json")}
    return write_tar(tmp_path / "sa_000000.tar", members)


def test_images_in_order_with_their_bytes(shard: Path) -> None:
    sources = scan(str(shard))
    assert [source.key for source in sources] == ["sa_1", "sa_2", "sa_3", "sa_4", "sa_5"]
    assert sources[3].read() == b"jpg 4" * 300
    assert list_keys(str(shard)) == [source.key for source in sources]
    assert [s.key for s in scan(str(shard), max_images=2)] == list_keys(str(shard), max_images=2) == ["sa_1", "sa_2"]


def test_brace_patterns(shard: Path) -> None:
    write_tar(shard.with_name("sa_000001.tar"), {"sa_9.jpg": b"x"})
    assert list_keys(str(shard.parent / "sa_{000000..000001}.tar")) == ["sa_1", "sa_2", "sa_3", "sa_4", "sa_5", "sa_9"]


def test_changed_bytes_are_refused(shard: Path) -> None:
    source = scan(str(shard))[0]
    content = bytearray(shard.read_bytes())
    content[source.offset] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=r"sa_000000.tar: the bytes of sa_1 changed after the scan"):
        source.read()


def test_every_cut_is_noticed(shard: Path) -> None:
    whole = shard.read_bytes()
    end = whole.rstrip(b"\0")  # a tar ends in zeros; two blocks of them are the mark
    for cut in [*range(512, len(end), 777), len(end), (len(end) // 512 + 1) * 512]:
        shard.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=r"sa_000000.tar is damaged at byte \d+"):
            scan(str(shard))


def test_a_damaged_header_is_noticed(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    second = scan(str(shard))[1].offset - 512
    content[second + 5] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(ShardError, match="is damaged at byte"):
        scan(str(shard))


def test_empty_missing_and_imageless(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    with pytest.raises(ShardError, match=r"empty.tar is empty \(0 bytes\)"):
        scan(str(tmp_path / "empty.tar"))
    with pytest.raises(ShardError, match=r"of which 2 do not exist, the first of them .*sa_0.tar"):
        scan(str(tmp_path / "sa_{0..1}.tar"))
    with pytest.raises(ShardError, match="holds no images"):
        scan(str(write_tar(tmp_path / "texts.tar", {"a.txt": b"a"})))
    with pytest.raises(ShardError, match=r"data\.shards is empty"):
        expand([])
    (tmp_path / "page.tar").write_text("<html>not found</html>" * 100)
    with pytest.raises(ShardError, match=r"page\.tar is damaged at byte 0"):
        scan(str(tmp_path / "page.tar"))


def test_one_key_for_two_images(shard: Path) -> None:
    other = write_tar(shard.with_name("other.tar"), {"sa_3.jpg": b"another image"})
    with pytest.raises(ShardError, match="key sa_3 stands for two different images"):
        scan([str(shard), str(other)])
    assert len(scan([str(shard), str(shard)])) == 5  # the same bytes twice are one image
