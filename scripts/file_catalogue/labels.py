"""Label maps and benchmarks: encodings, sizes, void values, settings, suffixes and EXIF orientations."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scripts.file_catalogue.archives import CONFIG
from scripts.file_catalogue.case import Case, Ran, Same, WrongError, anything, spar
from scripts.file_catalogue.images import labels as predicted
from scripts.file_catalogue.images import predict, upright, with_orientation
from scripts.file_catalogue.pictures import RGB, chunk, png, saved, scene, tiff_file
from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.benchmark import Benchmark

Labels = NDArray[np.integer[Any]]
SIZE = (24, 36)
WORDS = ("disc", "ring", "triangle", "diamond", "cross", "square", "stripe", "grain", "toy", "sculpture", "origami")


def bands(values: Sequence[int], height: int = SIZE[0], width: int = SIZE[1]) -> Labels:
    """Return vertical bands (H, W) of some values; the first row has only the first."""
    table = np.asarray(values, np.int64)[np.arange(width) * len(values) // width]
    rows = np.broadcast_to(table, (height, width)).copy()
    rows[0] = values[0]
    return rows


def describe(classes: int, extra: str = "") -> str:
    """Return a benchmark.yaml."""
    names = "".join(
        f"  - {{label: c{i}, names: [{WORDS[i] if i < len(WORDS) else f'n{i}'}]}}\n" for i in range(classes)
    )
    return f"classes:\n{names}{extra}"


def kind(name: str, settings: str = "") -> str:
    """Return the `labels` entry of a benchmark.yaml."""
    return f"labels: [{{file: 'labels/{name}'{settings and ', '}{settings}}}]\n"


def _benchmark(files: dict[str, bytes], description: str, folder: Path) -> Path:
    root = folder / "bench"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "benchmark.yaml").write_text(description)
    return root


def _read(files: dict[str, bytes], description: str, folder: Path) -> Benchmark:
    benchmark = Benchmark(str(_benchmark(files, description, folder)))
    benchmark.open()
    return benchmark


def _first(files: dict[str, bytes], description: str, folder: Path) -> Labels:
    ids: Labels = _read(files, description, folder)[0].labels.numpy().astype(np.int64)
    return ids


def same(expected: Labels) -> Callable[[Labels], None]:
    """Return a check that class ids (H, W) are those of an array."""

    def check(found: Labels) -> None:
        if found.shape != expected.shape:
            raise WrongError(f"labels {found.shape}, expected {expected.shape}")
        if not np.array_equal(found, expected):
            raise WrongError(f"ids {np.unique(found).tolist()}, expected {np.unique(expected).tolist()}")

    return check


IMAGE = scene(*SIZE)
IMAGE_PNG = saved(Image.fromarray(IMAGE), "png")


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    yield from _encodings()
    yield from _values()
    yield from _files()
    yield from _orientations()
    yield from _counts()


def _case(
    title: str,
    name: str,
    content: bytes,
    expected: Labels | None,
    classes: int,
    extra: str = "",
    either: bool = False,
    words: tuple[str, ...] | None = None,
) -> Case:
    pattern = "{}" + name.removeprefix("a")
    files = {"images/a.png": IMAGE_PNG, f"labels/{name}": content}
    act = partial(_first, files, describe(classes, extra or kind(pattern)))
    wrong = (name,) if words is None else words
    right = None if expected is None else same(expected)
    return Case("labels", title, act, right, wrong if either or expected is None else None)


def _gray(values: Labels, bits: int = 8, **options: Any) -> bytes:
    return png(values[..., None], 0, bits, **options)


def _pgm(values: Labels, maximum: int) -> bytes:
    raw = values.astype(">u2" if maximum > 255 else np.uint8).tobytes()
    return f"P5\n{values.shape[1]} {values.shape[0]}\n{maximum}\n".encode() + raw


def _tiff(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


def _paletted(values: Labels, kind_of_file: str, **options: Any) -> bytes:
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([(11 * i + 5) % 256 for i in range(768)])
    return saved(image, kind_of_file, **options)


def _encodings() -> Iterator[Case]:
    few, some, many = bands([0, 1]), bands(range(11)), bands(range(30))
    for bits in (1, 2, 4, 8, 16):
        values = bands(range(min(2**bits, 11)))
        classes = max(2, min(2**bits, 11))
        for interlaced in (False, True):
            content = _gray(values, bits, interlaced=interlaced)
            yield _case(f"png gray {bits} bit{' interlaced' * interlaced}", "a.png", content, values, classes)
        if bits < 16:
            table = chunk(b"PLTE", bytes((7 * i) % 256 for i in range(3 * 2**bits)))
            yield _case(f"png palette {bits} bit", "a.png", png(values[..., None], 3, bits, table), values, classes)
            clear = table + chunk(b"tRNS", b"\0")
            yield _case(
                f"png palette {bits} bit tRNS", "a.png", png(values[..., None], 3, bits, clear), values, classes
            )
        named = _gray(values, bits, before=chunk(b"tRNS", b"\0\0"))
        yield _case(f"png gray {bits} bit tRNS", "a.png", named, values, classes, either=True)
        with_gamma = _gray(values, bits, before=chunk(b"gAMA", b"\0\0\xb1\x8f"))
        yield _case(f"png gray {bits} bit gAMA", "a.png", with_gamma, values, classes)
        profile = _gray(values, bits, before=chunk(b"tEXt", b"k\0" + b"x" * (2 << 20)))
        yield _case(f"png gray {bits} bit text 2 MB", "a.png", profile, values, classes)
    wide = bands([0, 1, 299, 257])
    yield _case("png gray 16 bit, 300 classes", "a.png", _gray(wide, 16), wide, 300)
    yield _case("png gray 8 bit, 30 classes", "a.png", _gray(many), many, 30)
    three = np.stack([some] * 3, -1)
    for title, content in {
        "png RGB": png(three, 2, 8),
        "png RGBA": png(np.concatenate([three, three[..., :1]], -1), 6, 8),
        "png gray and alpha": png(np.stack([some, np.full_like(some, 255)], -1), 4, 8),
    }.items():
        yield _case(title, "a.png", content, some, 11, either=True)
    colors = np.stack([some * 20, some, 255 - some], -1)
    yield _case("png RGB colors", "a.png", png(colors, 2, 8), None, 11)
    for name, content in {
        "a.bmp": _paletted(some, "bmp"),
        "a.gif": _paletted(some, "gif", optimize=False),
        "a.tif": _tiff(some.astype(np.uint8)),
        "a.tiff": _tiff(some.astype(np.uint16)),
        "a.pgm": _pgm(some, 255),
        "a.TIF": _paletted(some, "tiff"),
    }.items():
        yield _case(f"{name} by its suffix", name, content, some, 11, either=name == "a.gif")
    gray_bmp = saved(Image.fromarray(some.astype(np.uint8)), "bmp")
    yield _case("bmp gray", "a.bmp", gray_bmp, some, 11)
    yield _case("bmp 1 bit", "a.bmp", saved(Image.fromarray(few > 0), "bmp"), few, 2, either=True)
    optimized = _paletted(bands([0, 5, 10]), "gif", optimize=True)  # the encoder renumbers the colors
    yield _case("gif, renumbered palette", "a.gif", optimized, bands([0, 1, 2]), 11, either=True)
    two = [Image.fromarray(v.astype(np.uint8)) for v in (some, 10 - some)]
    yield _case("gif animated", "a.gif", saved(two[0], "gif", save_all=True, append_images=two[1:]), None, 11)
    yield _case("apng", "a.png", saved(two[0], "png", save_all=True, append_images=two[1:]), None, 11)
    yield _case("tiff of two pages", "a.tif", _tiff(np.stack([some, some]).astype(np.uint8)), None, 11)
    for dtype in ("uint32", "int32", "int16"):
        yield _case(f"tiff {dtype}", "a.tif", _tiff(some.astype(dtype)), some, 11, either=True)
    negative = np.where(some == 3, -1, some).astype(np.int32)
    void = np.where(some == 3, IGNORED, some)
    yield _case("tiff int32 with -1 ignored", "a.tif", _tiff(negative), void, 11, kind("{}.tif", "ignored: [-1]"), True)
    yield _case("tiff int32 with -1", "a.tif", _tiff(negative), None, 11)
    for dtype in ("float32", "float64", "float16"):
        yield _case(f"tiff {dtype}", "a.tif", _tiff(some.astype(dtype)), None, 11)
    for byteorder in ("<", ">"):
        content = _tiff(wide.astype(np.uint16), byteorder=byteorder)
        yield _case(f"tiff 16 bit {byteorder}", "a.tif", content, wide, 300)
    for compression in ("zlib", "lzw", "packbits"):
        code = {"lzw": "tiff_lzw", "zlib": "tiff_adobe_deflate"}.get(compression, compression)
        content = saved(Image.fromarray(some.astype(np.uint8)), "tiff", compression=code)
        yield _case(f"tiff {compression}", "a.tif", content, some, 11)
    yield _case(
        "tiff jpeg", "a.tif", saved(Image.fromarray(some.astype(np.uint8)), "tiff", compression="jpeg"), None, 11
    )
    inverted = _tiff(some.astype(np.uint8), photometric="miniswhite")
    yield _case("tiff MinIsWhite", "a.tif", inverted, some, 11, either=True)
    for bits in (1, 2, 4):
        values = bands(range(min(2**bits, 11)))
        digits = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        data = np.packbits(digits.reshape(values.shape[0], -1), axis=1).tobytes()
        content = tiff_file(*SIZE, bits, 1, data)
        yield _case(f"tiff gray {bits} bit", "a.tif", content, values, max(2, min(2**bits, 11)), either=True)
    for maximum in (10, 100, 255, 256, 1000, 65535):
        yield _case(f"pgm maxval {maximum}", "a.pgm", _pgm(some, maximum), some, 11, either=maximum not in (255, 65535))
    picture = Image.fromarray((some * 20).astype(np.uint8))
    for suffix, format_name, options in (
        (".jpg", "jpeg", {"quality": 75}), (".jpg", "jpeg", {"quality": 100}), (".webp", "webp", {"quality": 90}),
        (".jp2", "jpeg2000", {"irreversible": True}), (".avif", "avif", {"quality": 90}),
    ):  # fmt: skip
        content = saved(picture, format_name, **options)
        yield _case(f"{format_name} {options}", f"a{suffix}", content, None, 256)
        if suffix != ".jpg":
            yield _case(f"{format_name} {options} named .png", "a.png", content, None, 256)
    yield _case("jpeg named .png", "a.png", saved(picture, "jpeg", quality=95), None, 256)
    lossless = saved(Image.fromarray(some.astype(np.uint8)), "webp", lossless=True)
    yield _case("webp lossless", "a.webp", lossless, some, 11, either=True)
    exact = saved(Image.fromarray(some.astype(np.uint8)), "jpeg2000", irreversible=False)
    yield _case("jpeg 2000 lossless", "a.jp2", exact, some, 11, either=True)
    buffer = io.BytesIO()
    np.save(buffer, some.astype(np.uint8))
    yield _case("npy", "a.npy", buffer.getvalue(), some, 11, either=True)
    yield _case("npy named .png", "a.png", buffer.getvalue(), some, 11, either=True)
    polygons = json.dumps({"shapes": [{"label": "c1", "points": [[0, 0], [9, 9]]}]}).encode()
    for name, content in {"a.json": polygons, "a.txt": b"0 0.5 0.5 0.1 0.1\n", "a.png": b""}.items():
        yield _case(f"{name}, not a label map", name, content, None, 11)
    for title, content in {
        "text": b"hello",
        "html": b"<html>",
        "git-lfs": b"version https://git-lfs.github.com/spec",
    }.items():
        yield _case(f"{title} named .png", "a.png", content, None, 11)
    whole = _gray(some)
    for left in (9, 30, 50, len(whole) // 2, len(whole) - 20, len(whole) - 12, len(whole) - 1):
        yield _case(f"png cut to {left} of {len(whole)}", "a.png", whole[:left], some, 11, either=True)
    damaged = bytearray(whole)
    damaged[60] ^= 255
    yield _case("png with a flipped byte", "a.png", bytes(damaged), None, 11)


def _values() -> Iterator[Case]:
    some = bands([0, 1, 2])
    void = bands([0, 1, 255])
    ids = np.where(void == 255, IGNORED, void)
    yield _case("void 255 by default", "a.png", _gray(void), ids, 2)
    yield _case("void 255 in a palette", "a.png", _paletted(void, "png"), ids, 2)
    yield _case("void 65535, not declared", "a.png", _gray(bands([0, 1, 65535]), 16), None, 2)
    declared = kind("{}.png", "ignored: [65535]")
    yield _case("void 65535 declared", "a.png", _gray(bands([0, 1, 65535]), 16), ids, 2, declared)
    yield _case("void 255 where only 65535 is declared", "a.png", _gray(void), None, 2, declared)
    yield _case("void 11 of 11 classes", "a.png", _gray(bands(range(12))), None, 11)
    eleven = np.where(bands(range(12)) == 11, IGNORED, bands(range(12)))
    yield _case("void 11 declared", "a.png", _gray(bands(range(12))), eleven, 11, kind("{}.png", "ignored: [11]"))
    yield _case("void 255 with 256 classes", "a.png", _gray(void), void, 256, either=True, words=("255",))
    yield _case("value without a class", "a.png", _gray(some), None, 2, words=("a.png", "2"))
    mapped = kind("{}.png", "label_map: {0: 0, 255: 1}")
    yield _case("label_map of 255", "a.png", _gray(bands([0, 255])), bands([0, 1]), 2, mapped)
    yield _case("label_map, unmapped value", "a.png", _gray(bands([0, 7, 255])), None, 2, mapped, words=("a.png", "7"))
    swapped = kind("{}.png", "label_map: {0: 1, 1: 0}")
    yield _case("label_map swaps", "a.png", _gray(bands([0, 1])), bands([1, 0]), 2, swapped)
    joined = kind("{}.png", "label_map: {0: 0, 1: 1, 2: 1}")
    yield _case("label_map joins", "a.png", _gray(some), bands([0, 1, 1]), 2, joined)
    big = kind("{}.png", "label_map: {0: 0, 65535: 1}")
    yield _case("label_map of 65535", "a.png", _gray(bands([0, 65535]), 16), bands([0, 1]), 2, big)
    for title, settings, word in (
        ("label_map to no class", "label_map: {0: 0, 1: 7}", "7"),
        ("label_map to a negative class", "label_map: {0: 0, 1: -1}", "-1"),
        ("label_map empty", "label_map: {}", "label_map"),
        ("label_map and ignored contradict", "label_map: {0: 0, 1: 1}, ignored: [1]", "1"),
        ("ignored names a class", "ignored: [1]", "1"),
        ("ignored names all classes", "ignored: [0, 1]", "0"),
        ("reduce_zero_label and label_map", "reduce_zero_label: true, label_map: {1: 0, 2: 1}", "label_map"),
        ("ignored is text", "ignored: [void]", "ignored"),
        ("unknown key", "void: 255", "void"),
        ("no {} in the pattern", "", "labels"),
    ):
        extra = kind("{}.png", settings) if settings else "labels: [{file: labels/a.png}]\n"
        right = same(bands([0, 1])) if not settings or title == "reduce_zero_label and label_map" else None
        act = partial(_first, {"images/a.png": IMAGE_PNG, "labels/a.png": _gray(bands([0, 1]))}, describe(2, extra))
        yield Case("labels", title, act, right if not settings else None, (word,))
    reduced = kind("{}.png", "reduce_zero_label: true")
    zero = np.where(some == 0, IGNORED, some - 1)
    yield _case("reduce_zero_label", "a.png", _gray(some), zero, 2, reduced)
    with_255 = bands([0, 1, 2, 255])
    zero = np.where(np.isin(with_255, [0, 255]), IGNORED, with_255 - 1)
    yield _case("reduce_zero_label with 255", "a.png", _gray(with_255), zero, 2, reduced)
    yield _case("reduce_zero_label, value too large", "a.png", _gray(bands([0, 1, 3])), None, 2, reduced)
    for height, width in ((23, 36), (24, 35), (36, 24), (48, 72), (1, 1)):
        content = _gray(bands([0, 1], height, width))
        yield _case(f"labels of size {height} x {width}", "a.png", content, None, 2)


def _set(
    title: str, files: Sequence[str], names: list[str] | None, word: str = "", extra: str = "", said: str = ""
) -> Case:
    """Return a case of a benchmark whose files are images and label maps by folder; `names` are those evaluated."""
    made = {}
    for name in files:
        is_label = name.startswith("labels/")
        suffix = Path(name).suffix.lower().lstrip(".")
        image = Image.fromarray(bands([0, 1]).astype(np.uint8)) if is_label else Image.fromarray(IMAGE)
        format_name = {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
        made[name] = saved(image, format_name) if format_name in ("png", "jpeg", "tiff", "bmp", "webp") else b"x"

    def act(folder: Path) -> list[str]:
        benchmark = _read(made, describe(2, extra), folder)
        benchmark.digest()
        return sorted(
            benchmark[i].key if hasattr(benchmark[i], "key") else benchmark.stems[i] for i in range(len(benchmark))
        )

    def right(found: list[str]) -> None:
        if found != names:
            raise WrongError(f"evaluates {found}, expected {names}")

    error = (word,) if word else None
    return Case("labels", f"files: {title}", act, None if names is None else right, error, (said,) if said else ())


def _files() -> Iterator[Case]:
    yield _set("pairs", ["images/a.png", "images/b.jpg", "labels/a.png", "labels/b.png"], ["a", "b"])
    for suffix in (".JPG", ".jpeg", ".JPEG", ".PNG", ".Png", ".tif", ".bmp", ".webp"):
        files = ["images/a.png", f"images/b{suffix}", "labels/a.png", "labels/b.png"]
        yield _set(f"image b{suffix}", files, ["a", "b"], f"b{suffix}")
    yield _set("label a.PNG", ["images/a.png", "labels/a.PNG"], ["a"], "a.png")
    yield _set("image without labels", ["images/a.png", "images/b.png", "labels/a.png"], None, "b")
    yield _set("labels without image", ["images/a.png", "labels/a.png", "labels/b.png"], ["a"], "b", said="b")
    yield _set("two images of one name", ["images/a.png", "images/a.jpg", "labels/a.png"], None, "a")
    yield _set("subfolders", ["images/x/a.png", "images/y/a.png", "labels/x/a.png", "labels/y/a.png"], ["x/a", "y/a"])
    yield _set("hidden files", ["images/a.png", "images/._a.png", "images/.b/c.png", "labels/a.png"], ["a"])
    yield _set("__MACOSX", ["images/a.png", "images/__MACOSX/b.png", "labels/a.png"], ["a"])
    yield _set("other files", ["images/a.png", "images/Thumbs.db", "images/readme.txt", "labels/a.png"], ["a"])
    yield _set("no images", ["labels/a.png"], None, "images")
    yield _set("no labels folder", ["images/a.png"], None, "a")
    for name in ("my photo", "Zürich", "Zu\u0308rich", "猫", "a,b", "a{1}b", "[a]", "a.b.c", "-a", "a\nb", "n" * 240,
                 "a\udcfcb", "%s", "a;b", "a'b\""):  # fmt: skip
        yield _set(f"image named {name[:20]!r}", [f"images/{name}.png", f"labels/{name}.png"], [name])
    for title, content, names, word in (
        ("lines", "a\nb\n", ["a", "b"], ""),
        ("CRLF, BOM and blanks", "\ufeffa \r\n\r\n b\r\n", ["a", "b"], ""),
        ("a part", "b\n", ["b"], ""),
        ("unknown name", "a\nc\n", None, "c"),
        ("empty", "", None, "val.txt"),
        ("name twice", "a\na\n", None, "a"),
        ("with suffix", "a.png\n", None, "a.png"),
    ):

        def act(folder: Path, content: str = content) -> list[str]:
            pair = {"images/a.png": IMAGE_PNG, "images/b.png": IMAGE_PNG}
            pair |= {"labels/a.png": _gray(bands([0, 1])), "labels/b.png": _gray(bands([0, 1]))}
            benchmark = _read({**pair, "val.txt": content.encode()}, describe(2, "split: val.txt\n"), folder)
            benchmark.digest()
            for i in range(len(benchmark)):
                benchmark[i]
            return benchmark.stems

        def right(found: list[str], names: list[str] | None = names) -> None:
            if found != names:
                raise WrongError(f"evaluates {found}, expected {names}")

        yield Case("labels", f"split: {title}", act, right if names else None, (word,) if word else None)
    good = describe(2)
    for title, text, word in (
        ("UTF-16", good.encode("utf-16"), "benchmark.yaml"),
        ("not YAML", b"classes: [", "benchmark.yaml"),
        ("empty", b"", "benchmark.yaml"),
        ("list", b"- a\n- b\n", "benchmark.yaml"),
        ("no classes", b"classes: []\n", "classes"),
        ("classes missing", b"images: ['images/{}.png']\n", "classes"),
        ("class without names", b"classes: [{label: a, names: []}, {label: b, names: [b]}]\n", "a"),
        ("same name in two classes", b"classes: [{label: a, names: [x]}, {label: b, names: [x]}]\n", "x"),
        ("same label twice", b"classes: [{label: a, names: [x]}, {label: a, names: [y]}]\n", "a"),
        ("YAML no", b"classes: [{label: yes, names: [no]}, {label: b, names: [y]}]\n", "benchmark.yaml"),
        ("image pattern without {}", good.encode() + b"images: [images/a.png]\n", "images"),
        ("resize 0", good.encode() + b"resize: 0\n", "resize"),
        ("unknown key", good.encode() + b"labells: 3\n", "labells"),
    ):

        def odd(folder: Path, text: bytes = text) -> object:
            root = _benchmark({"images/a.png": IMAGE_PNG, "labels/a.png": _gray(bands([0, 1]))}, "", folder)
            (root / "benchmark.yaml").write_bytes(text)
            benchmark = Benchmark(str(root))
            benchmark.open()
            return benchmark[0]

        yield Case("labels", f"benchmark.yaml: {title}", odd, None, (word,))
    with_bom = partial(_first, {"images/a.png": IMAGE_PNG, "labels/a.png": _gray(bands([0, 1]))}, "\ufeff" + good)
    yield Case("labels", "benchmark.yaml: BOM", with_bom, same(bands([0, 1])))


def _turned(orientation: int, file_kind: str, labels_upright: bool, folder: Path) -> tuple[Tensor, Labels]:
    suffix = {"jpeg": "jpg", "tiff": "tif"}.get(file_kind, file_kind)
    stored = bands([0, 1, 2])
    shown = upright(np.stack([stored] * 3, -1).astype(np.uint8), orientation)[..., 0].astype(np.int64)
    given = shown if labels_upright else stored
    files = {f"images/a.{suffix}": with_orientation(IMAGE, file_kind, orientation), "labels/a.png": _gray(given)}
    item = _read(files, describe(3, f"images: ['images/{{}}.{suffix}']\n"), folder)[0]
    return item.image, item.labels.numpy().astype(np.int64)


def _orientations() -> Iterator[Case]:
    for file_kind in ("jpeg", "png", "webp", "tiff"):
        lossy = file_kind == "jpeg"
        for orientation in range(1, 9):
            stored = bands([0, 1, 2])
            shown = upright(np.stack([stored] * 3, -1).astype(np.uint8), orientation)[..., 0].astype(np.int64)
            expected = upright(IMAGE, orientation)

            def right(
                found: tuple[Tensor, Labels], shown: Labels = shown, expected: RGB = expected, lossy: bool = lossy
            ) -> None:
                Same(expected, 90 if lossy else 0, 6)(found[0])
                same(shown)(found[1])

            title = f"{file_kind} with orientation {orientation}"
            yield Case("labels", f"{title}, labels upright", partial(_turned, orientation, file_kind, True), right)
            if orientation > 4:
                act = partial(_turned, orientation, file_kind, False)
                yield Case("labels", f"{title}, labels as stored", act, None, ("a.", "EXIF"))
    for orientation in (3, 6):
        turned = with_orientation(np.stack([bands([0, 1])] * 3, -1).astype(np.uint8)[..., 0], "png", orientation)
        yield _case(f"labels with orientation {orientation}", "a.png", turned, None, 2)


def _counts() -> Iterator[Case]:
    """Yield evaluations whose confusion matrix is counted with numpy from the maps of `spar predict`."""
    void = bands([0, 1, 2, 255])
    small = bands([0, 1, 2])
    table = chunk(b"PLTE", bytes(range(12)))
    for title, content in {
        "png gray 8 bit, void 255": _gray(void),
        "png palette, void 255": _paletted(void, "png"),
        "png gray 2 bit": _gray(small, 2),
        "png gray 4 bit": _gray(small, 4),
        "png palette 2 bit": png(small[..., None], 3, 2, table),
        "png gray 16 bit": _gray(small, 16),
    }.items():
        stored = void if "void" in title else small
        yield Case("labels", f"evaluate {title}", partial(_evaluated, content, stored, {}), anything)
    for orientation in (1, 3, 6):
        shown = upright(np.stack([small] * 3, -1).astype(np.uint8), orientation)[..., 0].astype(np.int64)
        act = partial(_evaluated, _gray(shown), shown, {"orientation": orientation})
        yield Case("labels", f"evaluate an image of orientation {orientation}", act, anything)
    for title, content, word in (
        ("JPEG named a.png", saved(Image.fromarray(small.astype(np.uint8)), "jpeg"), "a.png"),
        ("all void", _gray(np.full(SIZE, 255)), "bench"),
        ("value without a class", _gray(bands([0, 1, 9])), "a.png"),
        ("empty", b"", "a.png"),
    ):
        yield Case("labels", f"evaluate {title}", partial(_evaluated, content, small, {}), None, (word,))

    def replaced(folder: Path) -> object:
        first = _evaluated(_gray(small), small, {}, folder)
        (folder / "bench/images/a.png").write_bytes(saved(Image.fromarray(IMAGE[::-1].copy()), "png", compress_level=0))
        return _counted(folder, small) if first.code == 0 else first

    yield Case("labels", "evaluate, image replaced, evaluate", replaced, anything)


def _evaluated(content: bytes, stored: Labels, options: dict[str, int], folder: Path) -> Ran:
    image = with_orientation(IMAGE, "png", options.get("orientation", 1))
    _benchmark({"images/a.png": image, "labels/a.png": content}, describe(3), folder)
    return _counted(folder, stored)


def _counted(folder: Path, stored: Labels) -> Ran:
    """Evaluate folder/bench and compare its counts with those of numpy."""
    (folder / "config.yaml").write_text(CONFIG)
    out = folder / "evaluation"
    ran = spar("evaluate", "--config", folder / "config.yaml", "--benchmarks", folder / "bench", "--out", out)
    if ran.code:
        return ran
    classes = ("--classes", "; ".join(f"c{i}: {WORDS[i]}" for i in range(3)))
    segmented = predict(folder, folder / "bench" / "images" / "a.png", options=classes)
    if segmented.code:
        return segmented
    found = predicted(folder, "a").astype(np.int64)
    counted = stored != 255
    expected = np.zeros((3, 3), np.int64)
    np.add.at(expected, (stored[counted], found[counted]), 1)
    matrices = [np.load(path)["matrix"] for path in (out / "counts").glob("*.npz")]
    if not any(np.array_equal(matrix, expected) for matrix in matrices):
        raise WrongError(f"counts {[matrix.tolist() for matrix in matrices]}, numpy counts {expected.tolist()}")
    rows = [line.rsplit(",", 2) for path in out.glob("per_class/*.csv") for line in path.read_text().splitlines()[1:]]
    pixels = [int(row[1]) for row in rows]
    if pixels != expected.sum(1).tolist():
        raise WrongError(f"per_class lists {pixels} pixels, numpy counts {expected.sum(1).tolist()}")
    return ran
