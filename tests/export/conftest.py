"""Students of every family: small networks whose parameters all differ from their simple initial values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spar_lightning.backbones import DINOv3Text, NaFlex, OpenCLIP, SigLIP2, Tiny
from spar_lightning.backbones.base import Backbone
from spar_lightning.export import parity
from spar_lightning.export.recipe import Recipe
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.student import Student
from tests import any_words  # noqa: F401 - registers the small CLIP in open_clip

MODEL = "ViT-Ti-16-SigLIP-test"


@register_model
def vit_tiny_patch16_siglip_test(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Return a very small ViT of timm with the attention pooling of SigLIP."""
    arguments = {"patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3, "class_token": False,
                 "global_pool": "map", "img_size": 64, **kwargs}  # fmt: skip
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "vit_tiny_patch16_siglip_test", pretrained, **arguments
    )
    return model


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Register a small SigLIP in open_clip and return its name."""
    path = tmp_path_factory.mktemp("siglip") / f"{MODEL}.json"
    vision = {"image_size": 64, "timm_model_name": "vit_tiny_patch16_siglip_test", "timm_model_pretrained": False,
              "timm_pool": "map", "timm_proj": "none"}  # fmt: skip
    text = {"context_length": 16, "vocab_size": 100, "width": 48, "heads": 3, "layers": 1, "no_causal_mask": True,
            "proj_bias": True, "pool_type": "last"}  # fmt: skip
    content = {"embed_dim": 48, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    path.write_text(json.dumps(content))
    open_clip.add_model_config(path)
    assert "vit_tiny_patch16_siglip_test" in timm.list_models("*siglip_test")
    return MODEL


@pytest.fixture
def student(siglip: str, small_naflex: str) -> Callable[[str], Student]:
    """Return a function that builds a student of a family."""
    make: dict[str, Callable[[], Backbone]] = {
        "SigLIP2": lambda: SigLIP2(siglip, None),
        "OpenCLIP": lambda: OpenCLIP("ViT-Ti-16-test", None),
        "DINOv3Text": lambda: DINOv3Text("vit_tiny_patch16_dinov3_qkvb", window=64),
        "NaFlex": lambda: NaFlex(small_naflex),
        "Tiny": Tiny,
    }

    def student(family: str) -> Student:
        torch.manual_seed(0)
        backbone = make[family]()
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                if parameter.ndim < 2 or "pos" in name or "token" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if any(part in name for part in ("qkv.weight", "in_proj_weight", "q_proj.weight", "k_proj.weight")):
                    parameter.mul_(2)  # so that attention is not uniform
        block = {"backbone": {"class_path": f"spar_lightning.backbones.{family}", "init_args": {}}, "stride": 32}
        run = {"model": block, "data": {}, "trainer": {}}
        return Student(backbone.requires_grad_(False), InferenceConfig(stride=32), block, run, None)

    return student


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of the README in this process, since starting a new one takes as long as all of these tests."""

    def run(recipe: Recipe, folder: Path, images: dict[str, Tensor]) -> dict[str, Tensor]:
        space: dict[str, Any] = {}
        with monkeypatch.context() as inside:
            inside.chdir(folder)
            exec(recipe.load + recipe.any_size, space)
        outputs = [name for name in ("dense", "tokens") if name in space]
        return {f"{name} {i}": space[name](space["model"], images[i]) for name in outputs for i in images}

    monkeypatch.setattr(parity, "run_fresh", run)
