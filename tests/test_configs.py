"""Tests that each bundled YAML file is accepted by `spar fit` and trains two steps on photographs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spar_lightning.backbones import NaFlex, Tiny
from spar_lightning.cli import main
from spar_lightning.configs import shipped
from spar_lightning.losses import ClassSimilarityLoss
from tests.testing.test_checks import TABLE_2

CONFIGS = [str(path) for name, path in shipped().items() if not name.startswith("table")]
ROWS = {name: path for name, path in shipped().items() if name.startswith("table")}


@pytest.mark.parametrize("path", [*map(str, shipped().values())], ids=lambda path: Path(path).stem)
def test_parses_with_full_class_paths(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", path, "--print_config"])
    assert exit.value.code == 0
    assert "run_dir: runs/" in capsys.readouterr().out
    # Short names become ambiguous if a plugin adds a second class of the same name.
    for line in Path(path).read_text().splitlines():
        if "class_path:" in line:
            assert "." in line.split("class_path:")[1].split("#")[0]


def flat(path: Path) -> dict[str, Any]:
    """Return the settings of a configuration by dotted name."""
    content = yaml.safe_load(path.read_text())
    model, data = content.pop("model"), content.pop("data")["init_args"]
    return {**content, **{f"model.{k}": v for k, v in model.items()}, **{f"data.{k}": v for k, v in data.items()}}


CHANGES = {
    "table2": {"model.trainable"},
    "table3": {"data.fraction", "data.seed", "seed_everything", "data.shards", "data.max_images", "data.cache"},
    "table9": {"model.loss", "model.stride", "model.teacher", "model.student_scale", "data.augmentation", "data.cache"},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_table_changes_only_what_the_row_is_about(name: str) -> None:
    base, row = flat(shipped()["siglip2_vitb16"]), flat(ROWS[name])
    changed = {key for key in {*base, *row} if base.get(key) != row.get(key)}
    assert row["run_dir"] == f"runs/{name}"
    assert changed <= {"run_dir", *CHANGES[name[:6]]}
    assert len(changed) > 1 or name == "table2_last_two_blocks"
    # Rows share a cache exactly if they have the same teacher and augmentation.
    other = {"model.stride", "model.teacher", "data.augmentation", "data.seed", "data.shards"} & changed
    assert ("data.cache" in changed) == bool(other)
    if "model.loss" in row:
        loss = row["model.loss"]
        assert ClassSimilarityLoss(**loss["init_args"]).classes and loss["class_path"].endswith("ClassSimilarityLoss")


def test_table_2_has_a_row_for_each_selection() -> None:
    rows = {tuple(flat(path)["model.trainable"]) for name, path in ROWS.items() if name.startswith("table2")}
    assert rows == set(TABLE_2)


# Smaller networks of the same families, with random weights.
VARIANTS = {
    "SigLIP2": ["--model.backbone.model", "ViT-B-32-SigLIP2-256", "--model.backbone.pretrained", "null"],
    "OpenCLIP": ["--model.backbone.model", "ViT-S-32", "--model.backbone.pretrained", "null"],
    "DINOv3Text": [
        "--model.backbone.model", "vit_tiny_patch16_dinov3_qkvb", "--model.backbone.backbone_weights", "null",
        "--model.backbone.text_weights", "null", "--model.backbone.window", "128",
    ],
}  # fmt: skip


def two_steps(config: str, arguments: list[str], photos: str, folder: Path) -> dict[str, torch.Tensor]:
    """Train on the two photographs in fp32 on the CPU, and return the state dict of the checkpoint."""
    code = main([
        "fit", "--config", config, "--model.stride", "96", *arguments,
        "--data.shards", photos, "--data.max_images", "null", "--data.cache", str(folder / "cache"),
        "--data.num_workers", "0", "--data.augmentation.scale", "[352,288]", "--data.augmentation.min_side", "128",
        "--data.augmentation.multiple", "32", "--data.augmentation.ratio_range", "[0.9,1.0]",
        "--trainer.precision", "32-true", "--trainer.accelerator", "cpu",
        "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1", "--run_dir", str(folder / "run"),
    ])  # fmt: skip
    assert code == 0
    checkpoint = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=Path(path).stem, marks=[pytest.mark.slow] if "extended" in path or "table9" in path else []
        )
        for path in [*CONFIGS, str(ROWS["table9_single_pass_teacher"])]
        if "quickstart" not in path
    ],
)
def test_two_steps_with_a_small_network(path: str, photos: str, tmp_path: Path) -> None:
    family = next(name for name in VARIANTS if f"backbones.{name}" in Path(path).read_text())
    weights = two_steps(path, VARIANTS[family], photos, tmp_path)
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.fixture
def plain(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that writes a configuration with only the backbone class and the data."""

    def write(backbone: str) -> str:
        path = tmp_path / "plain.yaml"
        path.write_text(
            f"model:\n  backbone:\n    class_path: spar_lightning.backbones.{backbone}\n"
            "data:\n  class_path: spar_lightning.datamodules.SA1B\n  init_args: {shards: x}\n"
        )
        return str(path)

    return write


def test_two_steps_with_tiny(plain: Callable[[str], str], photos: str, tmp_path: Path) -> None:
    before = Tiny().state_dict()
    after = two_steps(plain("Tiny"), ["--model.stride", "32"], photos, tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[f"student.{name}"])}
    assert changed and all(name.startswith(("blocks.4.", "blocks.5.")) for name in changed)


def test_two_steps_with_naflex(plain: Callable[[str], str], photos: str, small_naflex: str, tmp_path: Path) -> None:
    before = NaFlex(small_naflex).state_dict()
    after = two_steps(plain("NaFlex"), ["--model.backbone.pretrained", small_naflex], photos, tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[f"student.{name}"])}
    last = tuple(f"vision_model.encoder.layers.{i}." for i in (1, 2))
    assert changed and all(name.startswith(last) for name in changed)
