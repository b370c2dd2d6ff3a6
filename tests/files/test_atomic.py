"""Tests of atomic writes: files are complete and never replaced, and files of dead processes are deleted."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from spar_lightning.files.atomic import MACHINE, link, make_folder, naming, owner, private_path, publish, replace, sweep


@pytest.fixture
def private(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_the_first_publisher_wins(private: Path, tmp_path: Path) -> None:
    assert publish(tmp_path / "a", b"first", private)
    assert not publish(tmp_path / "a", b"second", private)
    assert (tmp_path / "a").read_bytes() == b"first" and not any(private.iterdir())
    replace(tmp_path / "a", b"third", private)
    assert (tmp_path / "a").read_bytes() == b"third" and not any(private.iterdir())


def test_a_repeated_request_of_a_network_file_system_is_success(private: Path, tmp_path: Path) -> None:
    unfinished = private_path(private, tmp_path / "a")
    unfinished.write_bytes(b"x")
    os.link(unfinished, tmp_path / "a")  # the link was created, but the reply was lost and the request is repeated
    assert link(unfinished, tmp_path / "a")


def test_without_hard_links(private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert publish(tmp_path / "a", b"first", private)
    assert not publish(tmp_path / "a", b"second", private)
    assert (tmp_path / "a").read_bytes() == b"first" and not any(private.iterdir())


def test_a_deleted_private_folder_is_created_again(private: Path, tmp_path: Path) -> None:
    private.rmdir()
    assert publish(tmp_path / "a", b"first", private)

    def delete(unfinished: Path) -> None:
        if not deleted:
            deleted.append(unfinished)
            shutil.rmtree(private)
            raise RuntimeError("cannot be read")

    deleted: list[Path] = []
    assert publish(tmp_path / "b", b"second", private, delete)
    assert (tmp_path / "b").read_bytes() == b"second" and not any(private.iterdir())


def test_errors_of_a_check_and_of_the_disk_are_not_repeated(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def reject(unfinished: Path) -> None:
        calls.append(unfinished)
        raise RuntimeError("damaged")

    with pytest.raises(RuntimeError, match="damaged"):
        publish(tmp_path / "a", b"first", private, reject)
    assert len(calls) == 1

    def full(_: int) -> None:
        calls.append(private)
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        publish(tmp_path / "a", b"first", private)
    assert len(calls) == 2 and not (tmp_path / "a").exists()


def test_a_missing_final_folder_is_an_error(private: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "missing" / "a", b"first", private)


def test_sweep_deletes_what_the_dead_left(private: Path) -> None:
    left = private / f"{MACHINE}.{dead_pid()}.0.00000.h5"
    mine, elsewhere = private / f"{owner()}.0.00001.h5", private / "elsewhere-0-0.1.0.00002.h5"
    old = private / "elsewhere-0-0.2.0.00003.h5"
    for path in (left, mine, elsewhere, old):
        path.touch()
    folder = private / f"{MACHINE}.{dead_pid()}.0.00001.h5"
    folder.mkdir()
    (folder / "lease").touch()
    os.utime(old, (0, 0))
    sweep(private)
    assert sorted(private.iterdir()) == sorted([mine, elsewhere])


def test_sweep_leaves_files_of_a_user_alone(private: Path) -> None:
    for name in ("notes.txt", "my-model.7.h5", "a.b.c", "photos"):
        (private / name).mkdir()
        os.utime(private / name, (0, 0))
    sweep(private)
    assert len(list(private.iterdir())) == 4


def test_an_error_without_a_path_gets_one(tmp_path: Path) -> None:
    for given, expected in ((None, str(tmp_path)), ("other", "other")):
        with pytest.raises(OSError) as error, naming(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device", given)
        assert error.value.filename == expected and error.value.errno == errno.ENOSPC


def test_a_folder_that_is_deleted_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    mkdir = os.mkdir

    def found_and_deleted(path: str, *args: int) -> None:
        made.append(path)
        if len(made) == 1:
            raise FileExistsError(errno.EEXIST, "File exists")
        mkdir(path, *args)

    monkeypatch.setattr(os, "mkdir", found_and_deleted)
    make_folder(tmp_path / "a")
    assert (tmp_path / "a").is_dir() and len(made) == 2
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")
