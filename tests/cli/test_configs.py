"""Tests that shipped configurations can be listed, printed, copied, and found by name from any folder."""

from pathlib import Path

import pytest
import yaml

from spar_lightning.cli import main
from spar_lightning.cli.lightning_cli import prepare
from spar_lightning.configs import shipped
from spar_lightning.refinement import LPOSS

Capture = pytest.CaptureFixture[str]


def test_each_has_a_line(capsys: Capture) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if line and not line.startswith("Table ")]
    assert [line.split()[0] for line in listed] == list(shipped())
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "\nquickstart The complete method at small scale: two CPU cores, no download, a few minutes\n" in text
    assert "\nTable 2 of the paper: what is trained (SigLIP2 ViT-B/16)\ntable2_all Trains all parameters" in text
    assert text.count("\nTable ") == 3


def test_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    text = shipped()["quickstart"].read_text()
    assert main(["configs", "quickstart"]) == 0 and capsys.readouterr().out == text
    assert main(["configs", "quickstart", "--copy", "my.yaml"]) == 0
    assert Path("my.yaml").read_text() == text and "spar fit --config my.yaml" in capsys.readouterr().out
    assert main(["configs", "quickstart", "--copy", "my.yaml"]) == 2
    assert "my.yaml" in capsys.readouterr().err
    assert main(["configs", "quikstart"]) == 2 and "mean quickstart" in capsys.readouterr().err
    assert main(["configs", "--copy", "x.yaml"]) == 2 and "spar configs NAME --copy" in capsys.readouterr().err


def test_names_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(shipped()["quickstart"])
    assert prepare(["--config", "quickstart", "--a", "quickstart"]) == ["--config", path, "--a", "quickstart"]
    assert prepare(["--config=quickstart", "-c", "quickstart"]) == ["--config", path, "--config", path]
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", "quickstart", "--print_config"])
    assert exit.value.code == 0 and "run_dir: runs/quickstart" in capsys.readouterr().out
    Path("quickstart").write_text("a file of that name comes first")
    assert prepare(["--config", "quickstart"]) == ["--config", "quickstart"]


def test_options_count_wherever_they_stand(capsys: Capture) -> None:
    """Options before, between and after --config give the same settings."""
    options = ["--data.batch_size", "2", "--data.augmentation.flip_probability", "0.1"]
    config = ["--config", "quickstart"]
    printed = []
    for args in ([*options, *config], [*config, *options], [*options[:2], *config, *options[2:]]):
        with pytest.raises(SystemExit):
            main(["fit", *args, "--print_config"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2] and "batch_size: 2" in printed[0]
    assert "preset: none" in printed[0] and "flip_probability: 0.1" in printed[0]


def test_settings_next_to_a_preset_leave_the_rest_of_it(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "spar.yaml").write_text("model: {refine: {class_path: LPOSS, init_args: {preset: spar}}}")
    args = ["--config", "quickstart", "--config", str(tmp_path / "spar.yaml"), "--model.refine.k", "100"]
    with pytest.raises(SystemExit):
        main(["fit", *args, "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert LPOSS(**model["refine"]["init_args"]).identity() == LPOSS(gamma=10.0, k=100).identity()
