"""Class lists: spellings of --classes, text files, and lists and mappings in Python."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import spar_lightning
from scripts.file_catalogue.case import Case, Ran, SkippedError, WrongError, spar
from scripts.file_catalogue.picture import scene
from scripts.file_catalogue.pictures import WRITERS
from scripts.file_catalogue.weight_files import clip

Classes = Mapping[str, Sequence[str]]


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    yield from _command_line()
    yield from _text_files()
    yield from _python()


@cache
def _weights(root: Path) -> Path:
    """Return the weights of a small CLIP, which reads any words."""
    path = root / "clip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in clip().items()}, path)
    return path


def _config(folder: Path) -> tuple[Path, Path]:
    weights = _weights(folder.parent)
    backbone = {
        "class_path": "spar_lightning.backbones.OpenCLIP",
        "init_args": {"model": "ViT-Ti-16-test", "pretrained": str(weights)},
    }
    config = folder / "clip.yaml"
    config.write_text(json.dumps({"model": {"backbone": backbone, "templates": ["{}"]}}))
    return config, weights


def _segment(classes: object, folder: Path, file: bytes | None = None, name: str = "names.txt") -> Ran:
    (folder / "a.png").write_bytes(WRITERS["png color type 2, 8 bit"][1](scene(31, 47)).content)
    if file is not None:
        (folder / name).write_bytes(file)
        classes = folder / name
    config, weights = _config(folder)
    ran = spar("predict", folder / "a.png", "--weights", weights, "--config", config, "--classes", classes, "--out",
               folder / "out")  # fmt: skip
    if ran.code == 0:
        path = folder / "out" / "classes.json"
        if not path.is_file():
            raise SkippedError("no classes.json")
        return Ran(0, path.read_text(encoding="utf-8"), ran.out + ran.err)
    if (folder / "out" / "labels").exists():
        raise WrongError(f"results were written before the error: {ran.error()}")
    return ran


def listed(expected: Classes) -> Callable[[Ran], None]:
    """Return a check that classes.json lists these labels and names."""

    def check(ran: Ran) -> None:
        found = {row["label"]: row["names"] for row in json.loads(ran.out)}
        wanted = {label: list(names) for label, names in expected.items()}
        if found != wanted or list(found) != list(wanted):
            raise WrongError(f"classes {str(found)[:200]}, expected {str(wanted)[:200]}")

    return check


def _plain(*names: str) -> Classes:
    return {name: [name] for name in names}


def _command_line() -> Iterator[Case]:
    good: dict[str, tuple[str, Classes]] = {
        "two": ("cat; dog", _plain("cat", "dog")),
        "no blanks": ("cat;dog", _plain("cat", "dog")),
        "many blanks": ("  cat  ;  dog ", _plain("cat", "dog")),
        "several names": ("grass, lawn; sky", {"grass": ["grass", "lawn"], "sky": ["sky"]}),
        "label": ("background: wall, floor; cat", {"background": ["wall", "floor"], "cat": ["cat"]}),
        "two words": ("traffic light; stop sign", _plain("traffic light", "stop sign")),
        "unicode": ("Katze; Hündin; 猫; κύων", _plain("Katze", "Hündin", "猫", "κύων")),
        "emoji": ("🐈; 🐕", _plain("🐈", "🐕")),
        "right to left": ("כלב; חתול", _plain("כלב", "חתול")),
        "quotes": ('men\'s shoe; "x" box', _plain("men's shoe", '"x" box')),
        "braces": ("{} cat; {x} dog", _plain("{} cat", "{x} dog")),
        "percent": ("100% cotton; %s", _plain("100% cotton", "%s")),
        "number": ("1; 2", _plain("1", "2")),
        "yes and no": ("yes; no", _plain("yes", "no")),
        "null": ("null; true", _plain("null", "true")),
        "underscores": ("traffic_light; stop_sign", _plain("traffic_light", "stop_sign")),
        "plurals": ("cat; cats", _plain("cat", "cats")),
        "lines": ("cat\ndog\n", _plain("cat", "dog")),
        "lines with CRLF": ("cat\r\ndog", _plain("cat", "dog")),
        "long": ("cat; " + "x" * 60, _plain("cat", "x" * 60)),
        "slash": ("cat/dog; bird", _plain("cat/dog", "bird")),
        "markup": ("<b>cat</b>; &amp", _plain("<b>cat</b>", "&amp")),
        "backslash": ("a\\b; c", _plain("a\\b", "c")),
        "dollar": ("$HOME; `x`", _plain("$HOME", "`x`")),
        "leading hash": ("#1; cat", _plain("#1", "cat")),
    }
    for title, (text, expected) in good.items():
        yield Case("classes", f"--classes, {title}", partial(_segment, text), listed(expected))
    hinted = {
        "one class": ("cat", _plain("cat")),
        "comma instead of ;": ("cat, dog, road", {"cat": ["cat", "dog", "road"]}),
    }
    for title, (text, expected) in hinted.items():
        check = partial(_with_hint, listed(expected))
        yield Case("classes", f"--classes, {title}", partial(_segment, text), check, ("class",))
    bad: dict[str, tuple[str, str]] = {
        "empty": ("", "classes"),
        "blank": ("   ", "classes"),
        "only ;": (";", "classes"),
        "trailing ;": ("cat; dog;", "classes"),
        "double ;": ("cat;; dog", "classes"),
        "empty name": ("cat, , dog; bird", "classes"),
        "label without names": ("cat:; dog", "classes"),
        "twice": ("cat; dog; cat", "cat"),
        "name in two classes": ("a: cat; b: cat", "cat"),
        "label twice": ("a: cat; a: dog", "a"),
        "same but for case": ("Cat; cat", "cat"),
        "same but for blanks": ("traffic  light; traffic light", "traffic"),
        "same after 77 tokens": ("word " * 80 + "a; " + "word " * 80 + "b", "word"),
        "missing .txt": ("none.txt", "none.txt"),
        "missing path .txt": ("/none/x.txt", "/none/x.txt"),
        "not UTF-8": ("K\udce4se; cat", "se"),
    }
    for title, (text, word) in bad.items():
        right = listed(_plain("cat", "dog")) if title in ("trailing ;", "double ;") else None
        yield Case("classes", f"--classes, {title}", partial(_segment, text), right, (word,))
    for title, text in {
        "control": "a\x1b[31mb; cat",
        "NUL": "a\x00b; cat",
        "tab": "a\tb; cat",
        "zero width": "a\u200bb; cat",
    }.items():
        expected = _plain(text.split(";")[0], "cat")
        yield Case("classes", f"--classes, {title} character", partial(_segment, text), listed(expected), ("classes",))


def _with_hint(check: Callable[[Ran], None], ran: Ran) -> None:
    check(ran)
    if "class" not in ran.err:
        raise SkippedError(f"no hint that there is only one class: {ran.err[-200:]!r}")


def _text_files() -> Iterator[Case]:
    two, many = _plain("cat", "dog"), [f"thing {i}" for i in range(300)]
    good: dict[str, tuple[bytes, Classes]] = {
        "lines": (b"cat\ndog\n", two),
        "no last newline": (b"cat\ndog", two),
        "CRLF": (b"cat\r\ndog\r\n", two),
        "CR": (b"cat\rdog\r", two),
        "BOM": (b"\xef\xbb\xbfcat\ndog\n", two),
        "blank lines": (b"\ncat\n\n  \ndog\n\n", two),
        "blanks around": (b"  cat \n\tdog\t\n", two),
        "several names": (b"grass, lawn\nsky\n", {"grass": ["grass", "lawn"], "sky": ["sky"]}),
        "label": (b"background: wall, floor\ncat\n", {"background": ["wall", "floor"], "cat": ["cat"]}),
        "unicode": ("Hündin\n猫\n".encode(), _plain("Hündin", "猫")),
        "300 classes": ("\n".join(many).encode(), _plain(*many)),
        "numbers": (b"1\n2\n", _plain("1", "2")),
        "form feed": (b"cat\x0c\ndog\n", two),
        "line separator in a name": ("cat\u2028x\ndog\n".encode(), _plain("cat", "x", "dog")),
    }
    for title, (content, expected) in good.items():
        error = ("names.txt",) if title in ("line separator in a name", "form feed") else None
        act = partial(_file, content, "names.txt")
        yield Case("classes", f"names.txt, {title}", act, listed(expected), error)
    for name in ("names.TXT", "my names.txt", "klassen-ü.txt", "a;b.txt", "a,b.txt", "a:b.txt"):
        yield Case("classes", f"file {name}", partial(_file, b"cat\ndog\n", name), listed(two), (name,))
    for name in ("names.csv", "coco.names", "names.json", "names.yaml", "names"):
        yield Case("classes", f"file {name}", partial(_file, b"cat\ndog\n", name), listed(two), (name,))
    bad: dict[str, bytes] = {
        "empty": b"",
        "only blanks": b"\n \n\t\n",
        "UTF-16": "cat\ndog\n".encode("utf-16"),
        "Latin-1": "K\xe4se\ncat\n".encode("latin-1"),
        "semicolons": b"cat; dog\nbird\n",
        "twice": b"cat\ndog\ncat\n",
        "twice but for case": b"cat\nCat\n",
        "PNG": WRITERS["png gray 8 bit"][1](scene(9, 9)).content,
    }
    for title, content in bad.items():
        words = () if title in ("twice", "twice but for case", "semicolons") else ("names.txt",)
        yield Case("classes", f"names.txt, {title}", partial(_file, content, "names.txt"), None, words)
    for title, make in {"folder": Path.mkdir, "dangling link": lambda path: path.symlink_to("none")}.items():

        def odd(folder: Path, make: Callable[[Path], object] = make) -> Ran:
            make(folder / "odd.txt")
            return _segment(folder / "odd.txt", folder)

        yield Case("classes", f"names.txt is a {title}", odd, None, ("odd.txt",))


def _file(content: bytes, name: str, folder: Path) -> Ran:
    return _segment(None, folder, content, name)


def _python() -> Iterator[Case]:
    def load(classes: Any, folder: Path) -> list[str]:
        config, weights = _config(folder)
        return list(spar_lightning.load(weights, classes, config=config, device="cpu").classifier.labels)

    def labels(expected: Sequence[str]) -> Callable[[list[str]], None]:
        def check(found: list[str]) -> None:
            if found != list(expected):
                raise WrongError(f"labels {found}, expected {list(expected)}")

        return check

    good: dict[str, tuple[Any, Sequence[str]]] = {
        "list": (["cat", "dog"], ["cat", "dog"]),
        "tuple": (("cat", "dog"), ["cat", "dog"]),
        "text": ("cat; dog", ["cat", "dog"]),
        "list with several names": (["grass, lawn", "sky"], ["grass", "sky"]),
        "mapping": ({"a": ["cat", "lion"], "b": ["dog"]}, ["a", "b"]),
        "mapping to tuples": ({"a": ("cat",), "b": ("dog",)}, ["a", "b"]),
        "mapping to text": ({"a": "cat, lion", "b": "dog"}, ["a", "b"]),
        "blanks": ([" cat ", "dog\t"], ["cat", "dog"]),
        "nothing": ((), []),
    }
    for title, (classes, expected) in good.items():
        yield Case("classes", f"load, {title}", partial(load, classes), labels(expected))
    bad: dict[str, tuple[Any, str]] = {
        "number": (3, "classes"),
        "list of numbers": ([1, 2], "classes"),
        "list with None": (["cat", None], "classes"),
        "list of lists": ([["cat", "lion"], ["dog"]], "classes"),
        "bytes": (b"cat; dog", "classes"),
        "list of bytes": ([b"cat", b"dog"], "classes"),
        "empty name": (["cat", ""], "classes"),
        "blank name": (["cat", " "], "classes"),
        "mapping to nothing": ({"a": []}, "classes"),
        "mapping to None": ({"a": None, "b": ["cat"]}, "classes"),
        "mapping with number keys": ({0: ["cat"], 1: ["dog"]}, "classes"),
        "semicolon in an item": (["cat; dog", "bird"], "cat; dog"),
        "newline in an item": (["cat\ndog", "bird"], "cat"),
        "carriage return in an item": (["cat\rdog", "bird"], "cat"),
        "newline in a mapping": ({"a": ["cat\ndog"], "b": ["bird"]}, "cat"),
        "twice": (["cat", "cat"], "cat"),
        "twice but for case": (["cat", "CAT"], "CAT"),
        "lone surrogate": (["cat\udce4", "dog"], "cat"),
    }
    for title, (classes, word) in bad.items():
        yield Case("classes", f"load, {title}", partial(load, classes), None, (word,))
