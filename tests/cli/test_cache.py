"""Tests of `spar cache`: plan, build, info and verify, with one or several processes."""

import re
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from spar_lightning.cli import main
from spar_lightning.files.atomic import MACHINE

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(small: list[str], tmp_path: Path, capsys: Capture) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `spar cache` on twelve synthetic images and returns exit code, stdout and stderr."""

    def run(*args: str, action: str | None = None) -> tuple[int, str, str]:
        where = ["--data.root", str(tmp_path)]
        code = main(["cache", *([action] if action else []), *small, *where, *args])
        return code, *capsys.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


def test_a_configuration_with_callbacks(run: Run) -> None:
    assert run("--plan_only", "--trainer.callbacks+=EMAWeightAveraging")[0] == 0


def test_plan_build_info_and_verify(run: Run, tmp_path: Path, capsys: Capture) -> None:
    cache = tmp_path / "seed-0" / "cache"
    code, out, _ = run("--plan_only")
    assert code == 0 and "12 images to do, 0 done" in out and "windows/s per process, measured on cpu" in out
    assert re.search(r"\| 25,000 +\| [\d.]+ GB", out)
    assert not any((cache / "shards").iterdir())

    code, out, _ = run()
    assert code == 0 and "12 of 12 images have features, 0 cannot be used" in out
    assert run()[1].startswith(f"{cache}: 0 images to do, 12 done")

    assert main(["cache", "info", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "12 images with features, " in out and "; shards: 1\n" in out and "stride: 16" in out

    code, _, err = run("--recompute", "0", action="verify")
    assert code == 2 and "--recompute must be at least 1" in err
    code, out, _ = run("--recompute", "3", action="verify")
    assert code == 0 and out.count("image identical") == 3 and "12 samples in 1 of 1 shards are intact" in out
    errors = [float(error) for error in re.findall(r"relative error (\S+),", out)]
    assert max(errors) < 1e-3  # float16

    small = ("--data.root", str(tmp_path / "int8"), "--data.cache_dtype", "int8")
    code, out, _ = run("--recompute", "3", *small, action="verify") if run(*small)[0] == 0 else (1, "", "")
    assert code == 0 and out.count("image identical") == 3

    path = cache / "shards" / "00000.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["cache", "verify", str(cache)]) == 1
    assert f"0 samples in 0 of 1 shards are intact\n{path} is damaged" in capsys.readouterr().out


def test_the_frozen_prefix_is_announced_built_shown_and_verified(
    run: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "seed-0" / "cache"
    code, out, _ = run("--data.cache_activations", "true")
    assert code == 0
    announced = re.search(r"activations-3: tokens after 3 frozen blocks, 12 images to do, ([\d.]+) ([kM])B; ", out)
    assert announced
    size = (cache / "activations-3" / "shards" / "00000.h5").stat().st_size
    assert abs({"k": 1e3, "M": 1e6}[announced[2]] * float(announced[1]) / size - 1) < 0.05
    assert "after 3 frozen blocks, 0 images to do, 0 B; " in run("--data.cache_activations", "true")[1]
    assert main(["cache", "info", str(cache)]) == 0
    assert "activations-3: activations of the frozen blocks, " in capsys.readouterr().out
    assert main(["cache", "verify", str(cache)]) == 0
    assert "12 samples in 1 of 1 shards of activations-3 are intact" in capsys.readouterr().out
    shutil.rmtree(cache / "activations-3")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    code, _, err = run("--data.cache_activations", "true")
    assert code == 2 and "10 kB" in err


def test_features_and_activations_need_the_disk_together(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("--data.cache_activations", "true", "--plan_only")[1]
    found = re.findall(r"(?:disk +|to do, )([\d.]+) ([kM])B", out)
    features, tokens = (float(size) * {"k": 1e3, "M": 1e6}[unit] for size, unit in found)
    free = 1.05 * max(features, tokens)
    assert free < features + tokens
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert run("--plan_only")[0] == 0
    code, _, err = run("--data.cache_activations", "true", "--plan_only")
    assert code == 2 and all(f"{size} {unit}B" in err for size, unit in found)


def test_leases_without_work_are_not_shown_as_progress(run: Run, tmp_path: Path, capsys: Capture) -> None:
    assert run()[0] == 0
    cache = tmp_path / "seed-0" / "cache"
    for name, holder in (("00000.h5", "other-1.7"), ("00001.h5", f"{MACHINE}.4194305"), ("00002.h5", "other-1.7")):
        (cache / "claims" / name).mkdir()
        (cache / "claims" / name / f"{holder}.0123456789abcdef").touch()
    assert main(["cache", "info", str(cache)]) == 0
    assert re.findall(r"in progress: (\S+) by (\S+)", capsys.readouterr().out) == [("00002.h5", "other-1.7")]


def test_a_disk_that_is_too_small_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    code, _, err = run()
    assert code == 2 and re.search(r"The features need [\d.]+ MB, but .* has 1 kB free. Free disk space", err)


def test_one_command_starts_a_process_for_each_further_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Worker:
        def __init__(self, command: list[str], env: dict[str, str], start_new_session: bool) -> None:
            started.append((command[1:4], env["LOCAL_RANK"], env["WORLD_SIZE"]))

        def wait(self, timeout: float | None = None) -> int:
            return 3

        def poll(self) -> int:
            return 3

    monkeypatch.setattr(subprocess, "Popen", Worker)
    code, out, err = run("--trainer.accelerator", "cpu", "--trainer.devices", "2")
    assert started == [(["-m", "spar_lightning", "cache"], "1", "2")]
    assert "with 2 processes" in out and "12 of 12 images have features" in out
    assert code == 2 and "[3]" in err


def test_what_is_no_cache(tmp_path: Path, capsys: Capture) -> None:
    for verb in ("info", "verify"):
        assert main(["cache", verb, str(tmp_path)]) == 2
        assert "manifest.json" in capsys.readouterr().err
    assert main(["cache", "prune"]) == 2
    assert "info, verify" in capsys.readouterr().err


def test_without_a_cache_in_the_configuration(run: Run) -> None:
    code, _, err = run("--data.cached", "false")
    assert code == 2 and "data.cache" in err


def test_another_configuration_is_refused_with_the_command_that_builds_it(run: Run) -> None:
    assert run()[0] == 0
    code, _, err = run("--model.stride", "32")
    assert code == 2 and "teacher.stride: cache 16, configuration 32" in err
    assert re.search(r"spar cache with the same --config and --data.cache \S+cache-[0-9a-f]{8}", err)
