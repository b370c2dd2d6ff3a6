"""Tests of invalid input: the message names the input, the allowed values and the fix; the exit code is 2."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from spar_lightning.cli import main
from spar_lightning.cli.fit_run_files import SETTINGS
from tests.datasets.test_shard_index import write_tar

Capture = pytest.CaptureFixture[str]


def sentence(args: list[str], capsys: Capture) -> str:
    """Run a command with invalid input and return its message; it must be short and without traceback."""
    try:
        code: object = main(args)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and "error: " in printed
    text = printed[printed.index("error: ") + 7 :]
    assert len(text) < 1500
    return " ".join(text.split())


def test_missing_config(capsys: Capture) -> None:
    text = sentence(["fit", "--config", "nowhere.yaml"], capsys)
    assert "nowhere.yaml" in text and "dinov3txt_vitl16, " in text


def test_broken_yaml(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "broken.yaml").write_text("model: [1, 2\n")
    assert "line 2" in sentence(["fit", "--config", str(tmp_path / "broken.yaml")], capsys)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--model.strid", "Did you mean stride"),
        ("--data.train_scene", "Did you mean train_scenes"),
        ("--run_dirr", "Did you mean run_dir"),
    ],
)
def test_unknown_key(option: str, hint: str, small: list[str], capsys: Capture) -> None:
    text = sentence(["fit", *small, option, "3"], capsys)
    assert option.split(".")[-1].lstrip("-") in text and hint in text and "--help" in text


def test_unknown_key_in_a_file(tmp_path: Path, small: list[str], capsys: Capture) -> None:
    (tmp_path / "more.yaml").write_text("model:\n  wieght_decay: 1\n")
    text = sentence(["fit", *small, "--config", str(tmp_path / "more.yaml")], capsys)
    assert "wieght_decay" in text and "mean weight_decay" in text


def test_wrong_type(small: list[str], capsys: Capture) -> None:
    text = sentence(["fit", *small, "--model.stride", "five"], capsys)
    assert "model.stride" in text and "int" in text and "five" in text


def test_unknown_class(small: list[str], capsys: Capture) -> None:
    text = sentence(["fit", *small, "--model.backbone", "Tinny"], capsys)
    assert "'Tinny'" in text and "mean Tiny" in text and "package.module.Class" in text


def test_nothing_given(capsys: Capture) -> None:
    assert "--config quickstart" in sentence(["fit"], capsys)


def test_missing_shard(tmp_path: Path, capsys: Capture) -> None:
    text = sentence(["fit", *shards(tmp_path, tmp_path / "sa_{000000..000001}.tar")], capsys)
    assert "data.shards" in text and "sa_000000.tar" in text


def test_empty_shard(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "sa_000000.tar").touch()
    text = sentence(["fit", *shards(tmp_path, tmp_path / "sa_000000.tar")], capsys)
    assert "sa_000000.tar" in text and "0 bytes" in text
    # A start that failed before the first measurement does not block the next start.
    assert "0 bytes" in sentence(["fit", *shards(tmp_path, tmp_path / "sa_000000.tar")], capsys)


def shards(tmp_path: Path, pattern: Path) -> list[str]:
    """Return arguments of `spar fit` that train Tiny on the given shards."""
    return [
        "--model.backbone=Tiny", "--data=SA1B", f"--data.shards={pattern}", f"--data.cache={tmp_path / 'cache'}",
        "--data.augmentation.multiple=8", f"--run_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu",
    ]  # fmt: skip


def test_unknown_class_name(tmp_path: Path, scenes: Path, small: list[str], capsys: Capture) -> None:
    from spar_lightning.datamodules import RenderedScenes

    where = ["--data.root", str(tmp_path), "--run_dir", str(tmp_path / "run")]
    data = RenderedScenes(root=str(tmp_path), train_scenes=1, val_scenes=1, val_sizes=(64,))
    data.draw()
    path = tmp_path / "seed-0" / "scenes_64" / "benchmark.yaml"
    path.write_text(path.read_text().replace("- red dot", "- red dott"))
    more = ["--data.train_scenes", "1", "--data.val_scenes", "1", "--data.val_sizes", "[64]"]
    text = sentence(["validate", *small, *more, *where[:2]], capsys)
    assert "'dott'" in text and "mean dot" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere; see test_a_run_folder_below_a_file")
def test_unwritable_run_folder(tmp_path: Path, scenes: Path, small: list[str], capsys: Capture) -> None:
    tmp_path.chmod(0o500)
    text = sentence(["fit", *small, "--data.root", str(scenes), "--run_dir", str(tmp_path / "run")], capsys)
    assert "--run_dir" in text


def test_a_run_folder_below_a_file(tmp_path: Path, scenes: Path, small: list[str], capsys: Capture) -> None:
    (tmp_path / "file").touch()
    text = sentence(["fit", *small, "--data.root", str(scenes), "--run_dir", str(tmp_path / "file" / "run")], capsys)
    assert "--run_dir" in text


def test_existing_run_folder(tmp_path: Path, small: list[str], capsys: Capture) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({name: {} for name in SETTINGS}))
    (tmp_path / "metrics.jsonl").touch()
    text = sentence(["fit", *small, "--run_dir", str(tmp_path)], capsys)
    assert "--resume auto" in text and "--overwrite" in text


def test_a_folder_of_something_else(tmp_path: Path, small: list[str], capsys: Capture) -> None:
    (tmp_path / "thesis.tex").touch()
    for extra in ([], ["--overwrite"]):
        assert "config.yaml" in sentence(["fit", *small, "--run_dir", str(tmp_path), *extra], capsys)
    assert (tmp_path / "thesis.tex").exists()


def test_resume_and_overwrite(tmp_path: Path, small: list[str], capsys: Capture) -> None:
    args = ["fit", *small, "--run_dir", str(tmp_path), "--resume", "auto", "--overwrite"]
    assert "--overwrite and --resume auto" in sentence(args, capsys)


def test_a_missing_checkpoint(tmp_path: Path, small: list[str], capsys: Capture) -> None:
    text = sentence(["fit", *small, "--run_dir", str(tmp_path / "run"), "--resume", "x.ckpt"], capsys)
    assert "--resume x.ckpt" in text and "auto, never" in text
    assert "x.ckpt" in sentence(["validate", *small, "--weights", "x.ckpt"], capsys)


def test_a_bad_selector(tmp_path: Path, small: list[str], capsys: Capture) -> None:
    text = sentence(["fit", *small, "--run_dir", str(tmp_path / "run"), "--model.trainable", "[blocks.9]"], capsys)
    assert "trainable: 'blocks.9'" in text
    assert not (tmp_path / "run").exists()


def test_other_scenes_in_the_folder(tmp_path: Path, scenes: Path, small: list[str], capsys: Capture) -> None:
    folder = tmp_path / "seed-0"
    folder.mkdir()
    (folder / "scenes.json").write_text('{"format": 2, "seed": 0, "train_scenes": 3}')
    text = sentence(["fit", *small, "--data.root", str(tmp_path), "--run_dir", str(tmp_path / "run")], capsys)
    assert "train_scenes 3 instead of 12" in text and "data.root" in text


def test_images_that_cannot_be_used(tmp_path: Path, capsys: Capture) -> None:
    write_tar(tmp_path / "sa_000000.tar", {"sa_1.jpg": b"\xff\xd8\xff not a jpeg", "sa_1.json": b"{}"})
    args = shards(tmp_path, tmp_path / "sa_000000.tar")
    text = sentence(["fit", *args], capsys)
    assert "1 of 1" in text and "sa_1: " in text and "data.keys" in text
    for workers in ("0", "1"):  # errors in a loader process are reported the same way
        text = sentence(["fit", *args, "--data.cache=null", "--data.num_workers", workers], capsys)
        assert "sa_000000.tar: sa_1" in text and "data.keys" in text


def test_an_unknown_augmentation(tmp_path: Path, capsys: Capture) -> None:
    args = ["--data=SA1B", "--model.backbone=Tiny", "--data.shards=x.tar", "--data.augmentation.preset=texts"]
    text = sentence(["fit", *args], capsys)
    assert "augmentation.preset" in text and "'texts'" in text and "mean text?" in text


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--data.augmentation.multiple=0", "multiple"),
        ("--model.refine={class_path: LPOSS, init_args: {gamma: 0}}", "gamma"),
        ("--model.refine=lpos", "mean LPOSS"),
        ("--model.upsampler=anyupp", "upsampler: 'anyupp'"),
    ],
)
def test_settings_of_ones_own_outside_their_range(argument: str, words: str, tmp_path: Path, capsys: Capture) -> None:
    assert words in sentence(["fit", *shards(tmp_path, tmp_path / "none.tar"), argument], capsys)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--data.keys=[sa_1,sa_7]", "sa_7"),
        ("--data.keys=missing.txt", "missing.txt"),
        ("--data.fraction=1.5", "data.fraction"),
    ],
)
def test_a_selection_that_selects_nothing(argument: str, words: str, tmp_path: Path, capsys: Capture) -> None:
    write_tar(tmp_path / "sa_000000.tar", {"sa_1.jpg": b"x"})
    assert words in sentence(["fit", *shards(tmp_path, tmp_path / "sa_000000.tar"), argument], capsys)


@pytest.mark.parametrize("option", ["batch_size", "train_scenes"])
def test_a_number_below_its_range(option: str, tmp_path: Path, small: list[str], capsys: Capture) -> None:
    text = sentence(["fit", *small, f"--data.{option}", "0", "--run_dir", str(tmp_path / "run")], capsys)
    assert option in text


def test_a_file_that_is_no_checkpoint(tmp_path: Path, small: list[str], capsys: Capture) -> None:
    path = tmp_path / "notes.ckpt"
    path.write_text("not a checkpoint")
    for args in (["fit", *small, "--run_dir", str(tmp_path / "run"), "--resume"], ["validate", *small, "--weights"]):
        assert str(path) in sentence([*args, str(path)], capsys)
    torch.save({"state_dict": {}}, path)
    for args in (["fit", *small, "--run_dir", str(tmp_path / "run"), "--resume"], ["validate", *small, "--weights"]):
        assert str(path) in sentence([*args, str(path)], capsys)
