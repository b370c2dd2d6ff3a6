"""Tests of the sample order: each sample once per epoch over all ranks, equal steps per rank, exact resume."""

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spar_lightning.datamodules.dataloader import ResumableLoader
from spar_lightning.datamodules.samplers import EpochOrder, RankSlice, StreamOrder
from spar_lightning.errors import UserError

sizes = st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))


@given(sizes)
def test_ranks_partition_an_epoch(case: tuple[int, int, int, int]) -> None:
    length, batch, world, epoch = case
    if length < batch * world:
        with pytest.raises(UserError, match=r"data\.batch_size"):
            EpochOrder(length, batch, 0, world, 0)
        return
    orders = [EpochOrder(length, batch, rank, world, seed=1) for rank in range(world)]
    for order in orders:
        order.set_epoch(epoch)
    seen = [list(chain(*order)) for order in orders]
    assert len({len(rank) for rank in seen}) == 1
    together = list(chain(*seen))
    assert len(set(together)) == len(together) == length // (batch * world) * batch * world


def test_epochs_differ_and_the_world_does_not_change_the_global_order() -> None:
    one = EpochOrder(24, 2, 0, 1, seed=5)
    first = list(chain(*one))
    one.set_epoch(1)
    assert list(chain(*one)) != first
    two = [list(EpochOrder(24, 1, rank, 2, seed=5)) for rank in range(2)]
    assert [i for a, b in zip(*two, strict=True) for i in a + b] == first


@given(st.integers(1, 30), st.integers(1, 6))
def test_validation_counts_each_image_once(length: int, world: int) -> None:
    slices = [list(RankSlice(length, rank, world)) for rank in range(world)]
    assert sorted(chain(*slices)) == list(range(length))


def order(kind: str, length: int, batch: int, rank: int, world: int, workers: int) -> EpochOrder:
    """Return an order over uneven shards (`stream`), or over samples with random access (`map`)."""
    if kind == "map":
        return EpochOrder(length, batch, rank, world, seed=3)
    location = np.minimum(np.arange(length) // 5, 2)  # shards of 5, 5 and the rest
    return StreamOrder(location, batch, rank, world, 3, workers)


@given(sizes, st.integers(0, 3))
def test_streams_partition_an_epoch_and_move_forward(case: tuple[int, int, int, int], workers: int) -> None:
    length, batch, world, epoch = case
    if length < batch * world:
        return
    seen: list[int] = []
    for rank in range(world):
        stream = order("stream", length, batch, rank, world, workers)
        stream.set_epoch(epoch)
        batches = list(stream)
        assert len(batches) == len(stream) == length // (batch * world)
        for worker in range(max(workers, 1)):  # the samples of one loader process
            mine = list(chain(*batches[worker :: max(workers, 1)]))
            restarts = [a for a, b in pairwise(mine) if b < a]
            assert len(restarts) <= 2  # it moves back only to open another of the three shards
            seen += mine
    assert len(set(seen)) == len(seen) == length // (batch * world) * batch * world


@pytest.mark.parametrize(
    ("kind", "start_method", "workers"), [("map", "fork", 2), ("stream", "fork", 2), ("map", "spawn", 1)]
)
def test_workers_of_two_ranks_see_each_image_once(kind: str, start_method: str, workers: int) -> None:
    """Load 13 images on 2 ranks: 6 steps on both, one image is dropped."""
    loaders = [
        ResumableLoader(range(13), order(kind, 13, 1, rank, 2, workers), workers, start_method=start_method)  # type: ignore[arg-type]
        for rank in range(2)
    ]
    for epoch in range(2):
        seen = []
        for loader in loaders:
            loader.order.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == 6
            seen += [value for (value,) in batches]
        assert len(set(seen)) == 12 and set(seen) <= set(range(13))


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("workers", [0, 2])
@given(stop=st.integers(0, 12))
@settings(max_examples=2, deadline=None)
def test_resume_continues_the_epoch(kind: str, workers: int, stop: int) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(list(range(12)), order(kind, 12, 1, 0, 1, workers), workers)  # type: ignore[arg-type]

    whole = [batch[0] for batch in loader()]
    interrupted = loader()
    seen = []
    for batch in interrupted:
        seen.append(batch[0])
        if len(seen) >= stop:
            break
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    assert seen + [batch[0] for batch in resumed] == whole
    assert [batch[0] for batch in resumed] == whole  # the next pass is a complete epoch again
