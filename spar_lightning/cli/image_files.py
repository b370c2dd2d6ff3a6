"""Which files `spar predict` reads, and what its results are called."""

import os
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from PIL import Image

from spar_lightning.errors import UserError


def image_files(given: Sequence[str], out: Path) -> tuple[dict[Path, Path], list[Path]]:
    """The images that files, folders and globs stand for, and the files in folders that are none by their suffix.

    Args:
        given: Files are taken whatever their suffix; folders with all that lies below them.
        out: Where results go; nothing below it is an image to read.

    Returns:
        The name of each file's results, without suffix: its path from where all files have their folders in common,
        with its own suffix where another file would share the name. And the other files.

    Raises:
        UserError: Something is not there, or holds no image.
    """
    Image.init()  # all formats, for their suffixes
    suffixes = set(Image.registered_extensions())
    chosen: dict[Path, None] = {}
    others: list[Path] = []
    for text in given:
        found = [Path(text)] if Path(text).exists() else sorted(Path(name) for name in glob(text, recursive=True))
        if not found:
            raise UserError(f"There is no file or folder {text}, and as a pattern it fits none.")
        files = [file for path in found for file in (_below(path) if path.is_dir() else [path])]
        named = {path for path in found if not path.is_dir()}
        images = [file for file in files if file in named or file.suffix.lower() in suffixes]
        others += [file for file in files if file not in images]
        if not images:
            raise UserError(f"{text} holds no image: none of its {len(files)} files has a suffix such as .jpg or .png.")
        chosen |= dict.fromkeys(images)
    if inside := next((file for file in chosen if out.resolve() in file.resolve().parents), None):
        raise UserError(f"{inside} lies in --out {out}, where results go. Give another --out, or other images.")
    return _names(list(chosen)), [file for file in others if file not in chosen]


def _below(folder: Path) -> list[Path]:
    """All files of a folder, in order; hidden ones are none."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _names(files: Sequence[Path]) -> dict[Path, Path]:
    whole = {file: Path(os.path.abspath(file)) for file in files}
    root = Path(os.path.commonpath([path.parent for path in whole.values()]))
    short = {file: path.relative_to(root).with_suffix("") for file, path in whole.items()}
    taken = Counter(short.values())
    return {file: name if taken[name] == 1 else whole[file].relative_to(root) for file, name in short.items()}
