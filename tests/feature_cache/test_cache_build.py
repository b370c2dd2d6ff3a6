"""Tests of a build with other processes: leases, working folders, the progress bar, and work per shard."""

import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from spar_lightning.datasets.image_source import Source
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.index import CacheIndex
from spar_lightning.feature_cache.shard import CacheError, Entry, Rejected
from spar_lightning.files.leases import Claims
from tests.feature_cache.test_cache import IDENTITY, assert_same, built, collect, each, keys, make, sources


def abandon(root: Path, name: str) -> None:
    """Leave the lease of a process that has been killed."""
    pid = os.fork()
    if pid == 0:
        Claims(root / "claims").take(name)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (root / "claims" / name).exists()


def test_leases_of_killed_builders_are_removed(tmp_path: Path) -> None:
    built(tmp_path, 70)
    abandon(tmp_path, "00000.h5")
    built(tmp_path, 70)  # nothing is missing
    assert not any((tmp_path / "claims").iterdir())
    abandon(tmp_path, "00001.h5")
    abandon(tmp_path, "00002.h5")
    (tmp_path / "claims" / "00003.h5").touch()  # empty lease of version 0.1
    assert_same(built(tmp_path, 200), keys(200))
    assert not any((tmp_path / "claims").iterdir()) and not any((tmp_path / "tmp").iterdir())


def test_working_folders_deleted_during_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete claims/ and tmp/ while shards are computed and while they are written."""
    monkeypatch.setattr("spar_lightning.feature_cache.plan.SAMPLES_PER_SHARD", 2)
    synced: list[int] = []
    sync = os.fsync

    def delete() -> None:
        for name in ("claims", "tmp"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)

    def make_and_delete(source: Source) -> Entry:
        if int(source.key[3:]) % 2:
            delete()
        return make(source)

    def sync_and_delete(descriptor: int) -> None:
        sync(descriptor)
        synced.append(descriptor)
        if len(synced) % 3 == 0:
            delete()

    monkeypatch.setattr(os, "fsync", sync_and_delete)
    cache = built(tmp_path, 20, make_and_delete)
    monkeypatch.undo()
    assert_same(cache, keys(20))
    assert_same(built(tmp_path, 70), keys(70))


def test_the_shards_are_not_listed_for_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spar_lightning.feature_cache.plan.SAMPLES_PER_SHARD", 1)
    listed, listdir = [], os.listdir

    def slow(path: Path) -> list[str]:
        if path == tmp_path / "shards":
            listed.append(path)
            time.sleep(0.1)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", slow)
    cache = built(tmp_path, 100)
    assert len(listed) <= 6
    assert_same(cache, keys(100))


def test_the_progress_includes_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spar_lightning.feature_cache.plan.SAMPLES_PER_SHARD", 4)
    bars: list[tqdm[Any]] = []
    seen: list[float] = []

    class Noted(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(self)

    def make_after_another(source: Source) -> Entry:
        if not seen:
            pid = os.fork()
            if pid == 0:
                FeatureCache(tmp_path, IDENTITY).build(collect(sources(20, first=21)), each(make), show=False)
                os._exit(0)
            os.waitpid(pid, 0)
        seen.append(bars[0].n)
        return make(source)

    monkeypatch.setattr("spar_lightning.feature_cache.cache.tqdm", Noted)
    cache = FeatureCache(tmp_path, IDENTITY)
    cache.build(collect(sources(40)), each(make_after_another))
    assert len(seen) == 20 and seen[:4] == [0, 1, 2, 3]
    assert seen[8] >= 24  # the first shard has been published, five others are known to be finished
    assert bars[0].n == 40
    assert_same(cache, keys(40))


@pytest.mark.parametrize("bad", [9, 11])
def test_unusable_images_of_other_lists_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """Check also that the images are searched seldom, although the cache lists more than the limit of 10."""
    monkeypatch.setattr("spar_lightning.feature_cache.plan.SAMPLES_PER_SHARD", 1)
    built(tmp_path, 11, lambda s: Rejected(s.key, s.digest, "bad") if s.key != "sa_1" else make(s))
    searched, rejected = [], CacheIndex.rejected
    cache = FeatureCache(tmp_path, IDENTITY)

    def count(self: CacheIndex) -> object:
        searched.append(self)
        return rejected(self)

    def reject_some(source: Source) -> Entry | Rejected:
        return Rejected(source.key, source.digest, "bad") if int(source.key[3:]) < 100 + bad else make(source)

    monkeypatch.setattr(CacheIndex, "rejected", count)
    with pytest.raises(CacheError, match="11 of 100") if bad > 10 else nullcontext():
        cache.build(collect(sources(100, first=100)), each(reject_some), show=False)
    assert len(searched) < 10


def test_missing_features_of_a_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path, 3)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    built(tmp_path, 3)  # nothing to write
    with pytest.raises(CacheError, match=r"1 of 4 images .*read-only"):
        built(tmp_path, 4)
