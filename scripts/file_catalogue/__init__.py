"""Catalogue of input files: every kind gives the right result or a clear error in one line.

Each module makes the cases of one group. docs/files.md states what is read and what is rejected.
"""

from collections.abc import Callable, Iterator

from scripts.file_catalogue import archives, arrays, benchmarks, classes, folders, images, labels, paths, weights
from scripts.file_catalogue.case import Case

GROUPS: dict[str, Callable[[int], Iterator[Case]]] = {
    "images": images.cases,
    "arrays": arrays.cases,
    "archives": archives.cases,
    "folders": folders.cases,
    "labels": labels.cases,
    "benchmarks": benchmarks.cases,
    "weights": weights.cases,
    "classes": classes.cases,
    "paths": paths.cases,
}
