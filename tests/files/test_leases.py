"""Tests of leases: one process holds a lease at a time, and leases of dead owners are taken over by one process."""

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spar_lightning.files import leases
from spar_lightning.files.atomic import MACHINE, owner, sweep
from spar_lightning.files.leases import STALE, Claims

OTHER = "elsewhere-0-0.1"  # owner on another machine


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path / "claims")


def fork(function: Callable[[], object]) -> int:
    """Run a function in a new process; the exit status is 0 if it returns something true."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if function() else 1
        finally:
            os._exit(code)
    return pid


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def abandon(claims: Claims, name: str) -> None:
    """Leave a lease of a process that has been killed."""

    def take() -> None:
        claims.take(name)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(take)
    assert status(pid) == -signal.SIGKILL and claims.names() == {name}


def lease_of(claims: Claims, name: str) -> Path:
    (path,) = (claims.folder / name).iterdir()
    return path


def age(path: Path, seconds: float) -> None:
    before = time.time() - seconds
    os.utime(path, (before, before))


def taken_over_by_another(claims: Claims, name: str) -> str:
    """Replace a lease, as another machine does, and return the new owner."""
    lease_of(claims, name).unlink()
    (claims.folder / name / f"{OTHER}.abc").touch()
    return OTHER


def test_a_lease_is_held_by_one_process_and_released(claims: Claims) -> None:
    assert claims.take("a") and not claims.take("a")
    assert not claims.take_over("a") and not Claims(claims.folder).take_over("a")
    assert claims.holder("a") == owner() and claims.names() == {"a"}
    with claims.held("a"):
        pass
    assert claims.names() == set() and claims.holder("a") == ""
    assert not any(claims.private.iterdir())


def test_a_lease_is_released_after_an_error(claims: Claims) -> None:
    claims.take("a")
    with pytest.raises(RuntimeError), claims.held("a"):
        raise RuntimeError
    assert claims.names() == set()


def test_a_lease_of_another_living_process_is_respected(claims: Claims) -> None:
    assert claims.take("a")
    assert status(fork(lambda: not claims.take("a") and not claims.take_over("a") and not claims.clear("a"))) == 0
    assert claims.holder("a") == owner()


def test_a_dead_lease_is_taken_over_and_released(claims: Claims) -> None:
    abandon(claims, "a")
    assert not claims.take("a") and claims.take_over("a")
    assert claims.holder("a") == owner()
    with claims.held("a"):
        assert status(fork(lambda: not claims.take_over("a"))) == 0
    assert claims.names() == set()


def test_a_lease_that_nobody_holds_is_taken_over(claims: Claims) -> None:
    assert claims.take_over("a") and claims.holder("a") == owner()


def test_a_lease_of_another_machine_is_taken_over_without_heartbeats(claims: Claims) -> None:
    lease = claims.folder / "a" / f"{OTHER}.abc"
    lease.parent.mkdir(parents=True)
    lease.touch()
    assert not claims.take_over("a")  # this machine cannot tell if that process is alive
    age(lease, STALE + 5)
    assert claims.take_over("a") and claims.holder("a") == owner()


@pytest.mark.parametrize("content", ["", owner(), f"{MACHINE}.999999999"], ids=["empty", "own", "dead"])
def test_dead_leases_of_version_0_1(claims: Claims, content: str) -> None:
    """Take over at once: an empty file, one with our process ID, one of a process that does not exist."""
    claims.folder.mkdir()
    (claims.folder / "a").write_text(content)
    assert claims.holder("a") == content
    assert not claims.take("a") and claims.take_over("a")
    with claims.held("a"):
        assert claims.holder("a") == owner()
    assert claims.names() == set()


def test_living_leases_of_version_0_1(claims: Claims) -> None:
    claims.folder.mkdir()
    (claims.folder / "a").write_text(f"{MACHINE}.{os.getppid()}")
    (claims.folder / "b").write_text(OTHER)
    assert not claims.take_over("a") and not claims.take_over("b")
    age(claims.folder / "b", STALE + 5)
    assert claims.take_over("b")


def test_an_empty_folder_is_no_lease(claims: Claims) -> None:
    (claims.folder / "a").mkdir(parents=True)  # left by a kill during the release
    assert claims.take("a") and claims.holder("a") == owner()


def test_a_suspended_owner_leaves_the_lease_of_its_successor_alone(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT", 0.01)
    claims.take("a")
    with claims.held("a"):
        successor = taken_over_by_another(claims, "a")
        age(lease_of(claims, "a"), 1000)
        time.sleep(0.1)
    assert claims.holder("a") == successor
    assert time.time() - lease_of(claims, "a").stat().st_mtime > 900  # nor does it renew that lease


def test_a_heart_beats_while_the_lease_is_held(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT", 0.01)
    claims.take("a")
    lease = lease_of(claims, "a")
    age(lease, 1000)
    before = lease.stat().st_mtime
    with claims.held("a"):
        deadline = time.monotonic() + 10
        while lease.stat().st_mtime == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lease.stat().st_mtime > before + 900


def test_a_late_takeover_does_not_hit_the_successor(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a process be overtaken after it has found the owner dead, and before it deletes the lease."""
    abandon(claims, "a")
    is_dead = Claims._is_dead

    def be_overtaken(self: Claims, path: Path, holder: str) -> bool:
        dead = is_dead(self, path, holder)
        monkeypatch.undo()
        path.unlink()
        (claims.folder / "a" / f"{OTHER}.abc").touch()
        return dead

    monkeypatch.setattr(Claims, "_is_dead", be_overtaken)
    assert not claims.take_over("a")
    assert claims.holder("a") == OTHER


