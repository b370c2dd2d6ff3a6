"""Tests of the feature cache: data is read back exactly, and damaged or foreign files are rejected by name."""

import os
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from spar_lightning.datasets.augmentation import Record
from spar_lightning.datasets.image_source import Source
from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.feature_cache.cache import FeatureCache, Make
from spar_lightning.feature_cache.plan import ShardPlan
from spar_lightning.feature_cache.shard import CacheError, Entry, FeatureShard, Rejected
from spar_lightning.image.codec import encode_image

IDENTITY = {"teacher": {"stride": 24, "weights": "abc"}, "seed": 0}


def keys(count: int, first: int = 1) -> list[str]:
    return [f"sa_{i}" for i in range(first, first + count)]


def sources(count: int, first: int = 1) -> list[Source]:
    numbers = range(first, first + count)
    return [Source(f"sa_{i}", "sa_000000.tar", f"sa_{i}.jpg", 512 * i, 10, f"{i:032x}") for i in numbers]


def collect(sources: list[Source]) -> Images:
    return Images.collect(sources, [(8, 8)] * len(sources))


def make(source: Source) -> Entry:
    """Replace the teacher: return feature maps of different sizes that depend on the key."""
    number = int(source.key[3:])
    rng = np.random.default_rng(number)
    h, w = rng.integers(1, 9, 2)
    image = torch.from_numpy(rng.integers(0, 256, (3, 8 * h, 8 * w), np.uint8))
    features = rng.standard_normal((h, w, 5)).astype(np.float16)
    return Entry(
        source.key, source.digest, encode_image(image), features, Record(8 * h, 8 * w, 0, 0, 8 * h, 8 * w, False)
    )


def each(make: Callable[[Source], Entry | Rejected]) -> Make:
    return lambda sources: map(make, sources)


def built(root: Path, count: int = 70, make: Callable[[Source], Entry | Rejected] = make) -> FeatureCache:
    cache = FeatureCache(root, IDENTITY)
    cache.build(collect(sources(count)), each(make), show=False)
    return cache


def assert_same(cache: FeatureCache, keys: list[str]) -> None:
    dataset = cache.dataset(np.array([key.encode() for key in keys]))
    assert len(dataset) == len(keys)
    for i, key in enumerate(keys):
        sample, entry = dataset[i], make(sources(1, int(key[3:]))[0])
        assert sample.key == key
        assert encode_image(sample.image) == entry.content
        assert sample.features is not None and np.array_equal(sample.features.numpy(), entry.features)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    cache = built(tmp_path)
    assert [path.name for path in sorted((tmp_path / "shards").iterdir())] == ["00000.h5", "00001.h5"]
    assert list((tmp_path / "tmp").iterdir()) == []
    assert_same(cache, keys(70))
    assert_same(cache, ["sa_65", "sa_3"])  # a subset in a different order


def test_more_images_extend_a_cache(tmp_path: Path) -> None:
    built(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    cache = built(tmp_path, 100)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert {name: after[name] for name in before} == before and len(after) == 3
    assert_same(cache, keys(100))


def test_a_build_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    made = []

    def stop_in_the_second_shard(source: Source) -> Entry:
        if source.key == "sa_67":
            raise KeyboardInterrupt
        return make(source)

    def count(source: Source) -> Entry:
        made.append(source.key)
        return make(source)

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, 70, stop_in_the_second_shard)
    cache = built(tmp_path, 71, count)
    assert made == [f"sa_{i}" for i in range(65, 72)]
    assert_same(cache, keys(71))
    assert not any((tmp_path / "claims").iterdir()) and not any((tmp_path / "tmp").iterdir())


def test_a_plan_that_nobody_carries_out_binds_nobody(tmp_path: Path) -> None:
    def stop(source: Source) -> Entry:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, 70, stop)
    cache = built(tmp_path, 3)  # a part of the first planned shard
    assert_same(cache, keys(3))
    assert len(list((tmp_path / "plan").iterdir())) == 2
    assert_same(built(tmp_path, 70), keys(70))


def test_two_builders_with_one_plan_make_the_same_shards(tmp_path: Path) -> None:
    one, two = FeatureCache(tmp_path, IDENTITY), FeatureCache(tmp_path, IDENTITY)
    images = collect(sources(130))
    assert {k: v.keys.tolist() for k, v in one.plan.extend(images, one.index.numbers).items()} == {
        k: v.keys.tolist() for k, v in two.plan.extend(images, two.index.numbers).items()
    }
    assert len(list((tmp_path / "plan").iterdir())) == 1


def test_rejected_images_are_listed_counted_and_left_out(tmp_path: Path) -> None:
    def reject_some(source: Source) -> Entry | Rejected:
        return Rejected(source.key, source.digest, "truncated") if source.key in ("sa_2", "sa_66") else make(source)

    cache = built(tmp_path, 70, reject_some)
    reasons = {key: (item.reason, shard) for key, (item, shard) in cache.index.rejected().items()}
    assert reasons == {"sa_2": ("truncated", "00000.h5"), "sa_66": ("truncated", "00001.h5")}
    dataset = cache.dataset(np.array([b"sa_1", b"sa_2", b"sa_3"]))
    assert [dataset[i].key for i in range(len(dataset))] == ["sa_1", "sa_3"]
    assert len(cache.missing(collect(sources(70)))) == 0  # unusable images count as done


