"""The files of a folder: links end, hidden files are left out, unreadable folders are an error."""

from pathlib import Path

import pytest

from spar_lightning.files.walk import FolderError, files_below, is_hidden


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_sorted_relative_paths_without_hidden_files(tmp_path: Path) -> None:
    _touch(tmp_path, "b.jpg", "a/z.jpg", "a/._z.jpg", "__MACOSX/b.jpg", ".ipynb_checkpoints/b.jpg", ".hidden", "a-b/c")
    assert files_below(tmp_path) == ["a-b/c", "a/z.jpg", "b.jpg"]


def test_hidden_parents_of_the_folder_do_not_count(tmp_path: Path) -> None:
    _touch(tmp_path, ".data/a.jpg")
    assert files_below(tmp_path / ".data") == ["a.jpg"]


def test_each_folder_is_entered_once_under_its_own_path(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _touch(root, "z/x.jpg", "z/deep/y.jpg")
    _touch(tmp_path, "outside/o.jpg")
    for name in ("loop", "again", "z/up"):
        (root / name).symlink_to(root, target_is_directory=True)
    (root / "a_link").symlink_to(root / "z", target_is_directory=True)
    (root / "more").symlink_to(tmp_path / "outside", target_is_directory=True)
    assert files_below(root) == ["more/o.jpg", "z/deep/y.jpg", "z/x.jpg"]


def test_links_to_files_are_listed_also_without_a_target(tmp_path: Path) -> None:
    _touch(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "d.jpg").symlink_to(tmp_path / "d.jpg")
    assert files_below(tmp_path) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="missing"):
        files_below(tmp_path / "missing")


def test_is_hidden() -> None:
    assert is_hidden("a/.b/c.jpg") and is_hidden("__MACOSX/._x.jpg") and not is_hidden("a.b/c.jpg")