def test_many_processes_and_kills(claims: Claims) -> None:
    """Let 16 processes take leases, some of which are killed in between: no two are ever in the same section."""
    names = [f"{i}" for i in range(3)]
    inside = claims.folder.parent / "inside"
    inside.mkdir()
    deadline = time.monotonic() + 3

    def alone(name: str) -> bool:
        """Note the process in a file and check that no living process is there."""
        mine = inside / f"{name}.{os.getpid()}"
        mine.touch()
        others = [int(path.suffix[1:]) for path in inside.glob(f"{name}.*") if path != mine]
        time.sleep(dice.uniform(0, 0.002))
        for pid in others:
            if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                return False
        for pid in others:
            (inside / f"{name}.{pid}").unlink(missing_ok=True)
        return True

    def enter() -> bool:
        dice.seed(os.getpid())
        while time.monotonic() < deadline:
            name = dice.choice(names)
            if not claims.take_over(name):
                time.sleep(0.001)
                continue
            if not alone(name):
                return False
            if dice.random() < 0.2:
                os.kill(os.getpid(), signal.SIGKILL)
            (inside / f"{name}.{os.getpid()}").unlink()
            claims.release(name)
        return True

    dice, kills = random.Random(), 0
    alive = {fork(enter) for _ in range(16)}
    while alive:
        pid, code = os.wait()
        if pid not in alive:  # of another test, such as a command that a shard is read from
            continue
        alive.remove(pid)
        assert os.waitstatus_to_exitcode(code) in (0, -signal.SIGKILL)
        if code:
            kills += 1
            alive.add(fork(enter))
    assert kills > 10


def test_deleted_working_folders_are_created_again(claims: Claims) -> None:
    for folder in (claims.folder, claims.private):
        assert claims.take("a")
        with claims.held("a"):
            shutil.rmtree(claims.folder)
            assert claims.names() == set()
            shutil.rmtree(claims.private)
            assert claims.take_over("b")
            shutil.rmtree(folder)
        if folder == claims.private:
            claims.release("b")
    assert claims.take("c")


def test_a_file_system_that_cannot_rename_folders(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: object) -> None:
        raise OSError(errno.EPERM, "no renaming")

    monkeypatch.setattr(os, "rename", reject)
    assert claims.take("a") and not claims.take("a") and not claims.take_over("a")
    with claims.held("a"):
        assert status(fork(lambda: not claims.take_over("a"))) == 0
    assert claims.names() == set()
    abandon(claims, "a")
    assert claims.take_over("a")


def test_a_file_system_that_does_not_replace_empty_folders(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def strict(source: Path, target: Path) -> None:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "exists")
        rename(source, target)

    monkeypatch.setattr(os, "rename", strict)
    (claims.folder / "a").mkdir(parents=True)
    assert claims.take("a") and not claims.take("a")


def test_a_full_disk_is_an_error_and_leaves_no_lease(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match="no space left"):
        claims.take("a")
    assert claims.names() == set() and not any(claims.private.iterdir())


def test_an_unfinished_lease_of_a_dead_process_is_deleted(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert status(fork(lambda: claims.take("a"))) == -signal.SIGKILL
    assert claims.names() == set() and any(claims.private.iterdir())
    sweep(claims.private)
    assert not any(claims.private.iterdir())
