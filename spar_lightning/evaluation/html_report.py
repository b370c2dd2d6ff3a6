"""HTML report of an evaluation or of a comparison: one file with tables, bars and pictures, without a server.

The template is report.html in this folder. Pictures are data URIs of at most 320 pixels, about 35 kB per image.
"""

import json
import logging
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from spar_lightning.evaluation.bootstrap import SAMPLES
from spar_lightning.evaluation.comparison import NOTE, TITLES, Comparison, bounds
from spar_lightning.evaluation.report import cells

log = logging.getLogger("spar_lightning")

INTERVALS = (
    f"mIoU in percent. 95 % intervals: {SAMPLES} draws of the images with replacement (bootstrap); they cover the "
    "choice of images only."
)
GALLERY = (
    "Pictures: image, labels, prediction, errors (red: wrong, black: not counted). The mIoU of an image is the mean "
    "over the classes in its labels or its prediction; the numbers are the IoU of each class in the image."
)


def evaluation_page(folder: Path, content: dict[str, Any], with_pictures: bool = True) -> str:
    """Return the page of an evaluation.

    Args:
        folder: Result folder, in which the pictures are.
        content: Content of its results.json.
        with_pictures: Whether to show the stored pictures.
    """
    benchmarks = {}
    for name, row in content["benchmarks"].items():
        boundary = row.get("boundary_IoU_per_class", {})
        rows = [
            {"cells": [label, _number(iou), _number(boundary.get(label))], "ious": [iou]}
            for label, iou in row["IoU"].items()
        ]
        groups = _groups(stored_pictures(folder, row)["images"] if with_pictures else [])
        benchmarks[name] = {"heads": ["class", "IoU", "boundary IoU"], "classes": rows, "groups": groups}
    inference = {"single": "single pass", "sliding": "sliding windows"}[content["protocol"]["inference"]]
    title = f"Evaluation of {content['model']['family']}, {inference}"
    rows = content["benchmarks"].items()
    warnings = [f"{name}: {row['interval_warning']}" for name, row in rows if row.get("interval_warning")]
    return _page(title, cells(content), [*warnings, INTERVALS, GALLERY], benchmarks, content, compared=False)


def comparison_page(comparison: Comparison) -> str:
    """Return the page of a comparison, with the pictures of network B."""
    first, second = (result["benchmarks"] for result in comparison.results)
    benchmarks = {}
    for name in comparison.shared:
        differences = comparison.classes.get(name, {})
        rows = []
        for label, a in first[name]["IoU"].items():
            b, found = second[name]["IoU"].get(label), differences.get(label)
            difference = "" if a is None or b is None else f"{b - a:+.1f}"
            ends = ["", ""] if found is None else [bounds(found), "yes" if found.differs else "no"]
            rows.append({"cells": [label, _number(a), _number(b), difference, *ends], "ious": [a, b]})
        heads = ["class", "A", "B", "B - A", "95 % interval", "differs"]
        images = stored_pictures(comparison.folders[1], second[name])["images"]
        comparable = name in comparison.classes  # the same images, labels and classes
        theirs = stored_pictures(comparison.folders[0], first[name])["images"] if comparable else []
        predictions = {image["stem"]: image["pictures"]["prediction"] for image in theirs}
        for image in images:  # the random images are the same for A and B
            pictures = image["pictures"]
            of_a = {"prediction of A": predictions[image["stem"]]} if image["stem"] in predictions else {}
            of_b = {"prediction of B": pictures["prediction"], "errors of B": pictures["errors"]}
            image["pictures"] = {"image": pictures["image"], "labels": pictures["labels"], **of_a, **of_b}
        benchmarks[name] = {"heads": heads, "classes": rows, "groups": _groups(images)}
    lines = [TITLES, *(row.cells() for row in comparison.rows)]
    notes = [f"A: {comparison.paths[0]}", f"B: {comparison.paths[1]}", *comparison.settings]
    notes += [*(f"{name}: {note}" for name, note in comparison.notes.items()), NOTE, GALLERY]
    content = comparison.results[1]
    return _page("Comparison of A and B", lines, notes, benchmarks, content, compared=True)


def _page(
    title: str,
    lines: list[list[str]],
    notes: list[str],
    benchmarks: Mapping[str, Any],
    content: dict[str, Any],
    compared: bool,
) -> str:
    settings = {
        part.capitalize(): {key: _plain(value) for key, value in content.get(part, {}).items()}
        for part in ("model", "protocol", "environment")
    }
    text = resources.files("spar_lightning.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return template.render(
        title=title, cells=lines, notes=notes, benchmarks=benchmarks, settings=settings, compared=compared
    )


def pictures_file(folder: Path, row: Mapping[str, Any]) -> Path:
    """Return the path of the pictures of a benchmark, which change with its counts."""
    return folder / "gallery" / f"{Path(row.get('counts', 'none')).stem}.json"


def stored_pictures(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pictures of a benchmark as `images`, and as `count` how many of each group were wanted."""
    path, none = pictures_file(folder, row), {"count": 0, "images": []}
    if not path.is_file():
        return none
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return {"count": found["count"], "images": found["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be used (%s: %s). Its pictures are missing.", path, type(error).__name__, error)
        return none


def _groups(images: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {group: [image for image in images if image["group"] == group] for group in ("best", "worst", "random")}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(iou: float | None) -> str:
    return "" if iou is None else f"{iou:.1f}"
