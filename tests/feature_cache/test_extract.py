"""Work ahead of its use: in order, bounded, errors in their place."""

import threading
from collections.abc import Iterator

import pytest

from spar_lightning.feature_cache.extract import ahead


def test_results_come_in_order_and_not_too_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            taken.append(i)
            yield i

    for i, result in enumerate(ahead(lambda x: x * x, items(), 3)):
        assert result == i * i
        assert len(taken) <= i + 4


def test_work_runs_beside_what_uses_it() -> None:
    second = threading.Event()

    def work(i: int) -> int:
        if i == 1:
            second.set()
        return i

    results = ahead(work, range(3), 1)
    assert next(results) == 0
    assert second.wait(10)  # although nobody has asked for it


def test_an_error_comes_in_the_place_of_its_result() -> None:
    results = ahead(lambda x: 1 // (2 - x), range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
