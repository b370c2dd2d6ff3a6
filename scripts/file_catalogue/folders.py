"""Training images in folders: locations, lists of keys, and the commands that read them or archives."""

import gzip
import lzma
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from scripts.file_catalogue.archives import (
    FILES,
    contents,
    fill,
    filled,
    folder_case,
    keyed,
    picture,
    tar_bytes,
    zip_bytes,
)
from scripts.file_catalogue.case import Case, Ran, SkippedError, equal, items, spar
from scripts.file_catalogue.picture import saved, scene
from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.shard_index import scan_all
from spar_lightning.datasets.subset import select


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    yield from _folders()
    yield from _locations()
    yield from _keys()
    yield from _commands()


def _folders() -> Iterator[Case]:
    keys = keyed(FILES, folders=True)
    yield folder_case("plain", FILES)
    yield folder_case("subfolders", {f"a/b/{name}": content for name, content in FILES.items()})
    yield folder_case("same name in two folders", {"a/x.png": picture(1), "b/x.png": picture(2)})
    hidden = ("._sa_1.png", ".git/x.png", "__MACOSX/x.png", ".ipynb_checkpoints/x.png")
    yield folder_case("hidden files", {**FILES, **dict.fromkeys(hidden, picture(4))}, keys)
    yield folder_case("no images", {"a.txt": b"x"}, None, ("images",))
    yield folder_case("x.png and x.jpg", {"x.png": picture(1), "x.jpg": picture(2)}, None, ("x",))
    yield folder_case("upper-case suffixes", {"a.PNG": picture(1), "b.Png": picture(2)})
    yield Case("folders", "folder: empty", partial(filled, lambda folder: None), None, ("images",))

    def linked(folder: Path) -> None:
        fill(FILES, folder)
        (folder / "soft.png").symlink_to("sa_1.png")
        (folder / "loop").symlink_to(".")
        (folder / "loop2").symlink_to("loop")

    yield Case(
        "folders", "folder: links and loops", partial(filled, linked), items({**keys, "soft": FILES["sa_1.png"]})
    )

    def outside(folder: Path) -> None:
        fill(FILES, folder.parent / "elsewhere")
        (folder / "there").symlink_to("../elsewhere")

    there = {f"there/{key}": content for key, content in keys.items()}
    yield Case("folders", "folder: link to another folder", partial(filled, outside), items(there))
    odd: dict[str, Callable[[Path], object]] = {
        "dangling link": lambda path: path.symlink_to("none.png"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "FIFO": os.mkfifo,
    }
    for title, make in odd.items():

        def mixed(folder: Path, make: Callable[[Path], object] = make) -> None:
            fill(FILES, folder)
            make(folder / "odd.png")

        passed = items(keys) if title == "FIFO" else None  # not a file, as a folder of that name
        yield Case("folders", f"folder: {title} named odd.png", partial(filled, mixed), passed, ("odd.png",))

    def folder_named(folder: Path) -> None:
        fill(FILES, folder)
        (folder / "odd.png").mkdir()

    yield Case("folders", "folder: folder named odd.png", partial(filled, folder_named), items(keys))


def _located(pattern: str, folder: Path) -> object:
    fill({f"s{i}.tar": tar_bytes({f"x{i}.png": picture(i)}) for i in range(3)}, folder)
    fill({"{1,2}.tar": tar_bytes({"brace.png": picture(5)})}, folder)
    fill({"b\\c.tar": tar_bytes({"slash.png": picture(6)}), "d,e.tar": tar_bytes({"comma.png": picture(7)})}, folder)
    os.chdir(folder)
    return contents(pattern.replace("HERE", str(folder)), folder / "index")


def _locations() -> Iterator[Case]:
    three = {f"x{i}": picture(i) for i in range(3)}
    good = {
        "HERE/s{0..2}.tar": three,
        "s{0..2}.tar": three,
        "./s{0,1,2}.tar": three,
        "HERE/{1,2}.tar": {"brace": picture(5)},
        "HERE/b\\c.tar": {"slash": picture(6)},
        "HERE/d,e.tar": {"comma": picture(7)},
        "pipe:cat HERE/s1.tar": {"x1": picture(1)},
        "file://HERE/s1.tar": {"x1": picture(1)},
        "pipe:gzip -c HERE/s1.tar": {"x1": picture(1)},
    }
    for pattern, expected in good.items():
        yield Case("folders", f"location {pattern}", partial(_located, pattern), items(expected))
    bad = {
        "": "data.shards",
        "HERE/none.tar": "none.tar",
        "HERE/s{0..5}.tar": "s3.tar",
        "HERE/s{0..": "s{0..",
        "s3://bucket/sa.tar": "s3://",
        "hf://datasets/x/sa.tar": "hf://",
        "http://127.0.0.1:9/sa.tar": "127.0.0.1",
        "https://localhost:9/sa.tar": "localhost",
        "pipe:no_such_command x": "no_such_command",
        "pipe:false": "false",
        "pipe:true": "true",
        "pipe:cat none.tar": "none.tar",
        "pipe:xz -c HERE/s1.tar": "pipe:xz",
        "file:///none/sa.tar": "none/sa.tar",
        "ftp://127.0.0.1:9/sa.tar": "127.0.0.1",
        "HERE/*.tar": "*.tar",
    }
    for pattern, word in bad.items():
        yield Case("folders", f"location {pattern!r}", partial(_located, pattern), None, (word,))


def _selected(keys: str | list[str] | bytes, folder: Path) -> list[str]:
    files = {**FILES, "Zu\u0308rich.png": picture(8), "a b.png": picture(9)}
    (folder / "a.tar").write_bytes(tar_bytes(files))
    images: Images = scan_all([str(folder / "a.tar")], folder / "index", show=False)
    if isinstance(keys, bytes):
        (folder / "keys.txt").write_bytes(keys)
        keys = str(folder / "keys.txt")
    chosen = select(images, keys, None)
    return [chosen[i].key for i in range(len(chosen))]


def _keys() -> Iterator[Case]:
    good: dict[str, tuple[str | list[str] | bytes, list[str]]] = {
        "list": (["sa_2", "sa_1"], ["sa_1", "sa_2"]),
        "list with a key twice": (["sa_2", "sa_2"], ["sa_2"]),
        "file": (b"sa_1\nsa_2\n", ["sa_1", "sa_2"]),
        "file without a last newline": (b"sa_1\nsa_2", ["sa_1", "sa_2"]),
        "CRLF": (b"sa_1\r\nsa_2\r\n", ["sa_1", "sa_2"]),
        "BOM": (b"\xef\xbb\xbfsa_1\nsa_2\n", ["sa_1", "sa_2"]),
        "empty lines and blanks": (b"\n sa_1 \n\n\tsa_2\n\n", ["sa_1", "sa_2"]),
        "key with a blank": (b"a b\n", ["a b"]),
        "NFC for NFD": ("Zürich\n".encode(), ["Zu\u0308rich"]),
        "NFD": ("Zu\u0308rich\n".encode(), ["Zu\u0308rich"]),
    }
    for title, (keys, expected) in good.items():
        yield Case("folders", f"keys: {title}", partial(_selected, keys), equal(expected))
    bad: dict[str, tuple[str | list[str] | bytes, str]] = {
        "unknown": (["sa_1", "sa_7"], "sa_7"),
        "with suffix": (["sa_1.png"], "sa_1.png"),
        "empty file": (b"", "keys"),
        "empty list": ([], "keys"),
        "missing file": ("none.txt", "none.txt"),
        "UTF-16": ("sa_1\n".encode("utf-16"), "keys.txt"),
        "Latin-1": ("Zürich\n".encode("latin-1"), "keys.txt"),
        "comma-separated": (b"sa_1,sa_2\n", "sa_1,sa_2"),
        "prefix": (["sa_"], "sa_"),
        "not UTF-8": (["sa_\udcfc"], "sa_"),
    }
    for title, (wrong, word) in bad.items():
        yield Case("folders", f"keys: {title}", partial(_selected, wrong), None, (word,))


CONFIG = """
model: {backbone: spar_lightning.backbones.Tiny, templates: ['{}'], stride: 32}
data: {class_path: spar_lightning.datamodules.SA1B, init_args: {shards: x, augmentation: {preset: small}}}
trainer: {accelerator: cpu, max_epochs: 1, logger: false}
"""


def cached(location: Path | str, folder: Path) -> Ran:
    """Build a cache with Tiny."""
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    quick = ("--windows_per_second", "100")  # instead of measuring the rate
    return spar("cache", "--config", config, "--data.shards", location, "--data.cache", folder / "cache", *quick)


def _commands() -> Iterator[Case]:
    def usable(count: int, ran: Ran) -> None:
        if f"{count} of {count} images have features" not in ran.out:
            raise SkippedError(f"expected {count} images: {ran.out[-300:]}")

    def packed(name: str, content: bytes, folder: Path) -> Ran:
        (folder / name).write_bytes(content)
        return cached(folder / name, folder)

    large = {f"sa_{i}.png": saved(Image.fromarray(scene(70, 90, i)), "png") for i in range(3)}
    plain = tar_bytes(large)
    for name, content in {"a.tar": plain, "b.tar": gzip.compress(plain), "c.tar.gz": gzip.compress(plain)}.items():
        act = partial(packed, name, content)
        yield Case("folders", f"spar cache {name} {content[:2].hex()}", act, partial(usable, 3))
    for name, content in {
        "a.tar": lzma.compress(plain),
        "b.tar": zip_bytes(large),
        "c.tar": b"",
        "d.tar": plain[:5000],
    }.items():
        yield Case("folders", f"spar cache {name} {content[:2].hex()}", partial(packed, name, content), None, (name,))

    def with_bad(name: str, content: bytes, folder: Path) -> Ran:
        fill({**large, name: content}, folder / "images")
        return cached(folder / "images", folder)

    def counted(ran: Ran) -> None:
        if "3 of 4 images have features, 1 cannot be used" not in ran.out:
            raise SkippedError(f"expected 1 image that cannot be used: {ran.out[-300:]}")

    png = large["sa_0.png"]
    bad = {"cut.png": png[:1000], "none.png": b"", "text.jpg": b"hello", "dot.png": picture(0)[:8] + b"\0" * 50}
    for name, content in bad.items():
        yield Case("folders", f"spar cache, damaged {name}", partial(with_bad, name, content), counted, (name,))

    def trained(folder: Path) -> Ran:
        fill({**large, "cut.png": png[:1000]}, folder / "images")
        config = folder / "config.yaml"
        config.write_text(CONFIG)
        return spar("fit", "--config", config, "--data.shards", folder / "images", "--run_dir", folder / "run")

    yield Case("folders", "spar fit without a cache, damaged cut.png", trained, None, ("cut",))