def test_a_shard_of_nothing_but_rejected_images(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="3 of 3"):
        built(tmp_path, 3, lambda source: Rejected(source.key, source.digest, "empty"))
    cache = built(tmp_path, 4)
    assert len(cache.index) == 1 and len(cache.index.rejected()) == 3
    assert len(cache.dataset(np.array([b"sa_1", b"sa_4"]))) == 1


def test_too_many_rejected_images_stop_the_build(tmp_path: Path) -> None:
    def reject_all(source: Source) -> Rejected:
        return Rejected(source.key, source.digest, "truncated")

    with pytest.raises(CacheError, match=r"64 of 200 [\s\S]*sa_1: truncated"):
        built(tmp_path, 200, reject_all)
    assert len(list((tmp_path / "shards").iterdir())) == 1
    with pytest.raises(CacheError, match=r"\b10\b.*data\.keys"):
        built(tmp_path, 200)


def test_another_identity_is_refused_with_the_differences(tmp_path: Path) -> None:
    built(tmp_path, 3)
    other = {"teacher": {"stride": 16, "weights": "abc"}, "seed": 0}
    with pytest.raises(CacheError, match=r"teacher\.stride: .*24.*16\n.*data\.cache") as error:
        FeatureCache(tmp_path, other)
    assert "weights" not in str(error.value)


def test_images_without_features_are_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"1 of 2 .*sa_99"):
        built(tmp_path, 3).dataset(np.array([b"sa_1", b"sa_99"]))


def test_another_image_under_the_same_key_is_refused(tmp_path: Path) -> None:
    cache = built(tmp_path, 3)
    with pytest.raises(CacheError, match=r"sa_1 in sa_000000\.tar"):
        cache.build(collect([replace(sources(1)[0], digest="0" * 32)]), each(make))


def damage(content: bytes, kind: str, place: int) -> bytes:
    if kind == "truncation":
        return content[:place]
    size = 1 if kind == "bit flip" else 4096
    hole = bytes(size) if kind == "hole" else bytes([content[place] ^ (1 << place % 8)])
    return content[:place] + hole[: len(content) - place] + content[place + size :]


@pytest.mark.parametrize("kind", ["bit flip", "hole", "truncation"])
@pytest.mark.parametrize("part", ["shards/00000.h5", "plan/00000.npz", "index.npz", "manifest.json"])
def test_nothing_altered_is_ever_returned(tmp_path: Path, part: str, kind: str) -> None:
    """After each of 50 kinds of damage, the data is read back exactly, or the error names the file."""
    built(tmp_path, 20)
    path = tmp_path / part
    whole, plan = path.read_bytes(), FeatureCache(tmp_path, IDENTITY).plan.read()[0]
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 50).tolist():
        path.write_bytes(damage(whole, kind, place))
        try:
            cache = FeatureCache(tmp_path, IDENTITY)
            assert len(cache.missing(collect(sources(20)))) == 0
            assert_same(cache, keys(20))
            assert (cache.plan.read()[0] == plan).all()
        except (CacheError, ShardError) as error:
            assert path.name in str(error) and "elete" in str(error)
            refused += 1
    if part == "index.npz":
        assert refused == 0  # it is rebuilt from the shards
    elif part == "shards/00000.h5" or kind == "truncation":
        assert refused > 10  # other changes hit unused bytes


def test_a_deleted_shard_is_built_again(tmp_path: Path) -> None:
    cache = built(tmp_path, 70)
    (tmp_path / "shards" / "00000.h5").unlink()
    assert len(cache.missing(collect(sources(70)))) == 64
    assert_same(built(tmp_path, 70), keys(70))


def test_a_deleted_plan_is_made_again(tmp_path: Path) -> None:
    built(tmp_path, 70)
    for path in (tmp_path / "plan").iterdir():
        path.unlink()
    assert_same(built(tmp_path, 100), keys(100))
    assert len(list((tmp_path / "shards").iterdir())) == 3


