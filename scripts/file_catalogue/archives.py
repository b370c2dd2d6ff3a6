"""Training images in archives: tar files of all kinds, and archives of other kinds."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from scripts.file_catalogue.case import Case, anything, items
from scripts.file_catalogue.picture import saved, scene
from spar_lightning.datasets.shard_index import expand, scan_all

Files = Mapping[str, bytes]


def picture(seed: int) -> bytes:
    """Return a PNG."""
    return saved(Image.fromarray(scene(24, 32, seed)), "png")


FILES: Files = {"sa_1.png": picture(1), "sa_1.json": b"{}", "sa_2.png": picture(2), "sa_3.png": picture(3)}


def keyed(files: Files, folders: bool = False) -> dict[str, bytes]:
    """Return the images of some files by key: the name without suffix, with the folders or without."""
    images = {name: content for name, content in files.items() if name.lower().endswith((".png", ".jpg"))}
    paths = {PurePosixPath(name): content for name, content in images.items()}
    return {str(path.with_suffix("")) if folders else path.stem: content for path, content in paths.items()}


def contents(location: str, root: Path) -> dict[str, bytes]:
    """Return the bytes of all images that the product finds, by key."""
    images = scan_all(expand(location), root, show=False)
    return {images[i].key: images[i].read() for i in range(len(images))}


def tar_bytes(files: Files, kind: int = tarfile.PAX_FORMAT, encoding: str = "utf-8") -> bytes:
    """Return a tar file with some files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, encoding=encoding, errors="surrogateescape") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    yield from _containers()
    yield from _gnu_tar()
    yield from _members()
    yield from _names()
    yield from _damage(seed)


def _location(name: str, content: bytes, folder: Path) -> object:
    (folder / name).write_bytes(content)
    return contents(str(folder / name), folder / "index")


def _case(
    title: str, name: str, content: bytes, expected: Mapping[str, bytes] | None, *words: str, either: bool = False
) -> Case:
    error = (name, *words) if either or expected is None else None
    right = None if expected is None else items(expected)
    return Case("archives", title, partial(_location, name, content), right, error)


