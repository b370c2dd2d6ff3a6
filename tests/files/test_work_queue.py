"""Tests of the work queue: every item is processed once, and items of dead workers are taken over."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spar_lightning.files import work_queue as claims_module
from spar_lightning.files.atomic import MACHINE, owner
from spar_lightning.files.work_queue import Claims, next_item, share


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    for name in ("claims", "tmp", "done"):
        (tmp_path / name).mkdir()
    return Claims(tmp_path / "claims")


def finish(claims: Claims, name: str) -> None:
    """Append the process ID to the result of an item, one line for each process that computed it."""
    with (claims.folder.parent / "done" / name).open("a") as file:
        file.write(f"{os.getpid()}\n")


def work(claims: Claims, names: list[str], before: Callable[[], object] = lambda: None) -> None:
    done = claims.folder.parent / "done"

    def make(name: str) -> Callable[[], None]:
        before()
        return lambda: finish(claims, name)

    share(names, claims, lambda: set(os.listdir(done)), make)


def test_a_claim_is_held_by_one_process_and_given_back(claims: Claims) -> None:
    assert claims.take("a") and not claims.take("a")
    assert claims.holder("a") == owner() and claims.names() == {"a"}
    with claims.held("a"):
        pass
    assert claims.names() == set() and claims.holder("a") == ""


def test_the_claim_of_a_living_process_is_respected(claims: Claims) -> None:
    (claims.folder / "a").write_text(f"{MACHINE}.{os.getppid()}")
    assert not claims.take_over("a")
    (claims.folder / "b").write_text(owner())  # lease of an earlier process with this process ID
    assert claims.take_over("b")


def test_a_claim_is_given_back_after_an_error(claims: Claims) -> None:
    claims.take("a")
    with pytest.raises(RuntimeError), claims.held("a"):
        raise RuntimeError
    assert claims.names() == set()


def test_processes_share_the_work(claims: Claims) -> None:
    names = [f"{i:02d}" for i in range(20)]
    all_hold_one = multiprocessing.Barrier(3)
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            work(claims, names, functools.cache(lambda: all_hold_one.wait(60)))  # waits once in each process
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    made = [(claims.folder.parent / "done" / name).read_text().split() for name in names]
    assert all(len(makers) == 1 for makers in made)
    assert {maker for (maker,) in made} == {str(pid) for pid in children}
    assert claims.names() == set()


def test_a_dead_workers_item_is_taken_over(claims: Claims) -> None:
    pid = os.fork()
    if pid == 0:
        claims.take("a")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert claims.names() == {"a"}
    work(claims, ["a"])
    assert (claims.folder.parent / "done" / "a").read_text() == f"{os.getpid()}\n"


def test_another_machines_claim_is_taken_over_when_its_heart_has_stopped(claims: Claims) -> None:
    claim = claims.folder / "a"
    claim.write_text("elsewhere-0-0.1")
    assert not claims.take_over("a")  # this machine cannot tell if that process is alive
    before = time.time() - claims_module.STALE - 5
    os.utime(claim, (before, before))
    assert claims.take_over("a") and claims.holder("a") == owner()


def test_a_heart_beats_while_the_item_is_made(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "HEARTBEAT", 0.01)
    claims.take("a")
    os.utime(claims.folder / "a", (0, 0))
    with claims.held("a"):
        deadline = time.monotonic() + 10
        while (claims.folder / "a").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (claims.folder / "a").stat().st_mtime > 0


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(-1, 40))
def test_next_item_is_free_and_follows_the_last_where_it_can(free: set[int], last: int) -> None:
    pick = next_item(sorted(free), last)
    assert pick in free
    assert pick == last + 1 or last + 1 not in free


def test_workers_spread_over_the_list() -> None:
    free = list(range(100))
    first = next_item(free, -1)
    free.remove(first)
    second = next_item(free, -1)
    free.remove(second)
    third = next_item(free, -1)
    assert first == 0
    assert all(b - a >= 20 for a, b in pairwise(sorted((first, second, third))))


def test_an_item_is_made_while_the_one_before_is_published(claims: Claims) -> None:
    began, done = threading.Event(), claims.folder.parent / "done"

    def make(name: str) -> Callable[[], None]:
        if name == "b":
            began.set()

        def publish() -> None:
            assert began.wait(30)  # "a" is published only after "b" has started
            finish(claims, name)

        return publish

    share(["a", "b"], claims, lambda: set(os.listdir(done)), make)
    assert sorted(os.listdir(done)) == ["a", "b"] and not claims.names()


def test_what_publishing_raises_comes_up_and_the_claims_go_back(claims: Claims) -> None:
    made = []

    def make(name: str) -> Callable[[], None]:
        made.append(name)

        def publish() -> None:
            raise OSError(28, "no space left")

        return publish

    with pytest.raises(OSError, match="no space left"):
        share(["a", "b", "c"], claims, set, make)
    assert made in (["a", "b"], ["b", "c"]) and not claims.names()
