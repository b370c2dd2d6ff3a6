"""Conversion of the values of a label map to class ids."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.label_files import LabelFiles

Color = tuple[int, int, int]  # red, green, blue


def class_ids(values: NDArray[np.generic], kind: LabelFiles, classes: int) -> NDArray[np.int16]:
    """Return the class ids (H, W) of label values; pixels that are not counted become `IGNORED`.

    Args:
        values: Values (H, W), or colors (H, W, 3) if the format has `colors`.
        kind: Format of the label map.
        classes: Number of classes.

    Raises:
        ValueError: If a value is neither a class nor ignored.
    """
    if values.dtype.kind not in "uib":
        raise ValueError(f"contains values of type {values.dtype}, but labels must be integers")
    kind = kind.resolved(classes)
    if kind.colors is not None:
        return _class_ids_of_colors(values, kind.colors, kind.ignored_colors)
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


def _class_ids_of_colors(
    values: NDArray[np.generic], colors: Sequence[Color], ignored: Sequence[Color]
) -> NDArray[np.int16]:
    """Return the class ids (H, W) of colors (H, W, 3)."""
    packed = values.astype(np.int64) @ (2**16, 2**8, 1)
    known, places = np.unique([np.dot(color, (2**16, 2**8, 1)) for color in (*colors, *ignored)], return_index=True)
    found = np.searchsorted(known, packed).clip(max=len(known) - 1)
    if (wrong := known[found] != packed).any():
        color = values[wrong][0].tolist()
        raise ValueError(f"contains the color {color}, which is neither in colors nor in ignored_colors")
    ids = places[found]
    return np.where(ids < len(colors), ids, IGNORED).astype(np.int16)
