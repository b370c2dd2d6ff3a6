"""Tests of the cosine decay: warm-up, and a resumed run of another length."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from spar_lightning import distillation
from spar_lightning.cosine_decay import CosineDecay
from spar_lightning.errors import UserError


def test_cosine_decay_follows_the_end_of_the_run() -> None:
    def rates(steps: int, state: dict[str, Any] | None = None) -> tuple[list[float], dict[str, Any]]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = CosineDecay(optimizer, steps)
        if state:
            schedule.load_state_dict(state)
        seen = []
        for _ in range(4):
            optimizer.step()
            schedule.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen, schedule.state_dict()

    first, state = rates(4)
    assert first[1] == pytest.approx(1.0) and first[3] == pytest.approx(0.0)
    extended, _ = rates(8, state)  # resumed with twice the steps: second half of the longer curve
    assert extended == pytest.approx([math.cos(math.pi * step / 8) + 1 for step in (5, 6, 7, 8)])


def test_cosine_decay_with_a_warm_up() -> None:
    plain, warmed = (
        CosineDecay(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 8, share).lr_lambdas[0] for share in (0, 0.5)
    )
    assert [warmed(step) / plain(step) for step in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    with pytest.raises(UserError, match=r"warm_up .*below 1.* 1\.0"):
        CosineDecay(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 8, 1.0)


def test_the_former_path_works() -> None:
    assert distillation.CosineDecay is CosineDecay  # in configurations of version 0.1
