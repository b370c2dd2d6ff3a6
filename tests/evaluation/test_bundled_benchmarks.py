"""Tests of the bundled benchmarks: layouts of the downloads and of other projects, label values, classes, sets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.benchmark import opened_later
from spar_lightning.evaluation.benchmark_config import SETS, BenchmarkError, read, shipped
from tests import fake_benchmarks
from tests.evaluation.test_benchmark import opened


def test_the_layouts_of_the_bundled_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check values and image order of each layout against the content of the fake benchmarks."""
    fake_benchmarks.all_ten(tmp_path, [(10, 14), (14, 10), (8, 48)])
    for write in ("voc21", "voc20", "cityscapes", "ade20k"):
        assert len(opened(write, tmp_path)) == 3
    voc21, voc20, cityscapes, ade = (opened(name, tmp_path) for name in ("voc21", "voc20", "cityscapes", "ade20k"))
    assert set(voc21[0].labels.unique().tolist()) == {0, 1, 7, 20, IGNORED}
    assert set(voc20[0].labels.unique().tolist()) == {0, 6, 19, IGNORED}
    assert torch.equal(voc20[1].labels, torch.where(voc21[1].labels <= 0, IGNORED, voc21[1].labels - 1))
    assert cityscapes.stems == ["frankfurt/frankfurt_000000_000000", "frankfurt/frankfurt_000000_000002",
                                "lindau/lindau_000000_000001"]  # fmt: skip
    # The same classes from labelIds (frankfurt) and from trainIds (lindau).
    assert {int(v) for i in range(3) for v in cityscapes[i].labels.unique()} == {0, 11, 13, 18, IGNORED}
    assert set(ade[0].labels.unique().tolist()) == {0, 76, 149, IGNORED}
    stuff, things = (opened(name, tmp_path) for name in ("coco_stuff", "coco_object"))
    assert len(stuff) == len(things) == 3 and stuff.stems == ["000000000000", "000000000001", "000000000002"]
    assert set(stuff[0].labels.unique().tolist()) == {0, 11, 79, 80, 170, IGNORED}
    (tmp_path / "coco" / "images").mkdir()
    (tmp_path / "coco" / "images" / "val2017").symlink_to(tmp_path / "coco" / "val2017")
    assert len(opened("coco_stuff", tmp_path)) == 3 and not caplog.messages
    assert set(things[0].labels.unique().tolist()) == {0, 1, 12, 80}  # stuff and unlabeled pixels are background


def test_label_maps_that_others_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The layout of mmsegmentation, with its label maps of COCO-Stuff and those of COCO-Object."""
    fake_benchmarks.coco(tmp_path, [(8, 12)])
    folder, stem = tmp_path / "coco_stuff164k", "000000000000"
    jpg = tmp_path / "coco" / "val2017" / f"{stem}.jpg"
    raw = tmp_path / "coco" / "stuffthingmaps" / "val2017" / f"{stem}.png"
    expected = {name: opened(name, tmp_path)[0].labels for name in ("coco_stuff", "coco_object")}
    (folder / "images" / "val2017").mkdir(parents=True)
    jpg.rename(folder / "images" / "val2017" / jpg.name)
    maps = folder / "annotations" / "val2017"
    fake_benchmarks.grey_png(
        maps / f"{stem}_labelTrainIds.png", np.where(expected["coco_stuff"] < 0, 255, expected["coco_stuff"])
    )
    fake_benchmarks.grey_png(maps / f"{stem}_instanceTrainIds.png", expected["coco_object"].numpy())
    for _ in range(2):
        for name, labels in expected.items():
            assert torch.equal(opened(name, tmp_path)[0].labels, labels)
        if raw.exists():
            raw.rename(maps / raw.name)  # next to the others, and preferred
    assert not caplog.messages


@pytest.mark.parametrize(
    ("name", "classes", "names"),
    [("coco_object", 81, 25 + 8 + 79), ("coco_stuff", 171, 171), ("ade847", 847, 1235), ("context459", 459, 459)],
)
def test_classes_of_the_newer_ones(name: str, classes: int, names: int) -> None:
    description = read(shipped()[name])
    assert len(description.classes) == classes and sum(len(entry.names) for entry in description.classes) == names
    for kind in description.labels:
        assert kind.label_map is None or {*kind.label_map.values()} == {*range(classes)}


def test_sets() -> None:
    names = [benchmark.name for benchmark in opened_later(["standard8"], None)]
    assert names == [*SETS["paper6"], "coco_object", "coco_stuff"] and len(SETS["standard10"]) == 10
    with pytest.raises(BenchmarkError, match="voc20"):
        opened_later(["paper6", "voc20"], None)
