"""Tests that counts on disk add up to those of one process, even after an interruption between two files."""

from pathlib import Path

import pytest

from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.partial_counts import PartialCounts
from spar_lightning.files.atomic import MACHINE


def counts(*images: int) -> ConfusionMatrix:
    made = ConfusionMatrix(2)
    made.matrix += sum(images)
    made.images, made.milliseconds = list(images), [float(image) for image in images]
    return made


def test_parts_become_one(tmp_path: Path) -> None:
    folder = PartialCounts(tmp_path, "voc", 2)
    assert len(folder.gather().images) == 0
    folder.write(counts(0, 2), 0)
    folder.write(counts(1), 1)
    for _ in range(2):
        total = folder.gather()
        assert sorted(total.images) == [0, 1, 2] and total.matrix.sum() == 12
        assert [path.name for path in (tmp_path / "counts").glob("*.npz")] == ["voc.npz"]


def test_a_part_that_is_counted_already_is_left_out(tmp_path: Path) -> None:
    folder = PartialCounts(tmp_path, "voc", 2)
    folder.write(counts(0, 2, 1))
    folder.write(counts(0, 2), 0)
    assert folder.gather().images == [0, 2, 1]


def test_a_damaged_file_is_counted_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = PartialCounts(tmp_path, "voc", 2)
    folder.write(counts(0, 2))
    folder.write(counts(1), 0)
    path = tmp_path / "counts" / "voc.npz"
    content = bytearray(path.read_bytes())
    content[150] ^= 4
    path.write_bytes(content)
    assert folder.gather().images == [1]
    assert "voc.npz is damaged" in caplog.text


def test_any_name(tmp_path: Path) -> None:
    folder = PartialCounts(tmp_path, "my[1]*", 2)
    folder.write(counts(3), 0)
    PartialCounts(tmp_path, "my1x", 2).write(counts(4), 0)
    assert folder.gather().images == [3]


def test_what_a_dead_process_left_unfinished_goes(tmp_path: Path) -> None:
    folder = PartialCounts(tmp_path, "voc", 2)
    folder.write(counts(1))
    left = tmp_path / "counts" / "tmp" / f"{MACHINE}.999999999.abcd.voc.npz"
    left.touch()
    assert folder.gather().images == [1] and not left.exists()
