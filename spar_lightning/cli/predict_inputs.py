"""Which files `spar predict` reads, and what its results are called."""

import os
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Final

from PIL import Image

from spar_lightning.errors import UserError

STUBS: Final = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats whose files Pillow knows, and cannot read


def image_files(given: Sequence[str], out: Path) -> tuple[dict[Path, Path], list[Path]]:
    """The images that files, folders and globs stand for, and the files in folders that are none by their suffix.

    Args:
        given: Files are taken whatever their suffix; folders with all that lies below them.
        out: Where results go; what folders and patterns have there is passed over.

    Returns:
        The name of each file's results, without suffix: its path from where all files have their folders in common,
        with its own suffix where another file would share the name. And the other files.

    Raises:
        UserError: Something is not there, or holds no image.
    """
    Image.init()  # all formats, for their suffixes
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - STUBS}
    results = out.resolve()
    whole: dict[Path, Path] = {}  # each file once, whatever the way to it
    others: dict[Path, None] = {}
    for text in given:
        path = Path(text)
        found = [path] if text and path.exists() else [Path(name) for name in sorted(glob(text, recursive=True))]
        if not found:
            raise UserError(f"There is no file or folder {text!r}, and as a pattern it fits none.")
        named = {path: None for path in found if not path.is_dir()}
        if path in named and results in path.resolve().parents:
            raise UserError(f"{path} lies in --out {out}, where results go. Give another --out, or other images.")
        below = (file for path in found if path.is_dir() for file in _below(path))
        files = [file for file in (*named, *below) if results not in file.resolve().parents]
        images = [file for file in files if file in named or file.suffix.lower() in suffixes]
        if not images:
            raise UserError(f"{text} holds no image: none of its {len(files)} files has a suffix such as .jpg or .png.")
        for file in images:
            whole.setdefault(Path(os.path.abspath(file)), file)
        others |= dict.fromkeys(file for file in files if file.suffix.lower() not in suffixes)
    names = _names(list(whole))
    rest = [file for file in others if Path(os.path.abspath(file)) not in whole]
    return {whole[path]: name for path, name in names.items()}, rest


def _below(folder: Path) -> list[Path]:
    """All files of a folder, in order; hidden ones are none."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _names(files: Sequence[Path]) -> dict[Path, Path]:
    """Names of results of absolute paths, no two of them the same."""
    root = Path(os.path.commonpath([path.parent for path in files]))
    short = {path: path.relative_to(root).with_suffix("") for path in files}
    taken = Counter(short.values())
    names = {path: name if taken[name] == 1 else path.relative_to(root) for path, name in short.items()}
    if len(set(names.values())) < len(names):  # x.jpg, x.png, and a file that is called x.jpg.png
        names = {path: path.relative_to(root) for path in files}
    return names
