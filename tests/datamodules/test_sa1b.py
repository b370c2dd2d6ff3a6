"""Tests of the selection of training images: the first ones, a fraction, a list; and how many shards are read."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from spar_lightning.datamodules import SA1B
from spar_lightning.datasets.subset import select
from spar_lightning.errors import UserError
from tests.datasets.test_shard_index import write_tar
from tests.feature_cache.test_cache import collect, sources


def keys(images: object) -> set[bytes]:
    return set(images.keys.tolist())  # type: ignore[attr-defined]


def test_a_larger_fraction_contains_the_smaller() -> None:
    images = collect(sources(200))
    tenth, half = select(images, None, 0.1), select(images, None, 0.5)
    assert len(tenth) == 20 and len(half) == 100 and len(select(images, None, 1.0)) == 200
    assert keys(tenth) < keys(half)
    assert keys(select(images.take(np.arange(200)[::-1]), None, 0.1)) == keys(tenth)  # in any order
    order = [int(key[3:]) for key in half.keys.tolist()]
    assert order == sorted(order)


def test_keys_from_a_list_and_a_file(tmp_path: Path) -> None:
    images = collect(sources(9))
    assert keys(select(images, ["sa_7", "sa_2"], None)) == {b"sa_2", b"sa_7"}
    (tmp_path / "keys.txt").write_text("sa_3\n\nsa_4\n")
    assert keys(select(images, str(tmp_path / "keys.txt"), None)) == {b"sa_3", b"sa_4"}


@pytest.mark.parametrize(("max_images", "tars"), [(3, 1), (4, 1), (5, 2), (10, 3), (None, 4), (99, 4)])
def test_only_as_many_shards_are_read_as_max_images_takes(max_images: int | None, tars: int, tmp_path: Path) -> None:
    for tar in range(4):
        members = {f"sa_{4 * tar + i}.jpg": f"{tar} {i}".encode() for i in range(4)}
        write_tar(tmp_path / f"sa_{tar}.tar", members)
    data = SA1B(str(tmp_path / "sa_{0..3}.tar"), cache=str(tmp_path / "cache"), max_images=max_images)
    data.trainer = SimpleNamespace(default_root_dir=str(tmp_path))  # type: ignore[assignment]
    assert len(data.images()) == min(max_images or 16, 16)
    assert len(list((tmp_path / "cache" / "scans").iterdir())) == tars


def test_a_cache_that_is_read_only_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"a"})
    (tmp_path / "cache").mkdir()
    (tmp_path / "run").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "cache" and access(path, mode))
    data = SA1B(str(path), cache=str(tmp_path / "cache"))
    data.trainer = SimpleNamespace(default_root_dir=str(tmp_path / "run"))  # type: ignore[assignment]
    assert keys(data.images()) == {b"a"}
    assert not list((tmp_path / "cache").iterdir()) and len(list((tmp_path / "run" / "scans").iterdir())) == 1


@pytest.mark.parametrize("value", [None, "text"])
def test_what_is_not_an_augmentation(value: object) -> None:
    with pytest.raises(UserError, match=rf"data\.augmentation .*{value!r}.*released, text, .*preset"):
        SA1B("a.tar", augmentation=value)  # type: ignore[arg-type]
