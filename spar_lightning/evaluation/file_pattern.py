"""Paths with `{}` for what identifies an image, subfolders included."""

import os
from collections.abc import Iterator
from pathlib import Path


def prefix(pattern: str) -> str:
    """The folder of a pattern that is the same for all images."""
    return pattern.partition("{}")[0].rpartition("/")[0]


def matches(folder: Path, pattern: str) -> Iterator[tuple[Path, str]]:
    """Files that match a pattern, in subfolders and behind links too, with what stands for `{}`."""
    before, _, after = pattern.partition("{}")
    for parent, _, names in os.walk(folder / prefix(pattern), followlinks=True):
        for path in (Path(parent) / name for name in names):
            relative = path.relative_to(folder).as_posix()
            if relative.startswith(before) and relative.endswith(after):
                yield path, relative[len(before) : len(relative) - len(after)]
