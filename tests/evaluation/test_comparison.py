"""Tests of comparisons of two results: intervals, means, reasons for missing intervals, and the page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spar_lightning.cli import main
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.bootstrap import has_interval
from spar_lightning.evaluation.comparison import Comparison
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.partial_counts import PartialCounts
from spar_lightning.evaluation.report import Report, read_counts
from tests.evaluation.test_report import benchmark

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def benchmarks(tmp_path: Path) -> list[Benchmark]:
    """Return two opened benchmarks with three classes."""
    return [benchmark(tmp_path / name) for name in ("first", "second")]


def write(folder: Path, benchmarks: list[Benchmark], right: float, images: int = 30) -> Path:
    """Write a result in which a fraction of the pixels has the right class; the others have class 0."""
    report = Report(folder, {"family": "Tiny", "weights": str(right)}, {"inference": "single"}, {})
    for each in benchmarks:
        generator, counts = torch.Generator().manual_seed(1), ConfusionMatrix(3)
        for i in range(images):
            labels = torch.randint(3, (8, 8), generator=generator)
            certain = torch.rand(8, 8, generator=generator) < right
            counts.update(labels.where(certain, 0), labels, i)
        stored = PartialCounts(folder, each.name, 3)
        stored.write(counts)
        protocol = {"hash": "x", "images_sha256": f"{len(each.name)}a", "labels": []}
        report.add(each, protocol, counts, stored.path)
    return folder


def change(folder: Path, name: str, **changes: Any) -> None:
    """Change the results of a benchmark in results.json; None deletes a key."""
    content = json.loads((folder / "results.json").read_text())
    row = content["benchmarks"][name] | changes
    content["benchmarks"][name] = {key: value for key, value in row.items() if value is not None}
    (folder / "results.json").write_text(json.dumps(content))


def test_a_difference(tmp_path: Path, benchmarks: list[Benchmark]) -> None:
    a, b = (write(tmp_path / name, benchmarks, right) for name, right in (("a", 0.5), ("b", 0.6)))
    found = Comparison(a, b)
    assert [(row.benchmark, row.metric) for row in found.rows] == [
        (name, metric) for name in ("first", "second") for metric in ("mIoU", "boundary IoU")
    ] + [("mean of 2", "mIoU"), ("mean of 2", "boundary IoU")]
    for row in found.rows:
        assert row.difference is not None and row.difference.differs
        assert row.difference.low < row.values[1] - row.values[0] < row.difference.high
    results = [json.loads((folder / "results.json").read_text())["benchmarks"]["first"] for folder in (a, b)]
    for row, key in zip(found.rows, ("mIoU", "boundary_IoU"), strict=False):
        assert row.values == pytest.approx([result[key] for result in results])
    assert found.settings == ['model: weights: "0.5" and "0.6"'] and found.notes == {}
    text = found.text()
    assert text.count(" yes ") == 6 and "Classes with the largest differences" in text and "| first     | hen" in text


def test_a_result_does_not_differ_from_itself(tmp_path: Path, benchmarks: list[Benchmark]) -> None:
    folder = write(tmp_path / "a", benchmarks, 0.5)
    text = Comparison(folder, folder / "results.json").text()
    assert "the same network, the same protocol" in text and "Classes" not in text
    assert text.count("+0.00 to +0.00 | no") == 6


def test_reasons(tmp_path: Path, benchmarks: list[Benchmark], capsys: Capture) -> None:
    a, b = (write(tmp_path / name, benchmarks, right) for name, right in (("a", 0.5), ("b", 0.6)))
    for changes, text in (
        ({"images": 29}, "30 of 29 images"),
        ({"counts": "counts/none.npz"}, "none.npz cannot be read"),
        ({"counts": None}, "version 0.1"),
        ({"IoU": {"cat": 1.0}}, "classes differ"),
        ({"protocol": {"images_sha256": "6a", "labels": ["other"]}}, "the meaning of the label values differs"),
        ({"protocol": {"images_sha256": "7a", "labels": []}}, "images or labels differ"),
    ):
        change(b, "second", **changes)
        found = Comparison(a, b)
        assert text in found.notes["second"] and "no interval, because" in found.notes["second"]
        means = [row for row in found.rows if row.benchmark == "mean of 2"]
        assert [(row.metric, row.difference) for row in means] == [("mIoU", None)]
        assert set(found.classes) == {"first"}
    content = json.loads((b / "results.json").read_text())
    content["benchmarks"] = {"other": content["benchmarks"]["first"]}
    (b / "results.json").write_text(json.dumps(content))
    assert main(["evaluate", "--compare", str(a), str(b)]) == 2
    assert "first, second" in capsys.readouterr().err


def test_few_images(tmp_path: Path, benchmarks: list[Benchmark]) -> None:
    a, b = (write(tmp_path / name, benchmarks[:1], right, 5) for name, right in (("a", 0.5), ("b", 0.6)))
    found = Comparison(a, b)
    assert all(row.difference is None for row in found.rows) and "left out" in found.notes["first"]
    assert not any(found.classes["first"].values()) and " yes " not in found.text()


def test_page(tmp_path: Path, benchmarks: list[Benchmark], capsys: Capture) -> None:
    a, b = (write(tmp_path / name, benchmarks, right) for name, right in (("a", 0.5), ("b", 0.6)))
    image = {"group": "random", "stem": "1", "miou": 50.0, "width": 1, "height": 1, "classes": []}
    for folder in (a, b):
        (folder / "gallery").mkdir()
        pictures = {kind: f"data:{folder.name}-{kind}" for kind in ("image", "labels", "prediction", "errors")}
        for name in ("first", "second"):
            entry = {"count": 1, "images": [{**image, "pictures": pictures}]}
            (folder / "gallery" / f"{name}.json").write_text(json.dumps(entry))
    change(b, "second", protocol={"images_sha256": "7a", "labels": []})  # other images of the same name
    page = tmp_path / "page.html"
    assert main(["evaluate", "--compare", str(a), str(b), "--out", str(page)]) == 0
    text = page.read_text()
    assert capsys.readouterr().out.strip() and "images or labels differ" in text
    assert text.count("data:b-prediction") == 2 and text.count("data:a-prediction") == 1
    assert main(["evaluate", "--compare", str(a), str(b), "--out", str(page)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["evaluate", "--compare", str(a), str(b), "--check_paper", str(a)]) == 2
    assert "--compare cannot be combined with --check_paper" in capsys.readouterr().err


def test_damaged_counts(tmp_path: Path, benchmarks: list[Benchmark]) -> None:
    folder = write(tmp_path / "a", benchmarks[:1], 0.5)
    row = json.loads((folder / "results.json").read_text())["benchmarks"]["first"]
    assert has_interval(read_counts(folder, row))
    path = folder / row["counts"]
    content = dict(np.load(path))
    for wrong in (content["per_image"].astype(float), content["per_image"] + np.arange(8), content["per_image"][:-3]):
        np.savez(path, **{**content, "per_image": wrong})
        with pytest.raises(UserError, match="Evaluate again"):
            read_counts(folder, row)
