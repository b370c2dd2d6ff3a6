"""Tests of exports: each library loads its export with the code of the README and computes the student's outputs."""

import copy
import errno
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import spar_lightning as spar
from spar_lightning.backbones import DINOv3Text, OpenCLIP, Tiny
from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.cli import main
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.errors import UserError
from spar_lightning.export import LIBRARIES, ExportError, export
from spar_lightning.export.exporter import recipe_of
from spar_lightning.export.model_card import CARD
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.student import Student

Make = Callable[[str], Student]
PAIRS = [
    *(("open_clip", family) for family in ("SigLIP2", "OpenCLIP")),
    *(("timm", family) for family in ("SigLIP2", "OpenCLIP", "DINOv3Text", "Tiny")),
    *(("transformers", family) for family in ("SigLIP2", "OpenCLIP", "DINOv3Text", "NaFlex")),
]


@pytest.mark.parametrize(("library", "family"), PAIRS)
def test_libraries_give_what_the_student_gives(
    library: str, family: str, student: Make, in_process: None, tmp_path: Path
) -> None:
    found = export(student(family), library, tmp_path / "export")
    assert len(found) == 10 and {each.output for each in found} == {"tokens", "dense"}
    assert len({each.size for each in found}) == 5
    text = (tmp_path / "export" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    recipe = recipe_of(student(family).backbone, library)
    assert code == [recipe.load.lstrip("\n"), recipe.any_size.lstrip("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["full", "windowed", WindowedAttention(positions="windowed")], ids=str)
@pytest.mark.parametrize("family", ["SigLIP2", "OpenCLIP", "DINOv3Text"])  # Tiny: tests/cli/test_docs.py
def test_onnx_at_sizes_that_the_export_never_saw(
    family: str, attention: Any, student: Make, in_process: None, tmp_path: Path
) -> None:
    made = student(family)
    windows = InferenceConfig(attention=attention).windowed
    made = replace(made, backbone=copy.deepcopy(made.backbone).with_attention(windows))
    if isinstance(made.backbone, DINOv3Text):
        del made.backbone.trunk.blocks[3:]  # the smallest model of timm takes half a minute
    found = export(made, "onnx", tmp_path / "export")
    assert len(found) == 5
    assert str(tmp_path).encode() not in (tmp_path / "export" / "student.onnx").read_bytes()
    assert (tmp_path / "export" / "README.md").read_text().count("| dense") == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"reach": 1.25}, {"reach": 1.25, "temperature": "log"}, {"tile": 4, "positions": "windowed"}]
)
def test_onnx_with_windowed_attention(
    settings: dict[str, Any], student: Make, in_process: None, tmp_path: Path
) -> None:
    windows = WindowedAttention(**settings)
    made = replace(student("Tiny"), backbone=student("Tiny").backbone.with_attention(windows))
    assert max(each.largest for each in export(made, "onnx", tmp_path / "export")) < 1e-4


@pytest.mark.parametrize("library", ["timm", "transformers", "open_clip"])
def test_a_library_with_full_attention_is_rejected(library: str, student: Make, tmp_path: Path) -> None:
    windowed = student("OpenCLIP").backbone.with_attention(WindowedAttention())
    with pytest.raises(UserError, match=rf"--to {library}: .*windowed attention.* safetensors, onnx"):
        export(replace(student("OpenCLIP"), backbone=windowed), library, tmp_path / "export")


def test_onnx_rejects_a_large_reach(student: Make, tmp_path: Path) -> None:
    made = replace(student("Tiny"), backbone=student("Tiny").backbone.with_attention(WindowedAttention(reach=5)))
    with pytest.raises(UserError, match="reach"):
        export(made, "onnx", tmp_path / "export")


def test_our_own_file_says_what_it_is_of(student: Make, in_process: None, tmp_path: Path) -> None:
    made = student("Tiny")
    assert {each.largest for each in export(made, "safetensors", tmp_path / "export")} == {0.0}
    image = render(seed=3, index=0, height=64, width=88).image
    with torch.no_grad():
        pixels = made.backbone.normalize(torch.from_numpy(image).permute(2, 0, 1)[None])
        expected = made.backbone(pixels)[0]
    for source in (tmp_path / "export", tmp_path / "export" / "student.safetensors"):
        assert torch.equal(spar.load(source).features(image), expected)


