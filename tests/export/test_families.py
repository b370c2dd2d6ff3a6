"""Exports of the families that need small models in timm and open_clip."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spar_lightning.export import safetensors
from spar_lightning.student import load_student
from tests.backbones.small_models import randomized

FAMILIES = {
    "EVA02CLIP": "EVA02-Tiny",
    "PECore": "PE-Core-Nano",
    "TIPSv2": "vit_tiny_patch14_reg1_tipsv2",
    "CRADIO": "vit_tiny_patch16_radio_v4",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_computes_the_same_features(family: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": FAMILIES[family], "pretrained": None}
    if family == "CRADIO":
        arguments["window"] = 64
    student = load_student(family, backbone=arguments)
    randomized(student.backbone)
    safetensors.write(student, tmp_path)
    loaded = load_student(tmp_path).backbone
    assert loaded.weights_digest() == student.backbone.weights_digest()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    side = 5 * loaded.patch_size
    images = torch.randn(1, 3, side, side + loaded.patch_size)
    with torch.no_grad():
        assert torch.equal(loaded(images), student.backbone(images))
