"""Label maps: encodings, sizes, void values and settings."""

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

from scripts.file_catalogue.case import Case, WrongError
from scripts.file_catalogue.picture import saved, scene
from scripts.file_catalogue.pictures import tiff_file
from scripts.file_catalogue.png import chunk, png
from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.benchmark import Benchmark

Labels = NDArray[np.integer[Any]]
SIZE = (24, 36)
WORDS = ("dot", "red", "green", "blue", "yellow", "white", "black", "grain", "toy", "sculpture", "origami")


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


def benchmark_of(files: dict[str, bytes], description: str, folder: Path) -> Path:
    root = folder / "bench"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "benchmark.yaml").write_text(description)
    return root


def read(files: dict[str, bytes], description: str, folder: Path) -> Benchmark:
    benchmark = Benchmark(str(benchmark_of(files, description, folder)))
    benchmark.open()
    return benchmark


def first(files: dict[str, bytes], description: str, folder: Path) -> Labels:
    ids: Labels = read(files, description, folder)[0].labels.numpy().astype(np.int64)
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


def case(
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
    act = partial(first, files, describe(classes, extra or kind(pattern)))
    wrong = (name,) if words is None else words
    right = None if expected is None else same(expected)
    return Case("labels", title, act, right, wrong if either or expected is None else None)


def gray(values: Labels, bits: int = 8, **options: Any) -> bytes:
    return png(values[..., None], 0, bits, **options)


def _pgm(values: Labels, maximum: int) -> bytes:
    raw = values.astype(">u2" if maximum > 255 else np.uint8).tobytes()
    return f"P5\n{values.shape[1]} {values.shape[0]}\n{maximum}\n".encode() + raw


def _tiff(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


def paletted(values: Labels, kind_of_file: str, **options: Any) -> bytes:
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([(11 * i + 5) % 256 for i in range(768)])
    return saved(image, kind_of_file, **options)


def _encodings() -> Iterator[Case]:
    few, some, many = bands([0, 1]), bands(range(11)), bands(range(30))
    for bits in (1, 2, 4, 8, 16):
        values = bands(range(min(2**bits, 11)))
        classes = max(2, min(2**bits, 11))
        for interlaced in (False, True):
            content = gray(values, bits, interlaced=interlaced)
            yield case(f"png gray {bits} bit{' interlaced' * interlaced}", "a.png", content, values, classes)
        if bits < 16:
            table = chunk(b"PLTE", bytes((7 * i) % 256 for i in range(3 * 2**bits)))
            yield case(f"png palette {bits} bit", "a.png", png(values[..., None], 3, bits, table), values, classes)
            clear = table + chunk(b"tRNS", b"\0")
            yield case(f"png palette {bits} bit tRNS", "a.png", png(values[..., None], 3, bits, clear), values, classes)
        named = gray(values, bits, before=chunk(b"tRNS", b"\0\0"))
        yield case(f"png gray {bits} bit tRNS", "a.png", named, values, classes, either=True)
        with_gamma = gray(values, bits, before=chunk(b"gAMA", b"\0\0\xb1\x8f"))
        yield case(f"png gray {bits} bit gAMA", "a.png", with_gamma, values, classes)
        profile = gray(values, bits, before=chunk(b"tEXt", b"k\0" + b"x" * (2 << 20)))
        yield case(f"png gray {bits} bit text 2 MB", "a.png", profile, values, classes)
    wide = bands([0, 1, 299, 257])
    yield case("png gray 16 bit, 300 classes", "a.png", gray(wide, 16), wide, 300)
    yield case("png gray 8 bit, 30 classes", "a.png", gray(many), many, 30)
    three = np.stack([some] * 3, -1)
    for title, content in {
        "png RGB": png(three, 2, 8),
        "png RGBA": png(np.concatenate([three, three[..., :1]], -1), 6, 8),
        "png gray and alpha": png(np.stack([some, np.full_like(some, 255)], -1), 4, 8),
    }.items():
        yield case(title, "a.png", content, some, 11, either=True)
    colors = np.stack([some * 20, some, 255 - some], -1)
    yield case("png RGB colors", "a.png", png(colors, 2, 8), None, 11)
    for name, content in {
        "a.bmp": paletted(some, "bmp"),
        "a.gif": paletted(some, "gif", optimize=False),
        "a.tif": _tiff(some.astype(np.uint8)),
        "a.tiff": _tiff(some.astype(np.uint16)),
        "a.pgm": _pgm(some, 255),
        "a.TIF": paletted(some, "tiff"),
    }.items():
        yield case(f"{name} by its suffix", name, content, some, 11, either=name == "a.gif")
    gray_bmp = saved(Image.fromarray(some.astype(np.uint8)), "bmp")
    yield case("bmp gray", "a.bmp", gray_bmp, some, 11)
    yield case("bmp 1 bit", "a.bmp", saved(Image.fromarray(few > 0), "bmp"), few, 2, either=True)
    optimized = paletted(bands([0, 5, 10]), "gif", optimize=True)  # the encoder renumbers the colors
    yield case("gif, renumbered palette", "a.gif", optimized, bands([0, 1, 2]), 11, either=True)
    two = [Image.fromarray(v.astype(np.uint8)) for v in (some, 10 - some)]
    yield case("gif animated", "a.gif", saved(two[0], "gif", save_all=True, append_images=two[1:]), None, 11)
    yield case("apng", "a.png", saved(two[0], "png", save_all=True, append_images=two[1:]), None, 11)
    yield case("tiff of two pages", "a.tif", _tiff(np.stack([some, some]).astype(np.uint8)), None, 11)
    for dtype in ("uint32", "int32", "int16"):
        yield case(f"tiff {dtype}", "a.tif", _tiff(some.astype(dtype)), some, 11, either=True)
    negative = np.where(some == 3, -1, some).astype(np.int32)
    void = np.where(some == 3, IGNORED, some)
    yield case("tiff int32 with -1 ignored", "a.tif", _tiff(negative), void, 11, kind("{}.tif", "ignored: [-1]"), True)
    yield case("tiff int32 with -1", "a.tif", _tiff(negative), None, 11)
    for dtype in ("float32", "float64", "float16"):
        yield case(f"tiff {dtype}", "a.tif", _tiff(some.astype(dtype)), None, 11)
    for byteorder in ("<", ">"):
        content = _tiff(wide.astype(np.uint16), byteorder=byteorder)
        yield case(f"tiff 16 bit {byteorder}", "a.tif", content, wide, 300)
    for compression in ("zlib", "lzw", "packbits"):
        code = {"lzw": "tiff_lzw", "zlib": "tiff_adobe_deflate"}.get(compression, compression)
        content = saved(Image.fromarray(some.astype(np.uint8)), "tiff", compression=code)
        yield case(f"tiff {compression}", "a.tif", content, some, 11)
    yield case(
        "tiff jpeg", "a.tif", saved(Image.fromarray(some.astype(np.uint8)), "tiff", compression="jpeg"), None, 11
    )
    inverted = _tiff(some.astype(np.uint8), photometric="miniswhite")
    yield case("tiff MinIsWhite", "a.tif", inverted, some, 11, either=True)
    for bits in (1, 2, 4):
        values = bands(range(min(2**bits, 11)))
        digits = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        data = np.packbits(digits.reshape(values.shape[0], -1), axis=1).tobytes()
        content = tiff_file(*SIZE, bits, 1, data)
        yield case(f"tiff gray {bits} bit", "a.tif", content, values, max(2, min(2**bits, 11)), either=True)
    for maximum in (10, 100, 255, 256, 1000, 65535):
        yield case(f"pgm maxval {maximum}", "a.pgm", _pgm(some, maximum), some, 11, either=maximum not in (255, 65535))
    picture = Image.fromarray((some * 20).astype(np.uint8))
    for suffix, format_name, options in (
        (".jpg", "jpeg", {"quality": 75}), (".jpg", "jpeg", {"quality": 100}), (".webp", "webp", {"quality": 90}),
        (".jp2", "jpeg2000", {"irreversible": True}), (".avif", "avif", {"quality": 90}),
    ):  # fmt: skip
        content = saved(picture, format_name, **options)
        yield case(f"{format_name} {options}", f"a{suffix}", content, None, 256)
        if suffix != ".jpg":
            yield case(f"{format_name} {options} named .png", "a.png", content, None, 256)
    yield case("jpeg named .png", "a.png", saved(picture, "jpeg", quality=95), None, 256)
    lossless = saved(Image.fromarray(some.astype(np.uint8)), "webp", lossless=True)
    yield case("webp lossless", "a.webp", lossless, some, 11, either=True)
    exact = saved(Image.fromarray(some.astype(np.uint8)), "jpeg2000", irreversible=False)
    yield case("jpeg 2000 lossless", "a.jp2", exact, some, 11, either=True)
    buffer = io.BytesIO()
    np.save(buffer, some.astype(np.uint8))
    yield case("npy", "a.npy", buffer.getvalue(), some, 11, either=True)
    yield case("npy named .png", "a.png", buffer.getvalue(), some, 11, either=True)
    polygons = json.dumps({"shapes": [{"label": "c1", "points": [[0, 0], [9, 9]]}]}).encode()
    for name, content in {"a.json": polygons, "a.txt": b"0 0.5 0.5 0.1 0.1\n", "a.png": b""}.items():
        yield case(f"{name}, not a label map", name, content, None, 11)
    for title, content in {
        "text": b"hello",
        "html": b"<html>",
        "git-lfs": b"version https://git-lfs.github.com/spec",
    }.items():
        yield case(f"{title} named .png", "a.png", content, None, 11)
    whole = gray(some)
    for left in (9, 30, 50, len(whole) // 2, len(whole) - 20, len(whole) - 12, len(whole) - 1):
        yield case(f"png cut to {left} of {len(whole)}", "a.png", whole[:left], some, 11, either=True)
    damaged = bytearray(whole)
    damaged[60] ^= 255
    yield case("png with a flipped byte", "a.png", bytes(damaged), None, 11)


def _values() -> Iterator[Case]:
    some = bands([0, 1, 2])
    void = bands([0, 1, 255])
    ids = np.where(void == 255, IGNORED, void)
    yield case("void 255 by default", "a.png", gray(void), ids, 2)
    yield case("void 255 in a palette", "a.png", paletted(void, "png"), ids, 2)
    yield case("void 65535, not declared", "a.png", gray(bands([0, 1, 65535]), 16), None, 2)
    declared = kind("{}.png", "ignored: [65535]")
    yield case("void 65535 declared", "a.png", gray(bands([0, 1, 65535]), 16), ids, 2, declared)
    yield case("void 255 where only 65535 is declared", "a.png", gray(void), None, 2, declared)
    yield case("void 11 of 11 classes", "a.png", gray(bands(range(12))), None, 11)
    eleven = np.where(bands(range(12)) == 11, IGNORED, bands(range(12)))
    yield case("void 11 declared", "a.png", gray(bands(range(12))), eleven, 11, kind("{}.png", "ignored: [11]"))
    yield case("void 255 with 256 classes", "a.png", gray(void), void, 256, either=True, words=("255",))
    yield case("value without a class", "a.png", gray(some), None, 2, words=("a.png", "2"))
    mapped = kind("{}.png", "label_map: {0: 0, 255: 1}")
    yield case("label_map of 255", "a.png", gray(bands([0, 255])), bands([0, 1]), 2, mapped)
    yield case("label_map, unmapped value", "a.png", gray(bands([0, 7, 255])), None, 2, mapped, words=("a.png", "7"))
    swapped = kind("{}.png", "label_map: {0: 1, 1: 0}")
    yield case("label_map swaps", "a.png", gray(bands([0, 1])), bands([1, 0]), 2, swapped)
    joined = kind("{}.png", "label_map: {0: 0, 1: 1, 2: 1}")
    yield case("label_map joins", "a.png", gray(some), bands([0, 1, 1]), 2, joined)
    big = kind("{}.png", "label_map: {0: 0, 65535: 1}")
    yield case("label_map of 65535", "a.png", gray(bands([0, 65535]), 16), bands([0, 1]), 2, big)
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
        act = partial(first, {"images/a.png": IMAGE_PNG, "labels/a.png": gray(bands([0, 1]))}, describe(2, extra))
        yield Case("labels", title, act, right if not settings else None, (word,))
    reduced = kind("{}.png", "reduce_zero_label: true")
    zero = np.where(some == 0, IGNORED, some - 1)
    yield case("reduce_zero_label", "a.png", gray(some), zero, 2, reduced)
    with_255 = bands([0, 1, 2, 255])
    zero = np.where(np.isin(with_255, [0, 255]), IGNORED, with_255 - 1)
    yield case("reduce_zero_label with 255", "a.png", gray(with_255), zero, 2, reduced)
    yield case("reduce_zero_label, value too large", "a.png", gray(bands([0, 1, 3])), None, 2, reduced)
    for height, width in ((23, 36), (24, 35), (36, 24), (48, 72), (1, 1)):
        content = gray(bands([0, 1], height, width))
        yield case(f"labels of size {height} x {width}", "a.png", content, None, 2)