def test_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--weights", "tiny", "--to", "timm", "--out", str(tmp_path / "export")]) == 0
    out = capsys.readouterr().out
    assert out.count("| 0.0e+00") == 10 and "README.md, config.json, model.safetensors" in out
    assert main(["export", "--weights", "tiny", "--to", "timm", "--out", str(tmp_path / "export")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_an_export_that_differs_is_not_handed_over(
    student: Make, in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default of timm, a positional embedding resized with antialiasing, is detected."""
    recipe = LIBRARIES["timm"][Tiny]
    wrong = replace(recipe, any_size=recipe.any_size.replace("align_corners=False", "antialias=True"))
    monkeypatch.setattr("spar_lightning.export.exporter.recipe_of", lambda *_: wrong)
    with pytest.raises(ExportError, match=r"(tokens|dense) at \d+ x \d+ .*1e-04"):
        export(student("Tiny"), "timm", tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_periods_that_are_not_rounded_are_noticed(
    student: Make, in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = LIBRARIES["timm"][DINOv3Text]
    wrong = replace(recipe, load="\n".join(line for line in recipe.load.splitlines() if "periods" not in line))
    monkeypatch.setattr("spar_lightning.export.exporter.recipe_of", lambda *_: wrong)
    with pytest.raises(ExportError, match=r"\d+ x \d+ .*1e-04"):
        export(student("DINOv3Text"), "timm", tmp_path / "export")


def test_a_size_that_becomes_a_number_is_refused(
    student: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = student("Tiny")
    forward = Tiny.forward
    monkeypatch.setattr(Tiny, "forward", lambda tiny, images: forward(tiny, images)[:, : int(images.shape[2]) // 8])
    with pytest.raises(UserError, match=r"Tiny cannot be (exported to ONNX|traced) for all image sizes") as caught:
        export(made, "onnx", tmp_path / "export")
    assert "\n" not in str(caught.value) and "len(images)" in str(caught.value)


def test_small_features_are_compared_in_their_own_scale(
    student: Make, in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of 1e-7 with a relative error of 1 % differ by less than 1e-4."""
    made = student("Tiny")
    head = made.backbone.get_submodule("head")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1e-7)
    exact = export(made, "safetensors", tmp_path / "exact")
    recipe = recipe_of(made.backbone, "safetensors")
    wrong = replace(
        recipe,
        any_size=recipe.any_size
        + "\nplain = dense\n\n\ndef dense(model, images):\n    return 1.01 * plain(model, images)\n",
    )
    monkeypatch.setattr("spar_lightning.export.exporter.recipe_of", lambda *_: wrong)
    with pytest.raises(ExportError, match="standard deviations"):
        export(made, "safetensors", tmp_path / "export")
    assert {each.largest for each in exact} == {0.0}


def test_places_that_do_not_exist(student: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Tiny.*safetensors, timm, onnx"):
        export(student("Tiny"), "open_clip", tmp_path / "export")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
)
def test_a_place_that_cannot_be_written(
    error: Exception, student: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    recipe = replace(LIBRARIES["timm"][Tiny], write=full)
    monkeypatch.setattr("spar_lightning.export.exporter.recipe_of", lambda *_: recipe)
    with pytest.raises(UserError, match=r"--out .*/export .*No space left"):
        export(student("Tiny"), "timm", tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file(student: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "export", tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=re.escape(f"--out {folder}")):
            export(student("Tiny"), "timm", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Mine(Tiny):
    """Backbone that is neither built in nor of a plugin."""


def test_the_readme_imports_a_class_that_load_would_refuse(tmp_path: Path, in_process: None, student: Make) -> None:
    made = student("Tiny")
    block = {"backbone": {"class_path": f"{__name__}.Mine", "init_args": {}}}
    export(replace(made, backbone=Mine(), block=block), "safetensors", tmp_path / "export")
    assert f"import {__name__}" in (tmp_path / "export" / "README.md").read_text()
    assert isinstance(spar.load(tmp_path / "export").backbone, Mine)


@pytest.mark.parametrize(("library", "family"), PAIRS)
def test_the_readme_points_to_the_code_where_it_is(library: str, family: str, student: Make) -> None:
    """The text on image sizes comes before the code."""
    recipe = recipe_of(student(family).backbone, library)
    assert "above" not in recipe.sizes and CARD.index("{sizes}") < CARD.index("{any_size}")


def test_two_activations_in_one_folder_are_refused(student: Make, tmp_path: Path) -> None:
    made = student("OpenCLIP")
    assert isinstance(made.backbone, OpenCLIP)
    made.backbone.quick_gelu = True
    with pytest.raises(UserError, match=r"open_clip.*activation"):
        export(made, "open_clip", tmp_path / "export")


def test_the_card_tells_what_a_run_was_told(student: Make, in_process: None, tmp_path: Path) -> None:
    made = student("DINOv3Text")
    config = {
        "model": {"trainable": ["blocks.-2", "blocks.-1"], "lr": 2e-5},
        "data": {"init_args": {"shards": "/home/me/sa1b/sa_000000.tar", "max_images": 25000}},
        "trainer": {"max_epochs": 10, "precision": "16-mixed"},
    }
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    rows = [{"stage": "after", "miou": {"voc20": 81.234}}]
    (run / "results.json").write_text(json.dumps(rows))
    made = replace(made, run=config, weights=run / "checkpoints" / "best.ckpt")
    made.block["backbone"]["init_args"]["backbone_weights"] = "/home/me/dinov3.pth"
    assert isinstance(made.backbone, DINOv3Text)
    made.backbone.backbone_weights = "/home/me/dinov3.pth"
    export(made, "timm", tmp_path / "export")
    text = (tmp_path / "export" / "README.md").read_text()
    for part in ("blocks.-2, blocks.-1", "25000", "16-mixed", "at the end", "voc20 81.2", "DINOv3 License",
                 "same agreement",
                 "second half of an embedding", "without the bf16 rounding"):  # fmt: skip
        assert part in text, part
    assert "/home/me" not in text and "sa_000000.tar" in text
