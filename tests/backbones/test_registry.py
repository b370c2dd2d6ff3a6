"""Tests of finding backbones by name: broken plugins, several classes of one name, control characters."""

import gc
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from spar_lightning.backbones import Tiny, registry
from spar_lightning.backbones.registry import GROUP, PluginError, find_backbone, plugins
from spar_lightning.cli import main
from spar_lightning.errors import UserError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Install broken plugins: one has the name of a built-in backbone, one colors the terminal, one exits."""
    (tmp_path / "hostile_vit.py").write_text("raise ImportError('\\x1b[31mred\\nsecond line')")
    (tmp_path / "leaving_vit.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    entries = [
        EntryPoint("Tiny", "no_such_package:Tiny", GROUP),
        EntryPoint("\x1b[2JHostile", "hostile_vit:ViT", GROUP),
        EntryPoint("Leaving", "leaving_vit:ViT", GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    plugins.cache_clear()
    yield
    plugins.cache_clear()


@pytest.mark.usefixtures("broken")
def test_a_broken_plugin_does_not_block_a_backbone_of_its_name(capsys: Capture) -> None:
    assert find_backbone("Tiny") is Tiny and find_backbone("tiny") is Tiny
    assert main(["backbones", "show", "Tiny"]) == 0
    for name in ("Leaving", "no_such_package.Tiny"):
        with pytest.raises(PluginError, match=name):
            find_backbone(name)


@pytest.mark.usefixtures("broken")
def test_control_characters_do_not_reach_the_terminal(capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["backbones"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out + caplog.text and r"\x1b[2JHostile" in out and r"\x1b[31mred second line" in out
    names = [line.split()[0] for line in out.splitlines()]
    assert names.count("SigLIP2") == 1 and names.count("Leaving") == 1


def test_two_classes_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("TINY", (Tiny,), {"__module__": "other_package"})
    monkeypatch.setattr(registry, "subclasses", lambda base: [Tiny, other])
    with pytest.raises(UserError, match=r"spar_lightning\.backbones\.tiny\.Tiny, other_package\.TINY"):
        find_backbone("Tiny")


def test_a_plugin_is_imported_when_its_name_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "late_vit.py").write_text("from spar_lightning.backbones import Tiny\n\nclass LateViT(Tiny): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("LateViT", "late_vit:LateViT", GROUP)])
    plugins.cache_clear()
    try:
        assert find_backbone("lateVIT").__module__ == "late_vit"
    finally:
        del sys.modules["late_vit"]
        plugins.cache_clear()
        gc.collect()  # classes are listed until they are deleted
