"""Tests of renamed keys: an error in a user's files, upgraded in files of `spar`, no other changes."""

from pathlib import Path
from typing import Any

import pytest

from spar_lightning.configs.renamed import check_options, check_renamed, upgraded, written_by_a_run
from spar_lightning.errors import UserError

LPOSS = "spar_lightning.refinement.LPOSS"
SETTINGS = {"gamma": 10.0, "alpha": 0.95, "k": 400, "sigma": 0.01}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"geometry": "paper"}, {"patch_fit": "paper"}),
        ({"refine": "none"}, {"refine": None}),
        ({"refine": "lposs_spar"}, {"refine": {"class_path": LPOSS, "init_args": {"preset": "spar"}}}),
        ({"refine": SETTINGS}, {"refine": {"class_path": LPOSS, "init_args": SETTINGS}}),
    ],
)
def test_the_model_block(model: dict[str, Any], expected: dict[str, Any]) -> None:
    assert upgraded({"model": {**model, "stride": 24}}) == {"model": {**expected, "stride": 24}}
    with pytest.raises(UserError, match=f"mine.yaml.*model.*{next(iter(expected))}"):
        check_renamed({"model": model}, "mine.yaml")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"prefix": True}, {"cache_activations": True}),
        ({"augmentation": "text"}, {"augmentation": {"preset": "text"}}),
        ({"augmentation": {"scale": None}}, {"augmentation": {"preset": "none", "scale": None}}),
    ],
)
def test_the_data_block(data: dict[str, Any], expected: dict[str, Any], nested: bool) -> None:
    def block(arguments: dict[str, Any]) -> dict[str, Any]:
        return {"data": {"class_path": "SA1B", "init_args": arguments} if nested else arguments}

    assert upgraded(block(data)) == block(expected)
    with pytest.raises(UserError, match=next(iter(expected))):
        check_renamed(block(data), "mine.yaml")


def test_todays_configurations_stay() -> None:
    content = {
        "model": {"refine": {"class_path": "LPOSS", "init_args": {"k": 9}}, "patch_fit": "paper", "backbone": "Tiny"},
        "data": {"class_path": "SA1B", "init_args": {"augmentation": {"scale": [96, 64]}, "shards": "x"}},
        "trainer": {"max_epochs": 1},
    }
    assert upgraded(content) == content
    for part in (content, {"data": "SA1B"}, {}, None, [1], {"model": None}):
        check_renamed(part, "mine.yaml")


@pytest.mark.parametrize(
    ("command", "args", "new"),
    [
        ("fit", ["--data.init_args.prefix", "true"], "cache_activations"),
        ("fit", ["--model={geometry: paper}"], "patch_fit"),
        ("fit", ["--model.refine", "{gamma: 3}"], "class_path"),
        ("fit", ["--data.augmentation={scale: null}"], "preset"),
        ("fit", ["--ckpt_path", "x"], "--resume"),
        ("evaluate", ["--refine", "lposs"], "preset"),
    ],
)
def test_old_options(command: str, args: list[str], new: str) -> None:
    with pytest.raises(UserError, match=new):
        check_options(command, args)


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("fit", ["--model.refine", "LPOSS", "--model.refine.k", "9", "--data.augmentation.scale", "null"]),
        ("fit", ["--trainer.logger.tags.my-key", "1", "--data", "SA1B", "--model.backbone.prefix", "x"]),
        ("backbones", ["check", "MyViT", "--ckpt_path", "x", "--rounds", "3"]),
        ("predict", ["--weights", "tiny", "--", "--max-side"]),
        ("fit", ["--data.augmentation", "{scale: [96, 64]}", "--model.refine", "null", "--data"]),
    ],
)
def test_other_options(command: str, args: list[str]) -> None:
    check_options(command, args)


def test_what_a_run_wrote(tmp_path: Path) -> None:
    for name in ("config.yaml", "config-resume-2.yaml", "mine.yaml"):
        assert not written_by_a_run(tmp_path / name)
    (tmp_path / "checkpoints").mkdir()
    assert written_by_a_run(tmp_path / "config.yaml") and written_by_a_run(tmp_path / "config-resume-2.yaml")
    assert not written_by_a_run(tmp_path / "mine.yaml")
