"""Path patterns, in which `{}` stands for the name of an image, including its subfolders."""

from collections.abc import Iterator
from pathlib import Path

from spar_lightning.files.walk import files_below


def prefix(pattern: str) -> str:
    """Return the folder part of a pattern before `{}`, which all images share."""
    return pattern.partition("{}")[0].rpartition("/")[0]


def matches(folder: Path, pattern: str) -> Iterator[tuple[Path, str]]:
    """Yield the path and the image name (the text in place of `{}`) of each file that matches a pattern.

    The case of the suffix does not matter. Subfolders and links to folders are followed, see `files_below`.

    Raises:
        FolderError: A folder cannot be read.
    """
    before, _, after = pattern.partition("{}")
    start = prefix(pattern)
    for below in files_below(folder / start) if (folder / start).is_dir() else ():
        name = f"{start}/{below}" if start else below
        if name.startswith(before) and name.lower().endswith(after.lower()) and len(name) > len(before) + len(after):
            yield folder / name, name[len(before) : len(name) - len(after)]


def existing(folder: Path, pattern: str, name: str) -> Path:
    """Return the path of the file of an image, with the suffix in lower or upper case if only that exists."""
    path = folder / pattern.replace("{}", name)
    cases = (path, path.with_suffix(path.suffix.lower()), path.with_suffix(path.suffix.upper()))
    return next((case for case in cases if case.is_file()), path)
