"""Benchmarks: pairs of files, EXIF orientations, and the counts of `spar evaluate`."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from scripts.file_catalogue.case import Case, Ran, Same, WrongError, anything, spar
from scripts.file_catalogue.folders import CONFIG
from scripts.file_catalogue.images import labels as predicted
from scripts.file_catalogue.images import predict, upright, with_orientation
from scripts.file_catalogue.labels import (
    IMAGE,
    IMAGE_PNG,
    SIZE,
    WORDS,
    Labels,
    bands,
    benchmark_of,
    case,
    describe,
    first,
    gray,
    paletted,
    read,
    same,
)
from scripts.file_catalogue.picture import RGB, saved
from scripts.file_catalogue.png import chunk, png
from spar_lightning.evaluation.benchmark import Benchmark


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    yield from _files()
    yield from _orientations()
    yield from _counts()


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
        benchmark = read(made, describe(2, extra), folder)
        benchmark.digest()
        return sorted(
            benchmark[i].key if hasattr(benchmark[i], "key") else benchmark.stems[i] for i in range(len(benchmark))
        )

    def right(found: list[str]) -> None:
        if found != names:
            raise WrongError(f"evaluates {found}, expected {names}")

    error = (word,) if word else None
    return Case("benchmarks", f"files: {title}", act, None if names is None else right, error, (said,) if said else ())


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
            pair |= {"labels/a.png": gray(bands([0, 1])), "labels/b.png": gray(bands([0, 1]))}
            benchmark = read({**pair, "val.txt": content.encode()}, describe(2, "split: val.txt\n"), folder)
            benchmark.digest()
            for i in range(len(benchmark)):
                benchmark[i]
            return benchmark.stems

        def right(found: list[str], names: list[str] | None = names) -> None:
            if found != names:
                raise WrongError(f"evaluates {found}, expected {names}")

        yield Case("benchmarks", f"split: {title}", act, right if names else None, (word,) if word else None)
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
            root = benchmark_of({"images/a.png": IMAGE_PNG, "labels/a.png": gray(bands([0, 1]))}, "", folder)
            (root / "benchmark.yaml").write_bytes(text)
            benchmark = Benchmark(str(root))
            benchmark.open()
            return benchmark[0]

        yield Case("benchmarks", f"benchmark.yaml: {title}", odd, None, (word,))
    with_bom = partial(first, {"images/a.png": IMAGE_PNG, "labels/a.png": gray(bands([0, 1]))}, "\ufeff" + good)
    yield Case("benchmarks", "benchmark.yaml: BOM", with_bom, same(bands([0, 1])))


def _turned(orientation: int, file_kind: str, labels_upright: bool, folder: Path) -> tuple[Tensor, Labels]:
    suffix = {"jpeg": "jpg", "tiff": "tif"}.get(file_kind, file_kind)
    stored = bands([0, 1, 2])
    shown = upright(np.stack([stored] * 3, -1).astype(np.uint8), orientation)[..., 0].astype(np.int64)
    given = shown if labels_upright else stored
    files = {f"images/a.{suffix}": with_orientation(IMAGE, file_kind, orientation), "labels/a.png": gray(given)}
    item = read(files, describe(3, f"images: ['images/{{}}.{suffix}']\n"), folder)[0]
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
            yield Case("benchmarks", f"{title}, labels upright", partial(_turned, orientation, file_kind, True), right)
            if orientation > 4:
                act = partial(_turned, orientation, file_kind, False)
                yield Case("benchmarks", f"{title}, labels as stored", act, None, ("a.", "EXIF"))
    for orientation in (3, 6):
        turned = with_orientation(np.stack([bands([0, 1])] * 3, -1).astype(np.uint8)[..., 0], "png", orientation)
        yield case(f"labels with orientation {orientation}", "a.png", turned, None, 2)


def _counts() -> Iterator[Case]:
    """Yield evaluations whose confusion matrix is counted with numpy from the maps of `spar predict`."""
    void = bands([0, 1, 2, 255])
    small = bands([0, 1, 2])
    table = chunk(b"PLTE", bytes(range(12)))
    for title, content in {
        "png gray 8 bit, void 255": gray(void),
        "png palette, void 255": paletted(void, "png"),
        "png gray 2 bit": gray(small, 2),
        "png gray 4 bit": gray(small, 4),
        "png palette 2 bit": png(small[..., None], 3, 2, table),
        "png gray 16 bit": gray(small, 16),
    }.items():
        stored = void if "void" in title else small
        yield Case("benchmarks", f"evaluate {title}", partial(_evaluated, content, stored, {}), anything)
    for orientation in (1, 3, 6):
        shown = upright(np.stack([small] * 3, -1).astype(np.uint8), orientation)[..., 0].astype(np.int64)
        act = partial(_evaluated, gray(shown), shown, {"orientation": orientation})
        yield Case("benchmarks", f"evaluate an image of orientation {orientation}", act, anything)
    for title, content, word in (
        ("JPEG named a.png", saved(Image.fromarray(small.astype(np.uint8)), "jpeg"), "a.png"),
        ("all void", gray(np.full(SIZE, 255)), "bench"),
        ("value without a class", gray(bands([0, 1, 9])), "a.png"),
        ("empty", b"", "a.png"),
    ):
        yield Case("benchmarks", f"evaluate {title}", partial(_evaluated, content, small, {}), None, (word,))

    def replaced(folder: Path) -> object:
        first = _evaluated(gray(small), small, {}, folder)
        (folder / "bench/images/a.png").write_bytes(saved(Image.fromarray(IMAGE[::-1].copy()), "png", compress_level=0))
        return _counted(folder, small) if first.code == 0 else first

    yield Case("benchmarks", "evaluate, image replaced, evaluate", replaced, anything)


def _evaluated(content: bytes, stored: Labels, options: dict[str, int], folder: Path) -> Ran:
    image = with_orientation(IMAGE, "png", options.get("orientation", 1))
    benchmark_of({"images/a.png": image, "labels/a.png": content}, describe(3), folder)
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
