"""Tests that counts on disk add up to those of one process, even after an interruption between two files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.partial_counts import PartialCounts
from spar_lightning.files.atomic import MACHINE


def counts(*images: int) -> ConfusionMatrix:
    """Return counts of images with one pixel each."""
    made = ConfusionMatrix(2)
    for image in images:
        made.update(torch.tensor([[image % 2]]), torch.tensor([[0]]), image, float(image))
    return made


def test_parts_become_one(tmp_path: Path) -> None:
    folder = PartialCounts(tmp_path, "voc", 2)
    assert len(folder.gather().images) == 0
    folder.write(counts(0, 2), 0)
    folder.write(counts(1), 1)
    for _ in range(2):
        total = folder.gather()
        assert sorted(total.images) == [0, 1, 2] and total.matrix.tolist() == [[2, 1], [0, 0]]
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
    assert "voc.npz cannot be used" in caplog.text


@pytest.mark.parametrize("change", ["per_image", "matrix", "boundary"])
def test_counts_that_are_not_complete_are_counted_again(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = PartialCounts(tmp_path, "voc", 2)
    folder.write(counts(0, 2))
    content = dict(np.load(folder.path))
    if change == "per_image":
        del content["per_image"]  # as in version 0.1
    elif change == "boundary":
        content["per_image"] = content["per_image"][:, :5]
    else:
        content["matrix"] += 1  # as if other images had been added by version 0.1
    np.savez(folder.path, **content)
    assert folder.gather().images == []
    assert "its images are evaluated again" in caplog.text.lower() and "counts of" in caplog.text


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
