"""`spar speed` runs the attention of the configured model."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.distillation import Distillation
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.speed import segment
from spar_lightning.speed.train import Ours


@pytest.fixture
def bench() -> Any:
    """Return settings of a windowed model, with which nothing is timed."""
    module = Distillation(Tiny(), attention="windowed")
    return SimpleNamespace(
        module=module, device=torch.device("cpu"), student=lambda: copy.deepcopy(module.student), size=(72, 96),
        noise=lambda h, w: torch.zeros(3, h, w, dtype=torch.uint8), precision="32-true", way=lambda *_: None,
        compare=lambda *_: None,
    )  # fmt: skip


def test_training_steps(bench: Any) -> None:
    assert Ours(bench, []).module.student.windowed == WindowedAttention()


def test_segmentation(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Segmenter] = []

    def recorded(*args: Any) -> Segmenter:
        made.append(Segmenter(*args))
        return made[-1]

    monkeypatch.setattr(segment, "Segmenter", recorded)
    list(segment.segment(bench))
    assert [segmenter.backbone.windowed for segmenter in made] == [WindowedAttention()]
