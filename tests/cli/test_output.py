"""Tests of the output of commands: closed pipes, full disks, other encodings, `~` in paths, and existing files."""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from spar_lightning.cli import main, output
from spar_lightning.cli.lightning_cli import SparCLI
from spar_lightning.cli.speed import SpeedCLI
from spar_lightning.errors import UserError

CACHE = str(Path(__file__).parents[1] / "data" / "version_0.1" / "cache")
COMMAND = [sys.executable, "-m", "spar_lightning"]
PLAIN = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def started(args: Sequence[str], unbuffered: bool) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    return subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


@pytest.mark.parametrize(
    ("args", "unbuffered"),
    [(["--help"], False), (["fit", "--help"], True), (["configs"], False), (["cache", "info", CACHE], True)],
)
def test_a_closed_pipe(args: list[str], unbuffered: bool) -> None:
    process = started(args, unbuffered)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before the command prints anything
    said = process.stderr.read()
    assert process.wait() == output.CLOSED == 141 and said == b""


def test_a_closed_pipe_of_the_errors() -> None:
    process = started(["configs", "no-such-name"], True)
    assert process.stdout is not None and process.stderr is not None
    process.stderr.close()
    assert process.stdout.read() == b"" and process.wait() in (2, 141)  # argparse ignores the error


def test_another_broken_pipe_is_not_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise BrokenPipeError(errno.EPIPE, "of a loader process")

    monkeypatch.setattr("spar_lightning.cli.configs.run", broken)
    with pytest.raises(BrokenPipeError):
        main(["configs"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_output_to_a_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "configs"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "No space left" in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_stream_that_the_shell_has_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["configs"]) == 0


SCRIPT = r"""
import sys
from spar_lightning.cli import main, output

output.accept_all_names()
for stream in (sys.stdout, sys.stderr):
    print("\xfc \udcff", file=stream)
main(["configs", "\xfc\udcff"])
for name in ("\xfc", "\udcc3\udcbc"):  # the second is how Python reads the first from the command line
    main(["configs", "quickstart", "--copy", sys.argv[1] + "/" + name])
main(["fit", "--config", "\xfc", "--run_dir", "\udcff"])
"""


def test_names_outside_the_encoding(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **PLAIN})
    assert b"Traceback" not in done.stderr and rb"\xfc \udcff" in done.stdout and rb"\xfc \udcff" in done.stderr
    assert b"PYTHONUTF8=1" in done.stderr and b"Wrote" in done.stdout and (tmp_path / "\xfc").exists()
    assert b"fit: error: " in done.stderr


class ParsedError(Exception):
    """End of a command whose settings were read."""


def test_the_home_folder_in_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[SparCLI] = []

    def stop(self: SparCLI) -> None:
        found.append(self)
        raise ParsedError

    monkeypatch.setenv("HOME", "/h")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SpeedCLI, "before_instantiate_classes", stop)
    data = {"class_path": "SA1B", "init_args": {"shards": ["~/a.tar", "b.tar"], "cache": "~/cache"}}
    backbone = {"class_path": "Tiny", "init_args": {"pretrained": "~/w"}}
    Path("c.yaml").write_text(yaml.safe_dump({"run_dir": "~/x", "data": data, "model": {"backbone": backbone}}))
    with pytest.raises(ParsedError):
        main(["speed", "read", "--config", "c.yaml", "--json=~/x.json"])
    config = found[0].config.speed
    assert (config.run_dir, config.json) == ("/h/x", "/h/x.json")
    assert config.data.init_args.shards == ["/h/a.tar", "b.tar"] and config.data.init_args.cache == "/h/cache"
    assert config.model.backbone.init_args.pretrained == "/h/w"


def test_the_home_folder_in_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    assert main(["configs", "quickstart", "--copy=~/a.yaml"]) == 0 and (tmp_path / "home" / "a.yaml").exists()
    assert main(["cache", "info", "~/none"]) == 2 and str(tmp_path / "home" / "none") in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


def test_a_new_file(tmp_path: Path) -> None:
    output.check_new_file("--json", tmp_path / "new")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for path in (tmp_path / "file", tmp_path / "link", tmp_path, tmp_path / "missing" / "x", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match="--json"):
            output.check_new_file("--json", path)


@pytest.mark.parametrize(
    "args", [["configs", "quickstart", "--copy"], ["speed", "read", "--config", "quickstart", "--json"]]
)
def test_an_existing_file_is_kept(args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine"
    path.write_text("precious")
    assert main([*args, str(path)]) == 2
    assert f"{args[-1]} {path}" in capsys.readouterr().err and path.read_text() == "precious"
