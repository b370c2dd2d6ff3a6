"""Recursive listing of a folder, by one rule for training images, benchmarks and predictions.

Links to folders are followed, but no folder is entered twice, so links to a parent end. A folder that cannot be read is
an error. Hidden files and folders, and `__MACOSX`, are left out: they contain what operating systems and editors write
next to the user's files.
"""

import errno
import os
from collections import deque
from pathlib import Path, PurePath

from spar_lightning.errors import UserError


class FolderError(UserError):
    """Error of a folder that cannot be listed."""


def is_hidden(path: str | PurePath) -> bool:
    """Return whether a part of a relative path begins with a dot or is `__MACOSX`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePath(path).parts)


def files_below(folder: Path) -> list[str]:
    """Return all files in a folder and its subfolders as sorted relative paths with `/`.

    Links to files are listed, also if their target does not exist.

    Raises:
        FolderError: A folder does not exist or cannot be read.
    """
    found: list[str] = []
    folders, links = deque([""]), deque[str]()  # links come last: a folder is listed under its own path
    entered: set[str] = set()
    while folders or links:
        below = folders.popleft() if folders else links.popleft()
        place = os.path.join(folder, below)
        if (real := os.path.realpath(place)) in entered:
            continue
        entered.add(real)
        try:
            with os.scandir(place) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise FolderError(f"{place} cannot be read ({error.strerror}). Make it readable.") from error
        for entry in listed:
            name = f"{below}/{entry.name}" if below else entry.name
            if is_hidden(entry.name):
                continue
            if not _is_folder(entry):
                found.append(name)
            else:
                (links if entry.is_symlink() else folders).append(name)
    return sorted(found)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise FolderError(f"{entry.path} cannot be read ({error.strerror}). Make it readable.") from error
