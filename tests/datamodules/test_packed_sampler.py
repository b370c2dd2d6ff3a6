"""Tests of the packs: each image once, within the limit, equal numbers of steps for all ranks and epochs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spar_lightning.datamodules import SA1B
from spar_lightning.datamodules.packed_sampler import PackOrder
from spar_lightning.errors import UserError

SIZES = np.random.default_rng(0).integers(1024, 7120, 500)


def orders(tokens: np.ndarray, limit: int, ranks: int) -> list[PackOrder]:
    return [PackOrder(tokens, limit, rank, ranks, seed=0) for rank in range(ranks)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=40, max_size=120), st.integers(20, 60), st.integers(1, 4), st.integers(0, 9)
)
def test_every_image_once_within_the_limit(tokens: list[int], limit: int, ranks: int, epoch: int) -> None:
    array = np.array(tokens)
    dealt = []
    for order in orders(array, limit, ranks):
        order.set_epoch(epoch)
        packs = list(order)
        assert len(packs) == len(order)  # on every rank and in every epoch
        dealt += packs
    assert len({len(order) for order in orders(array, limit, ranks)}) == 1
    assert sorted(i for pack in dealt for i in pack) == list(range(len(tokens)))
    assert all(pack and (array[pack].sum() <= limit or len(pack) == 1) for pack in dealt)


def test_packs_are_full_and_ranks_have_the_same_work() -> None:
    four = orders(SIZES, 16384, 4)
    steps = list(zip(*four, strict=True))
    tokens = np.array([[SIZES[pack].sum() for pack in step] for step in steps])
    squares = np.array([[(SIZES[pack] ** 2).sum() for pack in step] for step in steps])
    assert tokens.mean() > 0.9 * 16384
    assert (tokens.max(axis=1) / tokens.mean(axis=1)).mean() < 1.05
    assert (squares.max(axis=1) / squares.mean(axis=1)).mean() < 1.005


def test_epochs_draw_other_packs_and_a_resume_goes_on() -> None:
    order = PackOrder(SIZES, 16384, 0, 1, seed=0)
    first = list(order)
    assert list(order) == first
    order.resume({"epoch": 0, "order": order.identity(), "legs": [{**order.world(), "steps": 30}]})
    assert list(order) == first[30:]
    order.set_epoch(1)
    together = {frozenset(pack) for pack in first} & {frozenset(pack) for pack in order}
    assert not together


def test_the_number_of_packs_is_found_in_a_few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    draws, draw = list[int](), PackOrder._draw

    def count(self: PackOrder, images: np.ndarray, limit: int, count: int, seed: list[int]) -> list[list[int]] | None:
        draws.append(count)
        return draw(self, images, limit, count, seed)

    monkeypatch.setattr(PackOrder, "_draw", count)
    order = PackOrder(np.tile(SIZES, 20), 16384, 0, 1, seed=0)
    assert len(draws) < 25 and len(order) * 16384 < 1.06 * order.tokens.sum()


def test_an_image_above_the_limit_is_a_pack_of_its_own() -> None:
    packs = list(PackOrder(np.array([50, 3, 3, 4]), 10, 0, 1, seed=0))
    assert sorted(map(sorted, packs)) == [[0], [1, 2, 3]]


def test_too_few_images_for_the_ranks_are_refused() -> None:
    with pytest.raises(UserError, match=r"\b3 .*\b10 .*\b2 .*data\.pack_tokens"):
        PackOrder(np.array([9, 9, 9]), 10, 0, 2, seed=0)


def test_batch_size_and_packs_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.pack_tokens 100 .*data\.batch_size 4"):
        SA1B("x.tar", batch_size=4, pack_tokens=100)
