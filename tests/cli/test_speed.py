"""Tests of `spar speed` with Tiny: each measurement prints a table and writes JSON."""

import json
from pathlib import Path

import pytest

from spar_lightning.cli import main
from spar_lightning.speed import read
from tests.conftest import QUICKSTART

Capture = pytest.CaptureFixture[str]


@pytest.mark.slow
def test_all_parts(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "KEYS", read.KEYS[:8])
    path = tmp_path / "b.json"
    args = ["--config", str(QUICKSTART), "--repeats", "1", "--height", "64", "--width", "128", "--json", str(path)]
    args += ["--data.augmentation.preset", "small"]  # images of SA-1B's size become small
    assert main(["speed", "all", *args]) == 0
    out = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["environment"]["backbone"] == "Tiny" and content["environment"]["peak TFLOP/s"]["32-true"] > 0
    assert {row["part"] for row in content["rows"]} == {"teacher", "train", "segment", "read"}
    for row in content["rows"]:
        assert row["per_second"] > 0 and row["ms"] > 0 and row["repeats"] == 1
        assert f"| {row['way']} " in out
        assert (row["share_of_peak"] is None) == (row["part"] == "read")
    overheads = {row["way"]: row["overhead"] for row in content["rows"] if row["overhead"]}
    assert set(overheads) == {f"ours, {content['environment']['precision']}", "Segmenter with 150 classes"}


@pytest.mark.parametrize("args", [[], ["tech"], ["--repeats", "3"]])
def test_what_is_no_part_is_refused(args: list[str], capsys: Capture) -> None:
    assert main(["speed", *args]) == 2
    err = capsys.readouterr().err
    assert "teacher, train, segment, read, all" in err
    assert ("mean teacher" in err) == (args == ["tech"])


def test_numbers_are_checked(capsys: Capture) -> None:
    assert main(["speed", "read", "--repeats", "0"]) == 2
    assert "--repeats" in capsys.readouterr().err
