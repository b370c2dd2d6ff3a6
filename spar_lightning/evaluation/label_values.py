"""What the values of a label map mean: classes, or pixels that are not counted."""

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.benchmark_config import LabelFiles


def class_ids(values: NDArray[np.generic], kind: LabelFiles, classes: int) -> NDArray[np.int16]:
    """Classes of label values (H, W), `IGNORED` where none counts.

    Raises:
        ValueError: A value stands for no class.
    """
    if values.dtype.kind not in "uib":
        raise ValueError(f"holds values of type {values.dtype}, but labels are integers")
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
        raise ValueError(
            f"holds the value {wrong[0]}, which stands for none of the {classes} classes: allowed are {allowed}, and "
            f"{', '.join(map(str, ignored))} where nothing counts"
        )
    return ids.astype(np.int16)
