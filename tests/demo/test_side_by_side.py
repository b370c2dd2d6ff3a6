"""Segmentation in several modes: results are those of the segmenter."""

from pathlib import Path

import pytest
import torch

from spar_lightning.datasets.scene_renderer import render
from spar_lightning.demo.side_by_side import FULL, SLIDING, STUDENT, WINDOWED, SideBySide
from spar_lightning.errors import UserError
from spar_lightning.export import safetensors
from spar_lightning.segmentation.prompts import parse_classes
from spar_lightning.student import load_student

CLASSES = "red dot; blue dot; rest: plain, grain, waves, checks"
PIXELS = torch.from_numpy(render(3, 0, 96, 130).image).permute(2, 0, 1)


@pytest.fixture(scope="module")
def tiny() -> SideBySide:
    return SideBySide(load_student("tiny"))


def test_modes_are_those_of_the_segmenter(tiny: SideBySide) -> None:
    assert tiny.modes == [FULL, WINDOWED, SLIDING]
    panels = tiny(PIXELS, parse_classes(CLASSES), tiny.modes, 100)
    for panel, settings in zip(panels, ({}, {"attention": "windowed"}, {"inference": "sliding"}), strict=True):
        student = load_student("tiny", inference=settings)
        labels, scores = student.segmenter(parse_classes(CLASSES), 100)(PIXELS, True)
        for i, (_, area, score) in enumerate(panel.rows):
            mask = labels == i
            assert area == pytest.approx(mask.float().mean().item())
            if mask.any():
                assert score == pytest.approx(scores[i][mask].mean().item(), abs=1e-6)
        assert panel.seconds > 0 and panel.colors.size == (130, 96) and panel.picture.width >= 130
    assert [label for label, *_ in panels[0].rows] == ["red dot", "blue dot", "rest"]
    assert panels[0].colors.tobytes() != panels[2].colors.tobytes()


def test_a_trained_network_has_a_fourth_mode(tmp_path: Path) -> None:
    student = load_student("tiny")
    (tmp_path / "export").mkdir()
    with torch.no_grad():
        student.backbone.parameter_groups()["norm"][0].add_(0.1)
    safetensors.write(student, tmp_path / "export")
    trained = SideBySide(load_student(tmp_path / "export"))
    assert trained.modes[-1] == STUDENT
    before, after = trained(PIXELS, parse_classes(CLASSES), [FULL, STUDENT], 100)
    assert before.rows != after.rows


@pytest.mark.parametrize(
    ("classes", "modes", "side", "message"),
    [
        ("a; b", [], 64, "No mode"), ("a; b", ["x"], 64, "'x' is not a mode"), ("ship; plain", [FULL], 64, "ship"),
        ("a; b", [FULL], 0, "from 1 to 512"), ("a; b", [FULL], 10**9, "from 1 to 512"),
    ],
)  # fmt: skip
def test_values_that_are_rejected(classes: str, modes: list[str], side: int, message: str, tiny: SideBySide) -> None:
    with pytest.raises(UserError, match=message):
        tiny(PIXELS, parse_classes(classes), modes, side)
