"""Path patterns, in which `{}` stands for the name of an image, including its subfolders."""

import os
from collections.abc import Iterator
from pathlib import Path


def prefix(pattern: str) -> str:
    """Return the folder part of a pattern before `{}`, which all images share."""
    return pattern.partition("{}")[0].rpartition("/")[0]


def matches(folder: Path, pattern: str) -> Iterator[tuple[Path, str]]:
    """Yield the path and the image name (the text in place of `{}`) of each file that matches a pattern.

    Subfolders and symbolic links are followed.
    """
    before, _, after = pattern.partition("{}")
    for parent, _, names in os.walk(folder / prefix(pattern), followlinks=True):
        for path in (Path(parent) / name for name in names):
            relative = path.relative_to(folder).as_posix()
            if relative.startswith(before) and relative.endswith(after):
                yield path, relative[len(before) : len(relative) - len(after)]
