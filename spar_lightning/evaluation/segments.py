"""Panoptic segments of an image from its label map and its instance map.

A stuff class is one segment per image, an instance of a thing is a segment of its own. Pixels of things without an
instance, such as groups, are not counted.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.benchmark_config import BenchmarkError, InstanceFiles
from spar_lightning.evaluation.file_pattern import existing
from spar_lightning.evaluation.label_file import read_label_file


class Segments(NamedTuple):
    """Segments of an image: `ids` (H, W) int64 with `IGNORED`, and the class of each segment (S)."""

    ids: Tensor
    classes: Tensor


def is_thing(benchmark: Benchmark) -> Tensor:
    """Return for each class (C) whether it has instances."""
    kind = benchmark.description.instances
    things = () if kind is None else kind.things
    return torch.tensor([label in things for label in benchmark.classes])


def read_segments(benchmark: Benchmark, index: int, labels: Tensor) -> Segments:
    """Return the segments of an image of a benchmark.

    Args:
        benchmark: Opened benchmark.
        index: Index of the image.
        labels: Class ids (H, W) of the image.

    Raises:
        BenchmarkError: If the instance map is missing, cannot be read, or does not match the label map.
    """
    kind = benchmark.description.instances
    classes = labels.numpy().astype(np.int64)
    instances = np.zeros_like(classes)
    if kind is not None:
        path = existing(benchmark.folder, kind.file, benchmark.stems[index])
        try:
            values = read_label_file(path)
            if values.shape[:2] != classes.shape or values.ndim != 2 + (kind.categories is not None):
                raise ValueError(f"has shape {values.shape}, but the label map has {classes.shape}")
            classes, instances = _instances(values, classes, kind, list(benchmark.classes))
        except (UserError, OSError, ValueError) as error:
            raise BenchmarkError(f"{benchmark.name}: {_sentence(path, error)}") from error
    counted = classes != IGNORED
    pairs = classes * (int(instances.max(initial=0)) + 1) + instances
    found, ids = np.unique(pairs[counted], return_inverse=True)
    result = np.full(classes.shape, IGNORED, np.int64)
    result[counted] = ids.reshape(-1)
    return Segments(torch.from_numpy(result), torch.from_numpy(found // (int(instances.max(initial=0)) + 1)))


def _sentence(path: Path, error: Exception) -> str:
    if not path.is_file():
        return f"the instance map {path} does not exist. Complete the download, see `instances` in the YAML file."
    return f"the instance map {path} {error}. Restore the file."


def _instances(
    values: NDArray[np.generic], classes: NDArray[np.int64], kind: InstanceFiles, labels: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return class ids and instance numbers (H, W); 0 is the number of stuff.

    Raises:
        ValueError: A category is unknown.
    """
    if kind.categories is None:
        classes, numbers = classes.copy(), values.astype(np.int64)
        valid = numbers >= kind.first
    else:
        red, numbers = (values[..., channel].astype(np.int64) for channel in (0, 1))
        valid = (red > 0) & (numbers > 0)
        if red[valid].max(initial=0) > len(kind.categories):
            raise ValueError(f"contains the category {red[valid].max()}, but only {len(kind.categories)} are known")
        of_category = np.array([IGNORED, *(labels.index(label) for label in kind.categories)])
        classes = np.where(valid, of_category[np.where(valid, red, 0)], classes)
    thing = np.isin(classes, [labels.index(label) for label in kind.things])
    classes[thing & ~valid] = IGNORED
    return classes, np.where(thing & valid, numbers, 0)