def zip_bytes(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _containers() -> Iterator[Case]:
    plain, expected = tar_bytes(FILES), keyed(FILES)
    for name in ("a.tar", "a.tar.gz", "a.tgz", "a.TAR", "a.bin", "a", "a.tar.xz", "a.zip", "a b.tar"):
        yield _case(f"plain tar named {name}", name, plain, expected)
        yield _case(f"gzip named {name}", name, gzip.compress(plain), expected)
        yield _case(f"gzip of two parts named {name}", name, gzip.compress(plain[:3000]) + gzip.compress(plain[3000:]),
                    expected)  # fmt: skip
    others = {
        "xz": lzma.compress(plain),
        "lzma": lzma.compress(plain, lzma.FORMAT_ALONE),
        "bzip2": bz2.compress(plain),
        "zip": zip_bytes(FILES),
        "zstd": b"\x28\xb5\x2f\xfd" + bytes(range(200)),
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(range(200)),
        "rar": b"Rar!\x1a\x07\x01\0" + bytes(range(200)),
        "lz4": b"\x04\x22\x4d\x18" + bytes(range(200)),
        "cpio": b"070701" + b"0" * 200,
        "gzip twice": gzip.compress(gzip.compress(plain)),
        "PNG": picture(1),
        "JPEG": saved(Image.fromarray(scene(24, 32)), "jpeg"),
        "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
        "parquet": b"PAR1" + bytes(2000) + b"PAR1",
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(2000),
        "text": b"hello\n" * 200,
        "zeros": bytes(10240),
        "zeros of a block": bytes(512),
        "random": np.random.default_rng(0).bytes(5000),
    }
    for kind, content in others.items():
        for name in ("a.tar", "a.tar.gz", "a.dat"):
            either = kind in ("xz", "lzma", "bzip2", "zip", "gzip twice")
            yield _case(f"{kind} named {name}", name, content, expected if either else None, either=True)
    yield _case("xz, message", "a.tar", others["xz"], expected, "xz", either=True)
    yield _case("bzip2, message", "a.tar", others["bzip2"], expected, "bz", either=True)
    yield _case("zip, message", "a.tar", others["zip"], expected, "zip", either=True)
    yield _case("zstd, message", "a.tar", others["zstd"], None, "zst")
    yield _case("image, message", "a.tar", others["PNG"], None, "image")
    for name in ("a.tar", "a.tar.gz", "a.tgz"):
        yield _case(f"0 bytes named {name}", name, b"", None)
    yield _case("tar without members", "a.tar", tar_bytes({}), None)
    yield _case("tar without images", "a.tar", tar_bytes({"a.txt": b"x", "b.json": b"{}"}), None)
    yield _case("gzip of nothing", "a.tar.gz", gzip.compress(b""), None)


def _packed(options: tuple[str, ...], make: Callable[[Path], object], folder: Path) -> object:
    """Pack a folder with GNU tar and read it."""
    source = folder / "source"
    source.mkdir()
    make(source)
    target = folder / "a.tar"
    subprocess.run(["tar", "-cf", target, *options, "-C", source, "."], check=True, stderr=subprocess.DEVNULL)
    return contents(str(target), folder / "index")


def fill(files: Files, folder: Path) -> None:
    """Write files into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _sparse(folder: Path) -> None:
    fill(FILES, folder)
    with (folder / "holes.bmp").open("wb") as file:  # a BMP with holes
        content = saved(Image.new("RGB", (400, 300)), "bmp")
        file.write(content[:54])
        file.truncate(len(content))


def _linked(folder: Path) -> None:
    fill(FILES, folder)
    os.link(folder / "sa_1.png", folder / "hard.png")
    (folder / "soft.png").symlink_to("sa_2.png")


def _gnu_tar() -> Iterator[Case]:
    expected = keyed(FILES)
    for kind in ("v7", "oldgnu", "gnu", "ustar", "posix"):
        for option in ("", "-z", "--blocking-factor=1", "--blocking-factor=20"):
            title = f"GNU tar {kind} {option}"
            act = partial(_packed, (f"--format={kind}", *option.split()), partial(fill, FILES))
            yield Case("archives", title, act, items(expected))
    with_label = partial(_packed, ("--label=volume",), partial(fill, FILES))
    yield Case("archives", "GNU tar with a volume label", with_label, items(expected))
    wide = partial(_packed, ("--blocking-factor=200",), partial(fill, FILES))
    yield Case("archives", "GNU tar -b 200", wide, items(expected), ("a.tar",))
    linked = {**expected, "hard": FILES["sa_1.png"], "soft": FILES["sa_2.png"]}
    for option in ("", "-z", "--format=v7", "-h", "--hard-dereference"):
        act = partial(_packed, tuple(option.split()), _linked)
        yield Case("archives", f"links, GNU tar {option}", act, items(linked), ("a.tar",))
    black = saved(Image.new("RGB", (400, 300)), "bmp")
    sparse = {**expected, "holes": black}
    for option in ("-S", "-S -z", "-S --format=posix", "-S --format=oldgnu"):
        act = partial(_packed, tuple(option.split()), _sparse)
        yield Case("archives", f"sparse member, GNU tar {option}", act, items(sparse), ("holes.bmp",))
    long = {f"{'d' * 90}/{'e' * 90}/{'n' * 120}{i}.png": picture(i) for i in range(2)}
    for kind in ("gnu", "posix"):
        act = partial(_packed, (f"--format={kind}",), partial(fill, long))
        yield Case("archives", f"long names, GNU tar {kind}", act, items(keyed(long)))


def _member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def _with_members(extra: list[tarfile.TarInfo], files: Files = FILES, first: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if first:
            for member in extra:
                tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if not first:
            for member in extra:
                tar.addfile(member)
    return buffer.getvalue()


def _members() -> Iterator[Case]:
    expected = keyed(FILES)
    for name, pack in (("a.tar", bytes), ("a.tar.gz", gzip.compress)):
        kinds = {"directory": tarfile.DIRTYPE, "FIFO": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
        for kind, code in kinds.items():
            content = pack(_with_members([_member("x.jpg", code)]))
            yield _case(f"{kind} named x.jpg in {name}", name, content, expected, "x.jpg", either=True)
        for title, code, target, key in (
            ("hard link", tarfile.LNKTYPE, "sa_1.png", "sa_1.png"),
            ("symbolic link", tarfile.SYMTYPE, "sa_2.png", "sa_2.png"),
            ("symbolic link with ./", tarfile.SYMTYPE, "./sa_2.png", "sa_2.png"),
        ):
            for first in (False, True):
                content = pack(_with_members([_member("link.png", code, target)], first=first))
                whole = {**expected, "link": FILES[key]}
                where = "first" if first else "last"
                yield _case(f"{title}, {where}, in {name}", name, content, whole, "link.png", either=True)
        for title, target in (("missing", "none.png"), ("outside", "../../x.png"), ("itself", "link.png")):
            content = pack(_with_members([_member("link.png", tarfile.SYMTYPE, target)]))
            yield _case(f"link to {title} in {name}", name, content, None, "link.png")
        in_folder = {"b/x.png": picture(1), "c/y.png": picture(2)}
        content = pack(_with_members([_member("c/link.png", tarfile.SYMTYPE, "../b/x.png")], in_folder))
        whole = {**keyed(in_folder), "link": in_folder["b/x.png"]}
        yield _case(f"link to another folder in {name}", name, content, whole, "link.png", either=True)
        hidden = {**FILES, "._sa_1.png": b"\0\5\x16\7", "__MACOSX/._sa_1.png": b"x", ".thumb/sa_9.png": picture(9),
                  "./.ipynb_checkpoints/sa_1-checkpoint.png": picture(1)}  # fmt: skip
        yield _case(f"hidden members in {name}", name, pack(tar_bytes(hidden)), expected)
        twice = pack(tar_bytes({"a/x.png": picture(1), "b/x.png": picture(1)}))
        yield _case(f"same image twice in {name}", name, twice, {"x": picture(1)}, "x", either=True)
        clash = pack(tar_bytes({"a/x.png": picture(1), "b/x.png": picture(2)}))
        yield _case(f"two images with one key in {name}", name, clash, None, "x")
        stems = pack(tar_bytes({"x.png": picture(1), "x.jpg": picture(2)}))
        yield _case(f"x.png and x.jpg in {name}", name, stems, None, "x")
        empty = pack(tar_bytes({**FILES, "none.jpg": b""}))
        yield _case(f"member of 0 bytes in {name}", name, empty, {**expected, "none": b""}, either=True)
    appended = tar_bytes({"sa_1.png": picture(1)})
    updated = io.BytesIO(appended)
    with tarfile.open(fileobj=updated, mode="a") as tar:
        member = tarfile.TarInfo("sa_1.png")
        member.size = len(picture(7))
        tar.addfile(member, io.BytesIO(picture(7)))
    yield _case("member replaced by tar -r", "a.tar", updated.getvalue(), {"sa_1": picture(7)}, "sa_1", either=True)


NAMES = {
    "spaces": "my photo 1.png",
    "unicode NFC": "Zürich.png",
    "unicode NFD": "Zu\u0308rich.png",
    "CJK and emoji": "猫🐈.png",
    "newline": "a\nb.png",
    "tab": "a\tb.png",
    "quotes": 'it\'s "x".png',
    "backslash": "a\\b.png",
    "glob characters": "[a]*?.png",
    "braces": "{1,2}.png",
    "percent and dollar": "50%$HOME.png",
    "leading dash": "-rf.png",
    "two dots": "a..b.png",
    "many dots": "a.b.c.d.png",
    "upper-case suffix": "A.PNG",
    "comma": "a,b.png",
    "200 bytes": "n" * 200 + ".png",
    "250 bytes": "n" * 246 + ".png",
    "trailing space": "a .png",
    "leading space": " a.png",
    "control character": "a\x1bb.png",
    "right to left": "\u202eabc.png",
}


def filled(make: Callable[[Path], object], folder: Path) -> object:
    """Return what the product finds in a folder that a function fills."""
    images = folder / "images"
    images.mkdir()
    make(images)
    return contents(str(images), folder / "index")


def folder_case(
    title: str, files: Files, expected: Mapping[str, bytes] | None = {}, error: tuple[str, ...] | None = None
) -> Case:
    """Return a case of a folder with some files."""
    right = None if expected is None else items(expected or keyed(files, folders=True))
    return Case("folders", f"folder: {title}", partial(filled, partial(fill, files)), right, error)


def _names() -> Iterator[Case]:
    for title, name in NAMES.items():
        files = {name: picture(1), f"sub/{name}": picture(1), "other.png": picture(2)}
        key = PurePosixPath(name).stem
        expected = {key: picture(1), "other": picture(2)}
        plain = {name: picture(1), "other.png": picture(2)}
        for kind, code in (("GNU", tarfile.GNU_FORMAT), ("PAX", tarfile.PAX_FORMAT)):
            act = partial(_location, "a.tar", tar_bytes(plain, code))
            yield Case("archives", f"name with {title}, {kind} tar", act, items(expected), _odd(title, name))
        if title != "backslash":
            act = partial(_location, "a.tar.gz", gzip.compress(tar_bytes(plain)))
            yield Case("archives", f"name with {title}, tar.gz", act, items(expected), _odd(title, name))
        yield folder_case(f"name with {title}", files, error=_odd(title, name))
    for title, prefix in (("./", "./"), ("absolute", "/data/"), ("..", "../"), ("// ", "//x/"), ("././", "././")):
        files = {f"{prefix}{name}": content for name, content in FILES.items()}
        yield _case(
            f"members with {title}", "a.tar", tar_bytes(files), keyed(FILES), either=title not in ("./", "././")
        )
    latin = tar_bytes({"Z\udcfcrich.png": picture(1)}, tarfile.GNU_FORMAT)
    yield Case("archives", "Latin-1 name, tar", partial(_location, "a.tar", latin), anything, ("a.tar", "rich.png"))
    yield folder_case("Latin-1 name", {"Z\udcfcrich.png": picture(1)}, None, error=("rich.png",))


def _odd(title: str, name: str) -> tuple[str, ...] | None:
    """Return the words of an error that is honest for names that cannot be keys; None for ordinary names."""
    return (name,) if title in ("newline", "control character", "tab") else None


def _damage(seed: int) -> Iterator[Case]:
    plain, expected = tar_bytes(FILES), keyed(FILES)
    whole = gzip.compress(plain)
    data = len(plain.rstrip(b"\0"))
    places = [100, 511, 512, 700, 1024, data // 3, data // 2, data - 1, data, -(-data // 512) * 512]
    for place in [*places, -(-data // 512) * 512 + 512, len(plain) - 1]:
        yield _case(f"tar cut to {place} of {len(plain)}", "a.tar", plain[:place], expected, either=True)
        yield _case(
            f"gzipped tar, cut to {place} before", "a.tar.gz", gzip.compress(plain[:place]), expected, either=True
        )
    for place in (1, 2, 9, 15, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 8, len(whole) - 1):
        yield _case(f"gzip cut to {place} of {len(whole)}", "a.tar.gz", whole[:place], expected, either=True)
    tails = {
        "garbage": b"garbage" * 100,
        "text": b"\n",
        "zeros": bytes(51200),
        "another tar": tar_bytes({"z.png": b"x"}),
    }
    for title, tail in tails.items():
        more = {**expected, "z": b"x"} if title == "another tar" else expected
        yield _case(f"tar followed by {title}", "a.tar", plain + tail, more, either=True)
        yield _case(f"gzip followed by {title}", "a.tar.gz", whole + tail, more, either=True)
        yield _case(f"gzipped tar followed by {title}", "a.tar.gz", gzip.compress(plain + tail), more, either=True)
    yield _case(
        "block of zeros in the middle", "a.tar", plain[:1024] + bytes(1024) + plain[1024:], expected, either=True
    )
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        members = tar.getmembers()
    rng = np.random.default_rng(seed)
    for number in range(60):
        content = bytearray(plain)
        place = members[number % len(members)].offset + int(rng.integers(0, 512))
        content[place] ^= int(rng.integers(1, 256))
        yield _case(f"flipped byte {place} of a header", "a.tar", bytes(content), expected, either=True)
        flipped = bytearray(whole)
        flipped[int(rng.integers(10, len(whole)))] ^= int(rng.integers(1, 256))
        yield _case(f"gzip, flipped byte {number}", "a.tar.gz", bytes(flipped), expected, either=True)
    huge = bytearray(plain[:512])
    huge[124:136] = b"77777777777\0"
    huge[148:156] = b"        "
    huge[148:156] = b"%06o\0 " % sum(huge)
    yield _case("header of a huge member", "a.tar", bytes(huge) + plain[512:], None)
