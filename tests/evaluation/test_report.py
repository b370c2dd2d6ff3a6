"""Tests of reports: classes in the mean, classes without labels, sets without a counted pixel, unusual names."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.benchmark_config import BenchmarkError
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.partial_counts import PartialCounts
from spar_lightning.evaluation.report import Report, read_counts
from spar_lightning.evaluation.sweep_report import SweepReport


def benchmark(folder: Path) -> Benchmark:
    """Return a benchmark with three classes and one image."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.zeros((2, 4), np.uint8)).save(folder / name / "0.png")
    classes = [{"label": name, "names": [name]} for name in ("cat", "dog", "hen")]
    (folder / "benchmark.yaml").write_text(yaml.safe_dump({"classes": classes}))
    made = Benchmark(str(folder))
    made.open()
    return made


def counts(predicted: list[int], labels: list[int]) -> ConfusionMatrix:
    made = ConfusionMatrix(3)
    made.update(torch.tensor([predicted]), torch.tensor([labels], dtype=torch.int16), 0)
    return made


def report(folder: Path) -> Report:
    return Report(folder, {"family": "Tiny"}, {"inference": "single"}, {})


def add(results: Report, folder: Path, found: ConfusionMatrix) -> None:
    """Write counts to the folder of a report and add them."""
    stored = PartialCounts(results.folder, folder.name, 3)
    stored.write(found)
    results.add(benchmark(folder), {"hash": "x", "images_sha256": "12ab"}, found, stored.path)


def strict(path: Path) -> dict[str, object]:
    """Return the content of a JSON file; NaN and Infinity, which are not JSON, fail."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content: dict[str, object] = json.loads(path.read_text(), parse_constant=refuse)
    return content


def test_the_table_counts_the_classes_in_the_mean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = report(tmp_path / "out")
    add(results, tmp_path / "mine", counts([0, 0, 1, 1], [0, 0, 0, 0]))
    line = (tmp_path / "out" / "table.md").read_text().splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")][1:8] == [
        "mine", "25.00", "", "25.00", "50.00", "1", "2 of 3"
    ]  # fmt: skip
    assert strict(results.path)
    said, few = [record.getMessage() for record in caplog.records]
    assert "fewer than 10 images" in few
    assert said.startswith("mine: 2 of 3 classes") and "dog, hen" in said  # dog is predicted, but not labeled


def test_interval_of_the_mean(tmp_path: Path) -> None:
    """Benchmarks with the same files are drawn together; one without an interval leaves the mean without one."""
    results, generator = report(tmp_path / "out"), torch.Generator().manual_seed(0)
    found = ConfusionMatrix(3)
    for i in range(20):
        labels = torch.randint(3, (4, 4), generator=generator)
        found.update(labels.where(torch.rand(4, 4, generator=generator) < i / 20, 0), labels, i)
    add(results, tmp_path / "a", found)
    add(results, tmp_path / "b", found)
    a, b = results.content["benchmarks"].values()
    low, high = a["mIoU_interval"]
    assert low < a["mIoU"] < high and a["mIoU_interval"] == b["mIoU_interval"]
    assert results.content["mean"] == {"mIoU": pytest.approx(a["mIoU"]), "mIoU_interval": pytest.approx([low, high])}
    add(results, tmp_path / "c", counts([0, 0, 1, 1], [0, 0, 0, 0]))
    assert results.content["mean"]["mIoU_interval"] is None


def test_counts_of_fewer_images_are_an_error(tmp_path: Path) -> None:
    results = report(tmp_path / "out")
    add(results, tmp_path / "mine", counts([0, 0, 1, 1], [0, 0, 0, 0]))
    row = {**results.content["benchmarks"]["mine"], "images": 2}
    with pytest.raises(UserError, match="1 of 2 images"):
        read_counts(results.folder, row)


def test_a_set_without_a_counted_pixel_writes_nothing(tmp_path: Path) -> None:
    results = report(tmp_path / "out")
    with pytest.raises(BenchmarkError, match=r"mine.*255"):
        add(results, tmp_path / "mine", counts([0, 0, 1, 1], [IGNORED] * 4))
    assert not results.path.exists() and not (tmp_path / "out" / "table.md").exists()


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    results = report(tmp_path / "out")
    found = ConfusionMatrix(3)
    for i in range(10):  # without a warning: pytest-xdist cannot send captured text that is not UTF-8
        found.update(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2]]), i)
    add(results, tmp_path / name, found)
    assert b"caf\xe9" in (tmp_path / "out" / "table.md").read_bytes()
    assert list(strict(results.path)["benchmarks"]) == [name]  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["table.md", "per_class", "sweep.md", "strides.png"])
def test_files_of_the_user_are_not_replaced(name: str, tmp_path: Path) -> None:
    if name == "per_class":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    make = SweepReport if name in ("sweep.md", "strides.png") else partial(Report, protocol={"inference": "single"})
    with pytest.raises(UserError, match=rf"{name} was not written by spar evaluate.*--out"):
        make(tmp_path, {"family": "Tiny"}, environment={})