def test_a_full_disk_is_a_clear_error_and_the_cache_goes_on(tmp_path: Path) -> None:
    """Simulate a full disk with a child process that limits its file size to less than a shard."""
    built(tmp_path, 3)
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            built(tmp_path, 70)
        except OSError as error:
            os._exit(40 if "File too large" in str(error) and str(tmp_path / "tmp") in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 40
    assert not any((tmp_path / "tmp").iterdir()) and not any((tmp_path / "claims").iterdir())
    assert_same(FeatureCache(tmp_path, IDENTITY), keys(3))
    assert_same(built(tmp_path, 70), keys(70))


def test_a_shard_of_another_cache_is_refused(tmp_path: Path) -> None:
    cache = built(tmp_path, 3)
    with h5py.File(tmp_path / "shards" / "00000.h5", "a") as file:
        file.attrs["fingerprint"] = "another"
    with pytest.raises(CacheError, match=r"00000\.h5"):
        cache.dataset(np.array([b"sa_1"]))[0]


def test_workers_open_shards_themselves(tmp_path: Path) -> None:
    dataset = built(tmp_path, 3).dataset(np.array([b"sa_2"]))
    expected = dataset[0]
    twin = pickle.loads(pickle.dumps(dataset))
    assert not twin._open and torch.equal(twin[0].image, expected.image)


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spar_lightning.feature_cache.plan.SAMPLES_PER_SHARD", 2)
    monkeypatch.setattr("spar_lightning.feature_cache.dataset.OPEN_SHARDS", 3)
    dataset = built(tmp_path, 20).dataset(np.array([key.encode() for key in keys(20)]))
    assert [dataset[i].key for i in range(20)] == keys(20)
    assert len(dataset._open) == 3


def test_a_shard_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    cache = built(tmp_path, 70)
    dataset = cache.dataset(np.array([b"sa_1"]))
    (tmp_path / "shards" / "00001.h5").rename(tmp_path / "shards" / "00000.h5")
    with pytest.raises(CacheError, match=r"00000\.h5 .*sa_1"):
        dataset[0]


def test_a_flipped_bit_anywhere_neither_hangs_nor_passes(tmp_path: Path) -> None:
    """Flip a bit in every 13th byte of a small shard that also lists an unusable image."""
    cache = built(tmp_path, 3, lambda s: Rejected(s.key, s.digest, "bad") if s.key == "sa_2" else make(s))
    path = tmp_path / "shards" / "00000.h5"
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        path.write_bytes(damage(whole, "bit flip", place))
        try:
            with FeatureShard(path, cache.fingerprint) as shard:
                assert shard.keys == ["sa_1", "sa_3"] and [r.key for r in shard.rejected] == ["sa_2"]
                for row, key in enumerate(shard.keys):
                    expected = make(sources(1, int(key[3:]))[0])
                    assert np.array_equal(shard.read(row)[1].numpy(), expected.features)
        except CacheError as error:
            assert "00000.h5" in str(error)


def test_two_builders_that_plan_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second builder publish its plan and build after the first one has read the plan."""
    late, read = FeatureCache(tmp_path, IDENTITY), ShardPlan.read

    def read_then_be_overtaken(self: ShardPlan) -> object:
        plan = read(self)
        monkeypatch.setattr(ShardPlan, "read", read)
        built(tmp_path, 100)
        return plan

    monkeypatch.setattr(ShardPlan, "read", read_then_be_overtaken)
    made = []

    def count(source: Source) -> Entry:
        made.append(source.key)
        return make(source)

    late.build(collect(sources(300)), each(count), show=False)
    assert_same(late, keys(300))
    assert sorted(made) == sorted(keys(200, first=101))  # each image is computed only once


def test_a_lost_manifest_is_not_written_for_another_identity(tmp_path: Path) -> None:
    built(tmp_path, 3)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"00000\.h5"):
        FeatureCache(tmp_path, {"teacher": "another"})
    assert_same(built(tmp_path, 3), keys(3))


def test_what_others_put_beside_the_shards_is_passed_over(tmp_path: Path) -> None:
    cache = built(tmp_path, 3)
    for name in ("shards/.nfs0000000001", "shards/.00001.h5.Xy12", "plan/.00001.npz.swp"):
        (tmp_path / name).write_bytes(b"not ours")
    assert_same(cache, keys(3))
    assert_same(built(tmp_path, 70), keys(70))


def test_a_lost_index_is_made_again(tmp_path: Path) -> None:
    built(tmp_path, 3)
    (tmp_path / "index.npz").unlink()
    built(tmp_path, 3)
    assert (tmp_path / "index.npz").exists()


def test_a_copy_without_working_folders_can_be_read(tmp_path: Path) -> None:
    built(tmp_path, 3)
    for name in ("claims", "tmp", "plan"):
        shutil.rmtree(tmp_path / name)
    assert_same(FeatureCache(tmp_path, IDENTITY), keys(3))


def test_a_fixed_image_is_tried_again(tmp_path: Path) -> None:
    built(tmp_path, 3, lambda s: Rejected(s.key, s.digest, "cut off") if s.key == "sa_2" else make(s))
    images = collect([replace(s, digest="f" * 32) if s.key == "sa_2" else s for s in sources(3)])
    cache = FeatureCache(tmp_path, IDENTITY)
    assert cache.missing(images).keys.tolist() == [b"sa_2"]
    cache.build(images, each(make), show=False)
    assert cache.index.rejected() == {} and len(cache.dataset(images.keys)) == 3


def test_a_shard_that_is_out_of_reach_is_not_called_damaged(tmp_path: Path) -> None:
    dataset = built(tmp_path, 3).dataset(np.array([b"sa_1"]))
    (tmp_path / "shards" / "00000.h5").unlink()
    with pytest.raises(CacheError, match=r"00000\.h5") as error:
        dataset[0]
    assert "damaged" not in str(error.value)
