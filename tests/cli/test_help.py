"""Tests of --help: short, fast, equal to the parsers, with examples."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from scripts.write_help import FOLDER, texts
from spar_lightning.cli import COMMANDS, main

LINES, WIDTH = 120, 110


def stored() -> Iterator[tuple[str, str]]:
    yield from ((path.stem, path.read_text()) for path in sorted(FOLDER.glob("*.txt")))


def examples() -> list[str]:
    """Return the examples of all help texts."""
    lines = (line.strip() for _, text in stored() for line in text.partition("examples:\n")[2].splitlines())
    return list(dict.fromkeys(lines))


def test_stored_help_is_that_of_the_parsers() -> None:
    assert texts() == {f"{name}.txt": text for name, text in stored()}


def test_help_is_short_and_ends_with_two_examples() -> None:
    found = dict(stored())
    assert found.keys() >= COMMANDS.keys()
    for name, text in found.items():
        lines = text.splitlines()
        assert len(lines) <= LINES and max(map(len, lines)) <= WIDTH, name
        assert text.count("examples:") == 1 and len(text.partition("examples:\n")[2].splitlines()) == 2, name
    assert all(line.startswith("spar ") for line in examples())


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["fit", "--help"], "fit"),
        (["fit", "--config", "quickstart", "-h"], "fit"),
        (["cache", "verify", "--help"], "cache_verify"),
        (["backbones", "check", "-h"], "backbones_check"),
        (["speed", "train", "--help"], "speed"),
    ],
)
def test_help_is_found(args: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    assert capsys.readouterr().out == dict(stored())[name]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from spar_lightning.cli import main; main(['fit', '--help']); "
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & {name.split('.')[0] for name in sys.modules}; "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_options_that_a_command_uses_are_listed() -> None:
    found = dict(stored())
    for name in ("evaluate", "validate", "cache"):
        for option in ("--model.lr", "--model.loss", "--trainer.logger", "--pictures", "--data.batch_size"):
            assert option not in found[name], (name, option)
    assert "--model.lr " in found["fit"] and "--data.help SA1B" in found["fit"] and "--trainer.help" in found["fit"]
    assert "--model.help" in found["fit"] and "--compare" in found["evaluate"] and "--plan_only" in found["cache"]


@pytest.mark.parametrize(
    ("flags", "listed"),
    [
        (["--trainer.help"], ("--trainer.max_epochs", "--trainer.gradient_clip_val")),
        (["--model.help"], ("--model.lr", "--model.upsampler")),
        (["--data.help", "SA1B"], ("--data.shards", "--data.augmentation.flip_probability")),
        (["--data.help"], ("--data.shards",)),
        (["--data.help", "RenderedScenes"], ("--data.train_scenes",)),
        (["--model.backbone.help", "SigLIP2"], ("--model.backbone.pretrained",)),
    ],
)
def test_help_of_a_group_lists_all_of_it(
    flags: list[str], listed: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", *flags])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and all(f"  {option}" in out for option in listed)
