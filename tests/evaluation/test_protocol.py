"""Tests that every inference setting that affects a result is part of the protocol."""

from dataclasses import fields
from pathlib import Path

import torch

from spar_lightning.backbones import Tiny
from spar_lightning.evaluation.protocol import Protocol, differences, upgraded
from spar_lightning.refinement import LPOSS, AnyUp
from spar_lightning.segmentation.config import InferenceConfig


def test_every_setting_is_part_of_it(tmp_path: Path) -> None:
    torch.save(AnyUp(None).state_dict(), tmp_path / "anyup.pth")
    others = {
        "inference": "single", "stride": 8, "blend": "hann", "templates": ["{}"], "patch_fit": "paper",
        "refine": LPOSS(), "upsampler": str(tmp_path / "anyup.pth"), "attention": "windowed",
        "block_size": 512,
    }  # fmt: skip
    for field in fields(InferenceConfig):  # a new field fails here until it is part of the protocol
        if field.name != "window_batch":  # does not affect results
            plain = {"inference": "single" if field.name in ("attention", "block_size") else "sliding", "stride": 16}
            content = Protocol(Tiny(), InferenceConfig(**plain), "32-true").content()  # type: ignore[arg-type]
            config = InferenceConfig(**{**plain, field.name: others[field.name]})  # type: ignore[arg-type]
            assert Protocol(Tiny(), config, "32-true").content() != content, field.name


def test_a_stride_is_no_part_of_a_single_pass() -> None:
    one, other = (Protocol(Tiny(), InferenceConfig(stride=stride), "32-true").content() for stride in (8, 16))
    assert one == other


def test_attention_is_part_of_a_single_pass_only() -> None:
    """Windows of the native size get full attention, whatever the setting."""
    windowed = (InferenceConfig(inference, attention="windowed") for inference in ("single", "sliding"))
    single, sliding = (Protocol(Tiny(), config, "32-true").content() for config in windowed)
    assert single["attention"] == {"tile": 2, "keys": 8, "temperature": "none", "positions": "stretched"}
    assert sliding == Protocol(Tiny(), InferenceConfig("sliding"), "32-true").content()


def test_those_of_version_1_compare_with_todays() -> None:
    older = {"geometry": "aligned", "backbone": "spar_lightning.backbones.tiny.Tiny"}
    assert differences(upgraded(older), {"patch_fit": "aligned", "family": "Tiny"}) == []
