"""The dispatcher answers at once and in sentences."""

import subprocess
import sys

import pytest

import spar_lightning
from spar_lightning.cli import VERBS, main


@pytest.mark.parametrize("flag", ["--help", "--version", "fitt"])
def test_the_dispatcher_imports_nothing_heavy(flag: str) -> None:
    code = (
        "import sys; from spar_lightning.cli import main; main([sys.argv[1]]); "
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & {name.split('.')[0] for name in sys.modules}; "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--help"], ["-h"], []):
        assert main(args) == 0
        out = capsys.readouterr().out
        assert all(verb in out and text in out for verb, text in VERBS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == spar_lightning.__version__


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vaildate"]) == 2
    text = capsys.readouterr().err
    assert "no verb 'vaildate'. Did you mean validate or evaluate? Allowed are fit, cache" in text
