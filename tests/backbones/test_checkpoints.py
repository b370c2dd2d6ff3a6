"""Tests of loading weights into a backbone, also one with names that look like those of a wrapper."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spar_lightning.backbones import Tiny
from spar_lightning.backbones.checkpoints import load_weights, warn_if_random


class Wrapped(Tiny):
    """Backbone of a plugin that holds a part of its network as `model`."""

    def __init__(self) -> None:
        super().__init__(pretrained=None)
        self.model = nn.Linear(2, 2)


@pytest.mark.parametrize("wrapper", ["", "student.", "_orig_mod.", "module._orig_mod.", "student._orig_mod."])
def test_a_backbone_with_a_part_named_model(wrapper: str, tmp_path: Path) -> None:
    trained = Wrapped()
    with torch.no_grad():
        trained.model.weight.fill_(7)
    save_file({wrapper + name: t for name, t in trained.state_dict().items()}, tmp_path / "weights.safetensors")
    loaded = Wrapped()
    load_weights(loaded, str(tmp_path / "weights.safetensors"))
    assert torch.equal(loaded.model.weight, trained.model.weight)


def test_random_weights_are_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_random(Tiny())
    assert not caplog.records
    warn_if_random(Tiny(pretrained=None))
    (record,) = caplog.records
    assert "Tiny has random weights" in record.getMessage() and "pretrained" in record.getMessage()
