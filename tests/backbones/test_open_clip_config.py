"""Settings next to weights from a path: mean, std and activation are read, and another model is rejected."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from spar_lightning.backbones import OpenCLIP, SigLIP2
from spar_lightning.backbones.weights import WeightsError, without_weights
from tests.any_words import SmallCLIP

MODEL = "ViT-Ti-16-test"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the weights of both towers, in the layout of open_clip."""
    torch.manual_seed(0)
    save_file(open_clip.create_model(MODEL).state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def configure(folder: Path, preprocess: dict[str, Any] | None = None, **changes: Any) -> None:
    config = {**open_clip.get_model_config(MODEL), **changes}
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, **(preprocess or {})}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


@torch.no_grad()
def test_the_settings_of_a_folder_are_those_of_open_clip(folder: Path) -> None:
    configure(folder, quick_gelu=True)
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    plain = OpenCLIP(MODEL, None).identity()
    for path in (folder, folder / "open_clip_model.safetensors"):
        ours = SmallCLIP(str(path))
        assert (ours.mean, ours.std, ours.quick_gelu) == ((0.5,) * 3, (0.25,) * 3, True)
        assert ours.identity().items() >= {"mean": [0.5] * 3, "std": [0.25] * 3, "quick_gelu": True}.items()
        assert ours.identity().keys() == plain.keys()
        tokens = open_clip.get_tokenizer(MODEL)(["a cat"])
        torch.testing.assert_close(ours.encode_text(["a cat"]), theirs.encode_text(tokens))
        torch.testing.assert_close(
            ours.trunk_tokens(torch.ones(1, 3, 64, 64), 1),
            theirs.visual.transformer.resblocks[0](theirs.visual._embeds(torch.ones(1, 3, 64, 64))),
        )


def test_only_another_activation_changes_the_cache_key_of_text(folder: Path) -> None:
    bare = SmallCLIP(str(folder)).text_identity()
    configure(folder)
    assert bare is not None and SmallCLIP(str(folder)).text_identity() == bare
    configure(folder, quick_gelu=True)
    assert SmallCLIP(str(folder)).text_identity() == {**bare, "quick_gelu": True}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"embed_dim": 64}, ["embed_dim", "64", "32"]),
        ({"vision_cfg": {"layers": 3}}, ["layers", "3", "2"]),
        ({"vision_cfg": {"image_size": 224}}, ["image_size", "224", "64"]),
        ({"vision_cfg": 3}, ["open_clip_config.json"]),
        ({"preprocess": {"mean": [0.5]}}, ["open_clip_config.json", "mean"]),
    ],
)
def test_a_configuration_that_does_not_fit(folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    configure(folder, **changes)
    with pytest.raises(WeightsError) as error:
        SmallCLIP(str(folder))
    assert all(part in str(error.value) for part in parts)


def test_a_configuration_that_is_not_json(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"open_clip_config\.json"):
        SmallCLIP(str(folder))


def test_settings_that_are_assumed_are_told_if_tags_disagree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "weights.safetensors"
    for model, parts in (
        ("ViT-B-32", ["GELU", "openai", "ViT-B-32-quickgelu", "open_clip_config.json"]),
        ("ViT-B-32-quickgelu", []),
        (MODEL, []),
    ):
        save_file(OpenCLIP(model, None).vision_state_dict(), path)
        caplog.clear()
        OpenCLIP(model, str(path))
        assert len(caplog.records) == bool(parts)
        assert all(part in caplog.text for part in [*parts, str(path)] if parts)


def test_a_folder_that_is_gone_is_told_because_its_settings_are(caplog: pytest.LogCaptureFixture) -> None:
    with without_weights():
        SigLIP2("ViT-B-32-SigLIP2-256", "/nowhere/weights.safetensors")
    assert "/nowhere/weights.safetensors does not exist" in caplog.text
