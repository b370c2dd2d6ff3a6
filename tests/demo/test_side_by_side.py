"""Segmentation in several modes: results are those of the segmenter, and what visitors send is checked."""

import io
import zlib
from pathlib import Path
from struct import pack

import pytest
import torch
from PIL import Image

from spar_lightning.datasets.scene_renderer import render
from spar_lightning.demo.side_by_side import FULL, MOST_BYTES, SLIDING, STUDENT, WINDOWED, SideBySide
from spar_lightning.errors import UserError
from spar_lightning.export import safetensors
from spar_lightning.segmentation.prompts import parse_classes
from spar_lightning.student import load_student

CLASSES = "red dot; blue dot; rest: plain, grain, waves, checks"


@pytest.fixture(scope="module")
def tiny() -> SideBySide:
    return SideBySide(load_student("tiny"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(render(3, 0, 96, 130).image).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def chunk(kind: bytes, data: bytes) -> bytes:
    return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """Return a PNG of a few bytes that claims to have side x side pixels."""
    header = pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_modes_are_those_of_the_segmenter(tiny: SideBySide, photo: Path) -> None:
    assert tiny.modes == [FULL, WINDOWED, SLIDING]
    panels = tiny(photo, CLASSES, tiny.modes, 100)
    for panel, settings in zip(panels, ({}, {"attention": "windowed"}, {"inference": "sliding"}), strict=True):
        student = load_student("tiny", inference=settings)
        labels, scores = student.segmenter(parse_classes(CLASSES), 100)(photo, True)
        for i, (_, area, score) in enumerate(panel.rows):
            mask = labels == i
            assert area == pytest.approx(mask.float().mean().item())
            if mask.any():
                assert score == pytest.approx(scores[i][mask].mean().item(), abs=1e-6)
        assert panel.seconds > 0 and panel.colors.size == (130, 96) and panel.picture.width >= 130
    assert [label for label, *_ in panels[0].rows] == ["red dot", "blue dot", "rest"]
    assert panels[0].colors.tobytes() != panels[2].colors.tobytes()


def test_a_trained_network_has_a_fourth_mode(photo: Path, tmp_path: Path) -> None:
    student = load_student("tiny")
    (tmp_path / "export").mkdir()
    with torch.no_grad():
        student.backbone.parameter_groups()["norm"][0].add_(0.1)
    safetensors.write(student, tmp_path / "export")
    trained = SideBySide(load_student(tmp_path / "export"))
    assert trained.modes[-1] == STUDENT
    before, after = trained(photo, CLASSES, [FULL, STUDENT], 100)
    assert before.rows != after.rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as an image: the file is empty"), (b"nothing", "cannot be read as an image"),
        (bomb(30_000), "30000 x 30000 pixels"), (bomb(10_000), "10000 x 10000 pixels. At most 40 million"),
        (bomb(200), "cannot be read as an image"), (b"\0" * (MOST_BYTES + 1), "The file has 20 MiB. At most 20 MiB"),
    ],
    ids=["empty", "text", "huge_bomb", "bomb", "truncated", "large"],
)  # fmt: skip
def test_files_that_are_rejected(content: bytes, message: str, tiny: SideBySide, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        tiny(tmp_path / "a.png", CLASSES, [FULL], 64)
    assert str(tmp_path) not in str(caught.value)


def test_a_truncated_photograph(tiny: SideBySide, photo: Path) -> None:
    buffer = io.BytesIO()
    Image.open(photo).save(buffer, "jpeg")
    photo.write_bytes(buffer.getvalue()[:1000])
    with pytest.raises(UserError, match="cannot be read as an image"):
        tiny(photo, CLASSES, [FULL], 64)


@pytest.mark.parametrize(
    ("classes", "modes", "message"),
    [
        ("", [FULL], "class"), ("; ;", [FULL], "class"), (CLASSES, [], "No mode"), ("ship; plain", [FULL], "ship"),
        ("; ".join(f"plain {i}" for i in range(101)), [FULL], "more than 100 class names"),
    ],
)  # fmt: skip
def test_words_that_are_rejected(classes: str, modes: list[str], message: str, tiny: SideBySide, photo: Path) -> None:
    with pytest.raises(UserError, match=message):
        tiny(photo, classes, modes, 64)


def test_no_image(tiny: SideBySide) -> None:
    with pytest.raises(UserError, match="image is missing"):
        tiny(None, CLASSES, [FULL], 64)
