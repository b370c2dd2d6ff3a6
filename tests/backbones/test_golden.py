"""Dense features equal those of the original implementations for known weights and images.

tests/data/golden contains 48 sampled patches per case, computed with the original implementations (CPU,
fp32). `golden_weights.py` creates the weights and images from names only.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spar_lightning.backbones import Backbone, DINOv3Text, OpenCLIP, SigLIP2
from spar_lightning.sliding_window import SlidingWindow
from tests.backbones import golden_weights

DATA = Path(__file__).parents[1] / "data" / "golden"
GOLDEN = load_file(DATA / "features.safetensors")


def check(case: str, encode: Callable[[Tensor], Tensor]) -> None:
    height, width = map(int, case.rpartition("_")[2].split("x"))
    with torch.no_grad():
        features = encode(golden_weights.image(height, width))[0]
    assert list(features.shape) == GOLDEN[f"{case}/shape"].tolist()
    sampled = features.flatten(0, 1)[GOLDEN[f"{case}/idx"].long()]
    torch.testing.assert_close(sampled, GOLDEN[case], rtol=0, atol=2e-4)  # tolerance of the reference features


def with_golden_weights(backbone: Backbone) -> Backbone:
    values = {k: golden_weights.open_clip_value(k, v.shape) for k, v in backbone.vision_state_dict().items()}
    backbone.load_vision_state_dict(values)
    return backbone


@pytest.fixture(scope="module")
def siglip2() -> Backbone:
    return with_golden_weights(SigLIP2(pretrained=None))


@pytest.fixture(scope="module")
def openclip() -> Backbone:
    return with_golden_weights(OpenCLIP(pretrained=None))


@pytest.mark.parametrize("size", ["512x512", "528x784"])
def test_siglip2_single_pass(siglip2: Backbone, size: str) -> None:
    check(f"siglip2/single_{size}", siglip2)


@pytest.mark.slow
def test_siglip2_sliding_window(siglip2: Backbone) -> None:
    check("siglip2/slide32_560x592", SlidingWindow(siglip2, stride=32, batch_size=2))


def test_openclip_single_pass(openclip: Backbone) -> None:
    check("openclip/single_224x224", openclip)


def test_openclip_sliding_window(openclip: Backbone) -> None:
    check("openclip/slide24_272x304", SlidingWindow(openclip, stride=24))


@pytest.mark.slow
def test_dinov3_single_pass(tmp_path: Path) -> None:
    names = json.loads((DATA / "dinov3_txt_keys.json").read_text())
    prefix = "visual_model.backbone."
    values = {n: golden_weights.dinov3_value(n, shape) for n, shape in names.items() if n.startswith(prefix)}
    path = tmp_path / "backbone.safetensors"
    save_file({name.removeprefix(prefix): value for name, value in values.items()}, path)
    check("dino/single_384x384", DINOv3Text(backbone_weights=str(path)))
