"""Tests of train.log: any characters, and a full disk without a traceback."""

import logging
from pathlib import Path

import pytest

from spar_lightning.cli.fit_log import log_to

log = logging.getLogger("spar_lightning")


def test_any_character_can_be_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", False)  # pytest cannot send the character from one process to another
    with log_to(tmp_path / "train.log"):
        log.warning("image %s", "ü-\udcff.jpg")
    assert r"image ü-\udcff.jpg" in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert "Logging error" not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.log"
    path.symlink_to("/dev/full")
    with log_to(path):
        for _ in range(3):
            log.warning("a message")
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count(f"{path}: No space left") == 1
