"""Every built-in backbone passes the interface checks, and a broken backbone fails the right check."""

import copy
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from spar_lightning.backbones import (
    CRADIO,
    EVA02CLIP,
    Backbone,
    DINOv3Text,
    NaFlex,
    OpenCLIP,
    PECore,
    SigLIP2,
    Tiny,
    TIPSv2,
)
from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.parameter_groups import SelectorError, select
from spar_lightning.testing import Check, backbone_checks
from tests.backbones.small_models import randomized

FAMILIES: dict[str, Callable[[str], Backbone]] = {
    "Tiny": lambda folder: Tiny(),
    "SigLIP2": lambda folder: SigLIP2("ViT-B-32-SigLIP2-256", pretrained=None),
    "OpenCLIP": lambda folder: OpenCLIP("ViT-S-32", pretrained=None),
    "OpenCLIP-quickgelu": lambda folder: OpenCLIP("ViT-B-32-quickgelu", pretrained=None),
    "DINOv3Text": lambda folder: DINOv3Text("vit_tiny_patch16_dinov3_qkvb", window=64),
    "NaFlex": lambda folder: NaFlex(folder),
    "EVA02CLIP": lambda folder: randomized(EVA02CLIP("EVA02-Tiny", pretrained=None)),
    "EVA02CLIP-post": lambda folder: randomized(EVA02CLIP("EVA02-Post", pretrained=None)),
    "PECore": lambda folder: randomized(PECore("PE-Core-Nano", pretrained=None)),
    "TIPSv2": lambda folder: randomized(TIPSv2("vit_tiny_patch14_reg1_tipsv2", pretrained=None)),
    "CRADIO": lambda folder: randomized(CRADIO("vit_tiny_patch16_radio_v4", pretrained=None, window=64)),
}


@cache  # building takes longer than the checks
def built(family: str, folder: str) -> Backbone:
    torch.manual_seed(0)
    return FAMILIES[family](folder)


NAMES = [check.name for check in backbone_checks(Tiny)]
# The built-in families are one package: importing one of them imports all.
PAIRS = [(family, name) for family in FAMILIES for name in NAMES if name != "import_is_fast" or family == "Tiny"]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_built_in_families_keep_the_contract(
    family: str, name: str, small_naflex: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # tokenizers are not downloaded
    checks = backbone_checks(lambda: copy.deepcopy(built(family, small_naflex)))
    checks[NAMES.index(name)]()


# Rows of Table 2 of the paper.
TABLE_2 = [
    ("all",), ("blocks.-1",), ("blocks.-2", "blocks.-1"), ("blocks.-3", "blocks.-2", "blocks.-1"),
    ("patch_embed",), ("pos_embed",), ("blocks.-2.mlp", "blocks.-1.mlp"), ("blocks.-2.qkv", "blocks.-1.qkv"),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_table_2_is_a_selection(family: str, small_naflex: str) -> None:
    groups = built(family, small_naflex).parameter_groups()
    for selectors in TABLE_2:
        if family == "DINOv3Text" and selectors == ("pos_embed",):  # RoPE has no parameters
            with pytest.raises(SelectorError, match="'pos_embed'"):
                select(groups, selectors)
        else:
            assert select(groups, selectors)


def failing(factory: Callable[[], Backbone]) -> set[str]:
    def fails(check: Check) -> bool:
        try:
            check()
        except AssertionError:
            return True
        return False

    checks = [check for check in backbone_checks(factory) if check.name != "import_is_fast"]  # starts a process
    return {check.name for check in checks if fails(check)}


class Transposed(Tiny):
    """Backbone with patch tokens in column-major order."""

    def embed(self, images: Tensor) -> Tensor:
        return super().embed(images.transpose(2, 3))


class Leaky(Tiny):
    """Backbone with attention across the images of a packed sequence."""

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        return super().run_blocks(tokens, [(1, tokens.shape[1])], start, stop)


class Wide(Tiny):
    """Backbone that claims windowed attention but always computes full attention."""

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid], start: int = 0, stop: int | None = None) -> Tensor:
        return super(Wide, self.with_attention(None)).run_blocks(tokens, grids, start, stop)


class Awake(Tiny):
    """Backbone that switches to train mode."""

    def train(self, mode: bool = True) -> "Awake":
        torch.nn.Module.train(self, mode)
        return self


def test_a_broken_backbone_fails_the_check_that_names_its_fault() -> None:
    assert "patches_are_row_major" in failing(Transposed)
    assert failing(Leaky) == {"packed_sequence_equals_its_images", "windowed_attention_is_local"}
    assert failing(Wide) == {"windowed_attention_is_local"}
    assert failing(Awake) == {"stays_in_eval_mode"}
