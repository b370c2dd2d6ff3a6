"""The cache: what is read is what was written, and everything else is refused by name."""

import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from spar_lightning.datamodules.augmentation import Record
from spar_lightning.datamodules.feature_cache import FeatureCache
from spar_lightning.datamodules.feature_shard import CacheError, Entry
from spar_lightning.datamodules.image import encode_image
from spar_lightning.datamodules.plan import Source

IDENTITY = {"teacher": {"stride": 24, "weights": "abc"}, "seed": 0}


def sources(count: int, first: int = 1) -> list[Source]:
    return [Source(f"sa_{i}", "sa_000000.tar", 512 * i, 10, f"{i:032x}") for i in range(first, first + count)]


def make(source: Source) -> Entry:
    """A stand-in for the teacher: ragged maps that depend on the key."""
    number = int(source.key[3:])
    rng = np.random.default_rng(number)
    h, w = rng.integers(1, 9, 2)
    image = torch.from_numpy(rng.integers(0, 256, (3, 8 * h, 8 * w), np.uint8))
    features = rng.standard_normal((h, w, 5)).astype(np.float16)
    return Entry(source.key, encode_image(image), features, Record(8 * h, 8 * w, 0, 0, 8 * h, 8 * w, False))


def built(root: Path, count: int = 70) -> FeatureCache:
    cache = FeatureCache(root, IDENTITY)
    cache.build(sources(count), make)
    return cache


def assert_same(cache: FeatureCache, keys: list[str]) -> None:
    dataset = cache.dataset(keys)
    assert len(dataset) == len(keys)
    for i, key in enumerate(keys):
        sample, entry = dataset[i], make(Source(key, "", 0, 0, ""))
        assert sample.key == key
        assert encode_image(sample.image) == entry.png
        assert sample.features is not None and np.array_equal(sample.features.numpy(), entry.features)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    cache = built(tmp_path)
    assert [path.name for path in sorted((tmp_path / "shards").iterdir())] == ["00000.h5", "00001.h5"]
    assert list((tmp_path / "tmp").iterdir()) == []
    assert_same(cache, [source.key for source in sources(70)])
    assert_same(cache, ["sa_65", "sa_3"])  # a selection, in its own order


def test_more_images_extend_a_cache(tmp_path: Path) -> None:
    built(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    cache = built(tmp_path, 100)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert {name: after[name] for name in before} == before and len(after) == 3
    assert_same(cache, [source.key for source in sources(100)])


def test_a_build_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    made = []

    def stop_in_the_second_shard(source: Source) -> Entry:
        if source.key == "sa_67":
            raise KeyboardInterrupt
        return make(source)

    def count(source: Source) -> Entry:
        made.append(source.key)
        return make(source)

    cache = FeatureCache(tmp_path, IDENTITY)
    with pytest.raises(KeyboardInterrupt):
        cache.build(sources(70), stop_in_the_second_shard)
    with (tmp_path / "plan.jsonl").open("a") as plan:
        plan.write('{"shard": 2, "key": "torn')  # as a crash leaves it
    cache.build(sources(71), count)
    assert made == [f"sa_{i}" for i in range(65, 72)]
    assert_same(cache, [source.key for source in sources(71)])


def test_another_identity_is_refused_with_the_differences(tmp_path: Path) -> None:
    built(tmp_path, 3)
    other = {"teacher": {"stride": 16, "weights": "abc"}, "seed": 0}
    with pytest.raises(CacheError, match=r"teacher.stride: cache 24, configuration 16\n.*data.cache") as error:
        FeatureCache(tmp_path, other)
    assert "weights" not in str(error.value)


def test_images_without_features_are_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"1 of 2 images have no features in .* the first of them sa_99"):
        built(tmp_path, 3).dataset(["sa_1", "sa_99"])


def test_another_image_under_the_same_key_is_refused(tmp_path: Path) -> None:
    cache = built(tmp_path, 3)
    with pytest.raises(CacheError, match=r"image sa_1 in sa_000000\.tar is not the one"):
        cache.build([replace(sources(1)[0], digest="0" * 32)], make)


def test_nothing_altered_is_ever_returned(tmp_path: Path) -> None:
    cache = built(tmp_path, 20)
    keys = [source.key for source in sources(20)]
    path = tmp_path / "shards" / "00000.h5"
    whole = path.read_bytes()
    refused: list[str] = []
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert_same(cache, keys)
        except CacheError as error:
            refused.append(str(error))
    assert all("00000.h5" in sentence for sentence in refused)
    assert len(refused) > 10  # the rest fell on bytes that hold no data
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match="is damaged"):
        cache.dataset(keys)[0]


def test_a_shard_of_another_cache_is_refused(tmp_path: Path) -> None:
    cache = built(tmp_path, 3)
    with h5py.File(tmp_path / "shards" / "00000.h5", "a") as file:
        file.attrs["fingerprint"] = "another"
    with pytest.raises(CacheError, match="belongs to another cache"):
        cache.dataset(["sa_1"])[0]


def test_workers_open_shards_themselves(tmp_path: Path) -> None:
    dataset = built(tmp_path, 3).dataset(["sa_2"])
    expected = dataset[0]
    twin = pickle.loads(pickle.dumps(dataset))
    assert twin._open == {} and torch.equal(twin[0].image, expected.image)
