"""Tests of the header of a weight file: it decides about the network, but not about the code that is run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import spar_lightning as spar
from spar_lightning.backbones import Tiny
from spar_lightning.errors import UserError
from spar_lightning.header import HEADER, PACKAGE, read_header


class Local(Tiny):
    """Backbone that the process has imported."""


def written(path: Path, header: Any) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(Tiny().state_dict(), path, {HEADER: text})
    return path


@pytest.mark.parametrize(
    "header",
    ["{not json", "[" * 100_000, [1, 2], None, 3, "3", {"stride": 3}, {"backbone": 3}, {"backbone": {"class_path": 3}},
     {"backbone": ["Tiny"]}, {"backbone": {"init_args": {}}}, {"backbone": {"class_path": "Tiny", "init_args": [1]}}],
)  # fmt: skip
def test_a_damaged_header_is_a_sentence(header: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.safetensors"):
        spar.load(written(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize(
    "block",
    [
        {"backbone": "evil_module.Thing"},
        {"backbone": {"class_path": "evil_module.Thing"}},
        {"backbone": {"class_path": "Tiny", "init_args": {"part": {"class_path": "evil_module.Thing"}}}},
        {"backbone": "Tiny", "refine": "evil_module.Thing"},
        {"backbone": "Tiny", "refine": {"class_path": "evil_module.Thing"}},
        {"backbone": "spar_lightning.evil_module.Thing"},
    ],
)
def test_a_header_imports_nothing(block: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("class Thing: pass")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"a\.safetensors.*evil_module\.Thing.*config"):
        spar.load(written(tmp_path / "a.safetensors", block))
    assert "evil_module" not in sys.modules


def test_other_settings_are_ignored(tmp_path: Path) -> None:
    """A loss could be a class as well, and training settings have no part in inference."""
    path = written(tmp_path / "a.safetensors", {"backbone": "Tiny", "stride": 16, "loss": "evil_module.Thing", "lr": 1})
    assert read_header(path) == {"backbone": "Tiny", "stride": 16}


def test_the_package_of_a_plugin_is_named(tmp_path: Path) -> None:
    path, block = tmp_path / "a.safetensors", json.dumps({"backbone": "their_vit.TheirViT"})
    save_file(Tiny().state_dict(), path, {HEADER: block, PACKAGE: "their-vit 1.2\n\x1b[31m"})
    with pytest.raises(UserError, match=r"'their_vit\.TheirViT' \(package their-vit 1\.2 \\x1b.*install its package"):
        read_header(path)


@pytest.mark.parametrize(
    "path", ["Tiny", "spar_lightning.backbones.Tiny", "spar_lightning.backbones.tiny.Tiny", f"{__name__}.Local"]
)
def test_known_classes_are_taken(path: str, tmp_path: Path) -> None:
    block = {"backbone": {"class_path": path}, "refine": {"class_path": "spar_lightning.refinement.LPOSS"}}
    file = written(tmp_path / "a.safetensors", block)
    assert isinstance(spar.load(file).backbone, Local if "Local" in path else Tiny)


def test_a_class_of_the_users_own_is_taken_from_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"model: {{backbone: {__name__}.Local}}")
    file = written(tmp_path / "a.safetensors", {"backbone": "evil_module.Thing"})
    assert isinstance(spar.load(file, config=tmp_path / "a.yaml").backbone, Local)


def test_a_file_without_a_header(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors") is None
