"""Every sample once per epoch over all ranks, the same number of steps on each, and exact resume."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spar_lightning.datamodules.loader import EpochOrder, RankSlice, ResumableLoader
from spar_lightning.errors import UserError

sizes = st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))


@given(sizes)
def test_ranks_partition_an_epoch(case: tuple[int, int, int, int]) -> None:
    length, batch, world, epoch = case
    if length < batch * world:
        with pytest.raises(UserError, match="fewer than one step takes"):
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


@pytest.mark.parametrize("workers", [0, 2])
@given(stop=st.integers(0, 12))
@settings(max_examples=4, deadline=None)
def test_resume_continues_the_epoch(workers: int, stop: int) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(list(range(12)), EpochOrder(12, 1, 0, 1, seed=3), workers)  # type: ignore[arg-type]

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
    assert [batch[0] for batch in resumed] == whole  # and the next pass is a whole epoch again
