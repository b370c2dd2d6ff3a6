"""Tests of the work queue: every item is processed once, and items of dead workers are taken over."""

import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spar_lightning.files import leases, work_queue
from spar_lightning.files.atomic import MACHINE
from spar_lightning.files.leases import Claims
from spar_lightning.files.work_queue import FreeItems, Throttle, share


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

    share(names, claims, done, make)


def together(processes: int, claims: Claims, names: list[str]) -> tuple[list[int], list[list[str]]]:
    """Work in several processes; return their process IDs and, for each item, the IDs of those that processed it.

    A process waits in its first item until all processes are in one, or as many as there are items.
    """
    all_hold_one = multiprocessing.Barrier(min(processes, len(names)))
    children = []
    for _ in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(claims, names, functools.cache(lambda: all_hold_one.wait(60)))  # waits once in each process
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children} == {0}
    return children, [(claims.folder.parent / "done" / name).read_text().split() for name in names]


def abandon(claims: Claims, names: list[str]) -> None:
    """Leave the leases of a process that has been killed."""
    pid = os.fork()
    if pid == 0:
        assert all(map(claims.take, names))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert claims.names() == set(names)


def test_processes_share_the_work(claims: Claims) -> None:
    children, made = together(3, claims, [f"{i:02d}" for i in range(20)])
    assert all(len(makers) == 1 for makers in made)
    assert {maker for (maker,) in made} == {str(pid) for pid in children}
    assert claims.names() == set()


@pytest.mark.parametrize("old", [False, True])
def test_many_workers_take_over_dead_leases_once(claims: Claims, old: bool) -> None:
    """Also with the leases of version 0.1, which are files."""
    names = [f"{i}" for i in range(8)]
    for _ in range(2):
        if old:
            for name in names:
                (claims.folder / name).write_text(f"{MACHINE}.999999999")
        else:
            abandon(claims, names)
        _, made = together(16, claims, names)
        assert [len(makers) for makers in made] == [1] * 8
        assert claims.names() == set() and not any((claims.folder.parent / "tmp").iterdir())
        for name in names:
            (claims.folder.parent / "done" / name).unlink()


def test_a_dead_workers_item_is_taken_over(claims: Claims) -> None:
    abandon(claims, ["a"])
    work(claims, ["a"])
    assert (claims.folder.parent / "done" / "a").read_text() == f"{os.getpid()}\n"


def test_an_empty_lease_of_version_0_1_is_taken_over_at_once(claims: Claims) -> None:
    (claims.folder / "a").touch()
    began = time.monotonic()
    work(claims, ["a"])
    assert time.monotonic() - began < 10
    assert claims.names() == set()


