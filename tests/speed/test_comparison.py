"""Tests of the comparison of implementations: order of runs, medians and ratios."""

from functools import partial

import torch

from spar_lightning.backbones import Tiny
from spar_lightning.speed.bench import operations
from spar_lightning.speed.comparison import Comparison, Times, Way


def compared(base: list[float], ours: list[float], bare: list[float]) -> Comparison:
    ways = {name: Way(lambda: None, operations=8.0, peak=4.0) for name in ("base", "ours", "bare")}
    comparison = Comparison("work", "windows", 2, ways, ("ours", "bare"))
    comparison.times = {
        name: Times(seconds, seconds) for name, seconds in {"base": base, "ours": ours, "bare": bare}.items()
    }
    return comparison


def test_ratios_are_those_of_rounds() -> None:
    # The machine was slow in the last repeat. Its ratio is as good as the others.
    comparison = compared([2.0, 3.0, 40.0], [1.0, 1.0, 20.0], [0.5, 1.0, 16.0])
    assert comparison.ratios("ours") == (2.0, 2.0, 3.0)
    base, ours, bare = comparison.rows()
    assert base["times_as_fast"] == [1.0, 1.0, 1.0] and base["per_second"] == 2 / 3
    assert ours["overhead"] == [0.25, 0.0, 1.0] and bare["overhead"] is None
    assert bare["share_of_peak"] == 2.0 and bare["ms"] == 500.0
    assert comparison.table().splitlines()[-1] == "ours: +25.0% over bare (+0.0% to +100.0%)"


def test_ways_take_turns_and_warm_up_first() -> None:
    done: list[str] = []
    ways = {name: Way(partial(done.append, name)) for name in "abc"}
    comparison = Comparison("work", "images", 1, ways).measure(2, torch.device("cpu"))
    assert "".join(done) == "abcbcacab"
    assert [len(times.wall) for times in comparison.times.values()] == [2, 2, 2]
    assert comparison.rows()[0]["tflops"] is None  # operations were not counted


def test_operations_are_those_of_theory() -> None:
    tiny, tokens, dim = Tiny(), 6 * 9, 128
    with torch.no_grad():
        counted = operations(tiny, lambda net, meta: net(torch.zeros(1, 3, 48, 72, device=meta)))
    block = 24 * tokens * dim**2 + 4 * tokens**2 * dim
    assert counted == 6 * block + 2 * tokens * dim * 3 * 64 + 2 * tokens * dim**2  # with patch embedding and head
