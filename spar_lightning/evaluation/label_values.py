"""Conversion of the values of a label map to class ids."""

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.benchmark_config import LabelFiles


def class_ids(values: NDArray[np.generic], kind: LabelFiles, classes: int) -> NDArray[np.int16]:
    """Return the class ids (H, W) of label values (H, W); pixels that are not counted become `IGNORED`.

    Raises:
        ValueError: If a value is neither a class nor ignored.
    """
    if values.dtype.kind not in "uib":
        raise ValueError(f"contains values of type {values.dtype}, but labels must be integers")
    kind = kind.resolved(classes)
    assert kind.ignored is not None
    raw = values.astype(np.int64)
    ids = np.full(raw.shape, IGNORED, np.int64)
    counted = ~np.isin(raw, [*kind.ignored, *([0] if kind.reduce_zero_label else [])])
    if kind.label_map is not None:
        known = counted & np.isin(raw, list(kind.label_map))
        table = np.full(max(kind.label_map) + 1, IGNORED)
        table[list(kind.label_map)] = list(kind.label_map.values())
        ids[known] = table[raw[known]]
    else:
        first = int(kind.reduce_zero_label)
        known = counted & (raw >= first) & (raw < classes + first)
        ids[known] = raw[known] - first
    if wrong := np.unique(raw[counted & ~known]).tolist():
        allowed = (
            f"those of label_map, {min(kind.label_map)} to {max(kind.label_map)}"
            if kind.label_map
            else f"{int(kind.reduce_zero_label)} to {classes - 1 + int(kind.reduce_zero_label)}"
        )
        ignored = sorted({*kind.ignored, *([0] if kind.reduce_zero_label else [])})
        also = f", and {', '.join(map(str, ignored))} for ignored pixels" if ignored else ""
        raise ValueError(
            f"contains the value {wrong[0]}, which does not belong to any of the {classes} classes. Allowed: "
            f"{allowed}{also}"
        )
    return ids.astype(np.int16)