def test_a_suspended_worker_loses_its_item_and_nothing_else(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALE", 0.5)
    monkeypatch.setattr(leases, "HEARTBEAT", 0.05)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(claims, ["a"], lambda: os.kill(os.getpid(), signal.SIGSTOP))
            code = 0
        finally:
            os._exit(code)
    os.waitpid(pid, os.WUNTRACED)
    done = claims.folder.parent / "done"

    def make(name: str) -> None:
        (lease,) = (claims.folder / name).iterdir()
        os.kill(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0  # it has finished and released its lease
        assert list((claims.folder / name).iterdir()) == [lease]

    share(["a"], claims, done, make)
    assert (done / "a").read_text() == f"{pid}\n" and claims.names() == set()


def test_leases_of_finished_items_are_deleted_if_their_owners_are_dead(claims: Claims) -> None:
    abandon(claims, ["a", "b"])
    (claims.folder / "c").mkdir()
    (claims.folder / "c" / "elsewhere-0-0.1.abc").touch()
    for name in ("a", "c"):
        finish(claims, name)
    work(claims, ["d"])
    assert claims.names() == {"b", "c"}  # "b" is not finished, the owner of "c" may be alive


def test_an_item_of_another_process_is_waited_for(claims: Claims) -> None:
    lease = claims.folder / "a" / "elsewhere-0-0.1.abc"
    lease.parent.mkdir()
    lease.touch()
    holders: list[str] = []

    def waiting(holder: str) -> None:
        holders.append(holder)
        if len(holders) == 3:
            finish(claims, "a")
            lease.unlink()

    share(["a"], claims, claims.folder.parent / "done", lambda name: pytest.fail(name), waiting)
    assert holders == ["elsewhere-0-0.1"] * 3


def test_an_item_that_another_process_has_given_up_is_processed(claims: Claims) -> None:
    lease = claims.folder / "a" / "elsewhere-0-0.1.abc"
    lease.parent.mkdir()
    lease.touch()
    done = claims.folder.parent / "done"
    share(["a"], claims, done, lambda name: finish(claims, name), lambda holder: lease.unlink())
    assert (done / "a").read_text() == f"{os.getpid()}\n"


def test_an_item_that_another_process_has_finished_is_not_processed(claims: Claims) -> None:
    """Let another process finish an item after this one has listed the results."""
    made = []

    def make(name: str) -> None:
        made.append(name)
        finish(claims, name)
        if name == "0":
            finish(claims, "1")

    share(["0", "1", "2"], claims, claims.folder.parent / "done", make)
    assert sorted(made) == ["0", "2"] and claims.names() == set()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_results_are_not_listed_for_every_item(
    claims: Claims, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, done, listdir = claims.folder.parent / "listed", claims.folder.parent / "done", os.listdir

    def slow(path: Path) -> list[str]:
        if path == done:
            with listed.open("a") as file:
                file.write("x")
            time.sleep(0.05)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", slow)
    _, made = together(processes, claims, [f"{i:03d}" for i in range(200)])
    assert all(len(makers) == 1 for makers in made)
    assert len(listed.read_text()) <= 2 * processes


def test_working_folders_that_are_deleted_are_created_again(claims: Claims) -> None:
    def delete() -> None:
        shutil.rmtree(claims.folder, ignore_errors=True)
        shutil.rmtree(claims.folder.parent / "tmp", ignore_errors=True)

    names = [f"{i}" for i in range(10)]
    work(claims, names, delete)
    assert sorted(os.listdir(claims.folder.parent / "done")) == names
    assert all((claims.folder.parent / "done" / name).read_text().count("\n") == 1 for name in names)


def test_a_throttled_operation_takes_a_small_fraction_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    throttle = Throttle()
    assert throttle.due()
    with throttle:
        now += 2
    assert not throttle.due()
    now += 2 / work_queue.LISTING - 1
    assert not throttle.due()
    now += 1
    assert throttle.due()


def next_of(free: list[int], last: int) -> int:
    """Return the item after the last one, or the middle of the longest run, as a search through the whole list."""
    if last + 1 in free:
        return last + 1
    runs = [[i for _, i in run] for _, run in groupby(enumerate(free), key=lambda pair: pair[1] - pair[0])]
    longest = max(runs, key=len)
    return longest[len(longest) // 2]


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(-1, 40))
def test_the_next_item_is_the_one_after_the_last_or_the_middle_of_the_longest_run(free: set[int], last: int) -> None:
    items = FreeItems(sorted(free), last + 1)
    while free:
        assert items
        last = next_of(sorted(free), last)
        assert items.next() == last
        free.remove(last)
    assert not items


def test_workers_spread_over_the_list() -> None:
    """Let each worker leave the places that the workers before it have taken."""
    taken: list[int] = []
    for _ in range(4):
        items = FreeItems(range(100))
        while (pick := items.next()) in taken:
            items.leave()
        taken.append(pick)
    assert taken[0] == 0
    assert all(b - a >= 20 for a, b in pairwise(sorted(taken)))


def test_an_item_is_made_while_the_one_before_is_published(claims: Claims) -> None:
    began, done = threading.Event(), claims.folder.parent / "done"

    def make(name: str) -> Callable[[], None]:
        if name == "b":
            began.set()

        def publish() -> None:
            assert began.wait(30)  # "a" is published only after "b" has started
            finish(claims, name)

        return publish

    share(["a", "b"], claims, done, make)
    assert sorted(os.listdir(done)) == ["a", "b"] and not claims.names()


def test_what_publishing_raises_comes_up_and_the_claims_go_back(claims: Claims) -> None:
    made = []

    def make(name: str) -> Callable[[], None]:
        made.append(name)

        def publish() -> None:
            raise OSError(28, "no space left")

        return publish

    with pytest.raises(OSError, match="no space left"):
        share(["a", "b", "c"], claims, claims.folder.parent / "done", make)
    assert made in (["a", "b"], ["b", "c"]) and not claims.names()
