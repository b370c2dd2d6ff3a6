"""Tests that each bundled YAML file is accepted by `spar fit` and trains two steps on photographs."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch

from spar_lightning.backbones import NaFlex, Tiny
from spar_lightning.cli import main

CONFIGS = sorted(
    str(file) for file in resources.files("spar_lightning.configs").iterdir() if file.name.endswith(".yaml")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: Path(path).stem)
def test_parses_with_full_class_paths(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", path, "--print_config"])
    assert exit.value.code == 0
    assert "run_dir: runs/" in capsys.readouterr().out
    # Short names become ambiguous if a plugin adds a second class of the same name.
    for line in Path(path).read_text().splitlines():
        if "class_path:" in line:
            assert "." in line.split("class_path:")[1].split("#")[0]


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
        pytest.param(path, id=Path(path).stem, marks=[pytest.mark.slow] if "extended" in path else [])
        for path in CONFIGS
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
