"""Input files of `spar predict`, and names of their results."""

import os
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Final

from PIL import Image

from spar_lightning.cli.predict_outputs import KINDS
from spar_lightning.errors import UserError
from spar_lightning.files.walk import files_below

STUBS: Final = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow identifies but cannot read


def image_files(given: Sequence[str], out: Path) -> tuple[dict[Path, Path], list[Path]]:
    """Find the images in files, folders and glob patterns.

    Args:
        given: Files, which may have any suffix; folders, which are searched recursively; or glob patterns.
        out: Folder of the results; earlier results in it (out/labels and so on) are skipped in folders and patterns.

    Returns:
        Mapping of image path to the name of its results, and a list of the files in folders without an image suffix.
        The name is the path relative to the common folder of all images. It has no suffix, unless two images would
        share a name.

    Raises:
        UserError: A file, folder or pattern matches nothing or contains no images.
    """
    Image.init()  # registers the suffixes of all formats
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - STUBS}
    results = {os.path.join(os.path.realpath(out), kind) for kind in KINDS}
    whole: dict[Path, Path] = {}  # absolute to given path: each file is read only once
    others: dict[Path, None] = {}
    for text in given:
        path = Path(text)
        found = [path] if text and os.path.exists(path) else _matches(text)
        if not found:
            raise UserError(f"No file, folder or glob pattern matches {text!r}.")
        named = {path: None for path in found if not path.is_dir()}
        if path in named and _is_result(path, results):
            raise UserError(f"{path} is a result in --out {out}. Pass another --out or other images.")
        below = (path / name for path in found if path.is_dir() for name in files_below(path))
        files = [file for file in (*named, *below) if not _is_result(file, results)]
        images = [file for file in files if file in named or file.suffix.lower() in suffixes]
        if not images:
            raise UserError(
                f"{text} contains no images: none of the {len(files)} files has a suffix such as .jpg or .png."
            )
        for file in images:
            whole.setdefault(Path(os.path.abspath(file)), file)
        others |= dict.fromkeys(file for file in files if file.suffix.lower() not in suffixes)
    names = _names(list(whole))
    rest = [file for file in others if Path(os.path.abspath(file)) not in whole]
    return {whole[path]: name for path, name in names.items()}, rest


def _matches(pattern: str) -> list[Path]:
    """Return the files and folders that match a glob pattern; those that links reach several times only once."""
    names = sorted(glob(pattern, recursive=True), key=lambda name: (name.count(os.sep), name), reverse=True)
    found = {os.path.realpath(name): Path(name) for name in names}  # the shortest path is the last
    return sorted(path for path in found.values() if os.path.exists(path))


def _is_result(file: Path, results: set[str]) -> bool:
    """Return whether a file is in one of the folders `results`."""
    return not results.isdisjoint(map(str, Path(os.path.realpath(file)).parents))


def _names(files: Sequence[Path]) -> dict[Path, Path]:
    """Return a unique result name for each absolute path."""
    root = Path(os.path.commonpath([path.parent for path in files]))
    short = {path: path.relative_to(root).with_suffix("") for path in files}
    taken = Counter(short.values())
    names = {path: name if taken[name] == 1 else path.relative_to(root) for path, name in short.items()}
    if len(set(names.values())) < len(names):  # such as x.jpg, x.png and x.jpg.png
        names = {path: path.relative_to(root) for path in files}
    return names
