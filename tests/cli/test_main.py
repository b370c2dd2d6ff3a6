"""Tests of the `spar` command: fast start, help, and messages about unknown and renamed names."""

import subprocess
import sys

import pytest

import spar_lightning
from spar_lightning.cli import COMMANDS, main


@pytest.mark.parametrize("flag", ["--help", "--version", "fitt"])
def test_the_dispatcher_imports_nothing_heavy(flag: str) -> None:
    code = (
        "import sys; from spar_lightning.cli import main; main([sys.argv[1]]); "
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & {name.split('.')[0] for name in sys.modules}; "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--help"], ["-h"], []):
        assert main(args) == 0
        out = capsys.readouterr().out
        assert all(command in out and text in out for command, text in COMMANDS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == spar_lightning.__version__


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vaildate"]) == 2
    text = capsys.readouterr().err
    assert all(part in text for part in ("'vaildate'", "validate or evaluate", "fit, cache"))


def test_what_was_renamed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for args, new in (
        (["benchmark", "all"], "spar speed"),
        (["fit", "--model.geometry", "paper"], "patch_fit: paper"),
        (["fit", "--data.prefix=true"], "cache_activations: true"),
        (["fit", "--data.augmentation", "text"], "preset: text"),
        (["fit", "--model.refine", "lposs_spar"], "preset: spar"),
        (["evaluate", "--refine=none"], "refine: null"),
        (["validate", "--ckpt_path", "x.ckpt"], "--weights"),
        (["speed", "all", "--rounds", "3"], "--repeats"),
        (["predict", "x.jpg", "--max-side", "9"], "--max_side"),
        (["cache", "--plan-only"], "--plan_only"),
    ):
        assert main(args) == 2
        assert new in capsys.readouterr().err
