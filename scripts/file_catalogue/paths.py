"""Spellings of paths: of images, folders, benchmarks, shards, weights and the output folder."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.file_catalogue.archives import fill
from scripts.file_catalogue.case import Case, Ran, SkippedError, WrongError, anything, spar
from scripts.file_catalogue.folders import CONFIG, cached
from scripts.file_catalogue.images import predict
from scripts.file_catalogue.labels import bands, describe, kind
from scripts.file_catalogue.picture import saved, scene
from scripts.file_catalogue.weight_files import TINY, tiny, torch_bytes

NAMES = {
    "plain": "photos",
    "blank": "my photos",
    "umlaut, NFC": "Zürich",
    "umlaut, NFD": "Zu\u0308rich",
    "CJK and emoji": "猫🐈",
    "not UTF-8": "Z\udcfcrich",
    "newline": "a\nb",
    "leading dash": "-photos",
    "leading dashes": "--out",
    "tilde": "~",
    "tilde first": "~photos",
    "brackets": "photos[1]",
    "asterisk": "photos*",
    "question mark": "photos?",
    "comma": "lr=0.1,wd=0.2",
    "braces": "{1,2}",
    "backslash": "a\\b",
    "semicolon": "a;b",
    "colon": "a:b",
    "equals": "a=b",
    "dollar": "$HOME",
    "percent": "50%",
    "quote": "it's",
    "double quote": 'a"b',
    "hash": "a#b",
    "ampersand": "a&b",
    "exclamation": "a!b",
    "pipe": "a|b",
    "plus": "a+b",
    "hidden": ".photos",
    "trailing dot": "photos.",
    "looks like a file": "photos.jpg",
    "looks like YAML": "photos.yaml",
    "name of a command": "predict",
    "number": "42",
    "null": "null",
    "120 bytes": "n" * 120,
    "240 bytes": "n" * 240,
}
IMAGE = scene(31, 47)
PNG = saved(Image.fromarray(IMAGE), "png")


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    yield from _names()
    yield from _spellings()
    yield from _outputs()


def results(folder: Path) -> list[str]:
    """Return the names of the segmentation maps in folder/out, relative to labels/."""
    root = folder / "out" / "labels"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def _wanted(ran: Ran, folder: Path, *names: str) -> Ran:
    if ran.code == 0 and (found := results(folder)) != sorted(names):
        lost = set(names) - set(found)
        raise (SkippedError if lost else WrongError)(f"results {found}, expected {sorted(names)}")
    return ran


def _names() -> Iterator[Case]:
    for title, name in NAMES.items():
        # Names that begin with a dash are options for any command; the shell writes ./ before them.
        error = (name,) if name.startswith("-") else None
        relative = (name,) if name.startswith(("-", "~")) else None

        def image(name: str, folder: Path) -> Ran:
            file = folder / "images" / f"{name}.png"
            file.parent.mkdir()
            file.write_bytes(PNG)
            return _wanted(predict(folder, file), folder, f"{name}.png")

        def image_in_folder(name: str, folder: Path) -> Ran:
            fill({f"{name}.png": PNG, "other.png": PNG}, folder / "images")
            hidden = name.startswith(".")
            wanted = ["other.png"] if hidden else ["other.png", f"{name}.png"]
            return _wanted(predict(folder, folder / "images"), folder, *wanted)

        def images(name: str, folder: Path) -> Ran:
            fill({"a.png": PNG, "sub/b.png": PNG}, folder / name)
            return _wanted(predict(folder, folder / name), folder, "a.png", "sub/b.png")

        def relative_images(name: str, folder: Path) -> Ran:
            fill({"a.png": PNG}, folder / name)
            os.chdir(folder)
            return _wanted(predict(folder, name), folder, "a.png")

        def out(name: str, folder: Path) -> Ran:
            fill({"a.png": PNG}, folder)
            ran = predict(folder, folder / "a.png", options=("--out", folder / name))
            if ran.code == 0 and not (folder / name / "labels" / "a.png").is_file():
                raise WrongError("no result in --out")
            return ran

        def weights(name: str, folder: Path) -> Ran:
            fill({"a.png": PNG, f"{name}.pt": torch_bytes(dict(tiny()))}, folder)
            return _wanted(
                predict(folder, folder / "a.png", options=("--weights", folder / f"{name}.pt")), folder, "a.png"
            )

        def config(name: str, folder: Path) -> Ran:
            fill({"a.png": PNG, f"{name}.yaml": TINY.encode()}, folder)
            options = ("--config", folder / f"{name}.yaml")
            return _wanted(predict(folder, folder / "a.png", options=options), folder, "a.png")

        def classes(name: str, folder: Path) -> Ran:
            fill({"a.png": PNG, f"{name}.txt": b"red dot\nblue dot\n"}, folder)
            options = ("--classes", folder / f"{name}.txt")
            return _wanted(predict(folder, folder / "a.png", options=options), folder, "a.png")

        def benchmark(name: str, folder: Path) -> Ran:
            root = folder / name
            labels = saved(Image.fromarray(bands([0, 1], 31, 47).astype(np.uint8)), "png")
            fill({f"images/{name}.png": PNG, f"labels/{name}.png": labels}, root)
            (root / "benchmark.yaml").write_text(describe(2, kind("{}.png")))
            (folder / "config.yaml").write_text(CONFIG)
            ran = spar("evaluate", "--config", folder / "config.yaml", "--benchmarks", root, "--out", folder / "result")
            if ran.code == 0 and not (folder / "result" / "results.json").is_file():
                raise WrongError("no results.json")
            return ran

        def shard(name: str, folder: Path) -> Ran:
            large = saved(Image.fromarray(scene(70, 90)), "png")
            fill({"a.png": large, "b.png": large}, folder / name)
            ran = cached(folder / name, folder)
            if ran.code == 0 and "2 of 2 images have features" not in ran.out:
                raise SkippedError(ran.out[-200:])
            return ran

        whole: dict[str, Callable[[str, Path], Ran]] = {
            "image": image, "image in a folder": image_in_folder, "folder of images": images, "--out": out,
            "--weights": weights, "--config": config, "--classes": classes, "--benchmarks": benchmark,
            "data.shards": shard,
        }  # fmt: skip
        for use, act in whole.items():
            odd = name == "Z\udcfcrich" or title == "newline"
            honest = (name,) if odd and use in ("--benchmarks", "data.shards", "--classes") else None
            if use == "--benchmarks" and name.startswith("."):  # hidden files are not images
                honest = ("images",)
            yield Case("paths", f"{use}, {title}", partial(act, name), anything, honest)
        yield Case("paths", f"relative folder, {title}", partial(relative_images, name), anything, error or relative)


def _spellings() -> Iterator[Case]:
    def inside(spelling: str, names: tuple[str, ...], folder: Path) -> Ran:
        fill({"a.png": PNG, "photos/b.png": PNG, "photos/sub/c.png": PNG, "photos/d.jpg": PNG}, folder)
        (folder / "link").symlink_to("photos")
        (folder / "photos" / "loop").symlink_to(".")
        os.chdir(folder / "photos")
        return _wanted(predict(folder, spelling.replace("HERE", str(folder))), folder, *names)

    photos = ("b.png", "d.png", "sub/c.png")
    good = {
        ".": photos, "./": photos, "../photos": photos, "../photos/": photos, "HERE/photos/": photos,
        "HERE//photos": photos, "HERE/photos/../photos": photos, "HERE/link": photos, "HERE/link/": photos,
        "b.png": ("b.png",), "./b.png": ("b.png",), "../a.png": ("a.png",), "*.png": ("b.png",),
        "*.*g": ("b.png", "d.png"),
        "sub/*": ("c.png",), "HERE/photos/[b-c].png": ("b.png",), "?.png": ("b.png",), "s*": ("c.png",),
    }  # fmt: skip
    for spelling, names in good.items():
        yield Case("paths", f"images given as {spelling!r}", partial(inside, spelling, names), anything)
    for spelling in ("**/*.png", "./**"):  # how far a pattern follows links is a matter of taste
        yield Case("paths", f"images given as {spelling!r}", partial(inside_any, spelling), anything)
    for spelling in (
        "",
        " ",
        "none",
        "none.png",
        "none/*.png",
        "*.tif",
        "[",
        "b.png/x.png",
        "a\0b",
        "n" * 300,
    ):
        act = partial(inside, spelling, ())
        yield Case("paths", f"images given as {spelling[:20]!r}", act, None, (spelling.strip(),))

    def twice(folder: Path) -> Ran:
        fill({"photos/a.png": PNG}, folder)
        os.chdir(folder)
        return _wanted(predict(folder, "photos", "photos/a.png", "./photos/*.png"), folder, "a.png")

    def same_stem(folder: Path) -> Ran:
        fill({"photos/a.png": PNG, "photos/a.jpg": PNG, "photos/a.b.png": PNG}, folder)
        return _wanted(predict(folder, folder / "photos"), folder, "a.png.png", "a.jpg.png", "a.b.png")

    def hidden(folder: Path) -> Ran:
        fill(
            {"photos/a.png": PNG, "photos/._a.png": b"x", "photos/.x/b.png": PNG, "photos/__MACOSX/c.png": PNG}, folder
        )
        return _wanted(predict(folder, folder / "photos"), folder, "a.png")

    def empty(folder: Path) -> Ran:
        (folder / "photos").mkdir()
        return predict(folder, folder / "photos")

    def home(folder: Path) -> Ran:
        before, os.environ["HOME"] = os.environ.get("HOME", ""), str(folder)
        try:
            fill({"photos/a.png": PNG}, folder)
            os.chdir(folder)
            ran = predict(folder, "~/photos", options=("--out=~/out",))
        finally:
            os.environ["HOME"] = before
        if (folder / "~").exists():
            raise WrongError("a folder named ~ was created")
        return _wanted(ran, folder, "a.png")

    yield Case("paths", "images given three times", twice, anything)
    yield Case("paths", "images with one stem", same_stem, anything)
    yield Case("paths", "hidden files in a folder", hidden, anything)
    yield Case("paths", "empty folder", empty, None, ("photos",))
    yield Case("paths", "~/ of images and --out=~/", home, anything)


def inside_any(spelling: str, folder: Path) -> Ran:
    """Segment what a recursive pattern matches, in a folder with links to itself."""
    fill({"photos/b.png": PNG, "photos/sub/c.png": PNG}, folder)
    (folder / "photos" / "loop").symlink_to(".")
    os.chdir(folder / "photos")
    ran = predict(folder, spelling)
    if ran.code == 0 and {"b.png", "sub/c.png"} - set(results(folder)):
        raise SkippedError(f"results {results(folder)}")
    return ran


def _outputs() -> Iterator[Case]:
    def run(out: str, prepare: Callable[[Path], Any], kept: dict[str, bytes], folder: Path) -> Ran:
        fill({"photos/a.png": PNG, "photos/sub/b.png": PNG}, folder)
        prepare(folder)
        ran = predict(folder, folder / "photos", options=("--out", folder / out))
        for name, content in {"photos/a.png": PNG, "photos/sub/b.png": PNG, **kept}.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                raise WrongError(f"the user's file {name} was changed")
        if ran.code == 0:
            found = sorted(path.name for path in (folder / out / "labels").rglob("*.png"))
            if found != ["a.png", "b.png"]:
                raise SkippedError(f"results {found}")
        return ran

    nothing = partial(fill, {})
    for title, out in {"equal to the images": "photos", "above the images": ".", "inside the images": "photos/out",
                       "parent by ..": "photos/..", "new, nested": "x/y/z"}.items():  # fmt: skip
        error = None if title in ("inside the images", "new, nested") else ("--out",)
        yield Case("paths", f"--out {title}", partial(run, out, nothing, {}), anything, error)
    foreign = {"out/labels/a.png": b"mine", "out/notes.txt": b"mine"}
    act = partial(run, "out", partial(fill, foreign), foreign)
    yield Case("paths", "--out with the user's labels/a.png", act, None, ("out",))
    notes = {"out/notes.txt": b"mine"}
    act = partial(run, "out", partial(fill, notes), notes)
    yield Case("paths", "--out with other files", act, anything, ("out",))
    odd: dict[str, Callable[[Path], Any]] = {
        "a file": lambda folder: fill({"out": b"x"}, folder),
        "below a file": lambda folder: fill({"out": b"x"}, folder),
        "a dangling link": lambda folder: (folder / "out").symlink_to("none"),
        "a link to itself": lambda folder: (folder / "out").symlink_to("out"),
        "labels is a file": lambda folder: fill({"out/labels": b"x"}, folder),
        "classes.json is a folder": lambda folder: (folder / "out" / "classes.json").mkdir(parents=True),
        "classes.json is not JSON": lambda folder: fill({"out/classes.json": b"x"}, folder),
    }
    for title, prepare in odd.items():
        out = "out/x" if title == "below a file" else "out"
        right = anything if title == "a dangling link" else None
        yield Case("paths", f"--out: {title}", partial(run, out, prepare, {}), right, ("out",))

    def long(folder: Path) -> Ran:
        fill({"a.png": PNG}, folder)
        return predict(folder, folder / "a.png", options=("--out", folder / ("n" * 300)))

    def again(folder: Path) -> Ran:
        fill({"photos/a.png": PNG}, folder)
        first = predict(folder, folder / "photos")
        return _wanted(predict(folder, folder / "photos"), folder, "a.png") if first.code == 0 else first

    def other_classes(folder: Path) -> Ran:
        fill({"photos/a.png": PNG}, folder)
        predict(folder, folder / "photos")
        return predict(folder, folder / "photos", options=("--classes", "red dot; grain"))

    def longest_name(folder: Path) -> Ran:
        name = "n" * 251
        fill({f"photos/{name}.png": PNG, "photos/a.png": PNG}, folder)
        ran = predict(folder, folder / "photos", options=("--features", "--scores"))
        if "a.png" not in results(folder):
            raise SkippedError("no result for a.png")
        return _wanted(ran, folder, "a.png", f"{name}.png")

    yield Case("paths", "--out of 300 bytes", long, None, ("n" * 50,))
    yield Case("paths", "--out used twice", again, anything)
    yield Case("paths", "--out with results of other classes", other_classes, None, ("out",))
    yield Case("paths", "image name of 255 bytes, with --features and --scores", longest_name, anything, ("n" * 50,))
