"""Tests of custom refinements: an imported class can be named in configurations and options like the built-in ones."""

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from spar_lightning.backbones import Tiny
from spar_lightning.cli import main
from spar_lightning.evaluation.protocol import Protocol
from spar_lightning.refinement import Refinement
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter


class Scaled(Refinement):
    """Refinement that multiplies similarities by a factor."""

    def __init__(self, factor: float = -1.0) -> None:
        self.factor = factor

    def __call__(self, features: Tensor, similarities: Tensor, patch_size: int) -> Tensor:
        return self.factor * similarities

    def identity(self) -> dict[str, Any]:
        return {"name": "Scaled", "factor": self.factor}


def test_a_class_is_all_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{Scaled.__module__}.Scaled"
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quickstart", "--model.refine", path, "--model.refine.factor", "-2", "--print_config"])
    written = yaml.safe_load(capsys.readouterr().out)["model"]["refine"]
    assert written == {"class_path": path, "init_args": {"factor": -2.0}}

    image = torch.randint(0, 256, (3, 64, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, negated = (
        Segmenter(Tiny(), ["red dot", "blue dot"], InferenceConfig(refine=r)) for r in (Scaled(1.0), Scaled())
    )
    assert torch.equal(plain(image), 1 - negated(image))  # the other of the two names
    protocol = Protocol(Tiny(), InferenceConfig(refine=Scaled(3.0)), "32-true").content()
    assert protocol["refine"] == {"name": "Scaled", "factor": 3.0}
