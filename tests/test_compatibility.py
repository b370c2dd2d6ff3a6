"""Tests that a cache, a run and configurations of version 0.1 (tests/data/version_0.1, commit 0269bb7) are read."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import spar_lightning as spar
from spar_lightning.cli import main
from spar_lightning.feature_cache.manifest import upgraded
from tests.any_words import SmallCLIP

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "older"
    shutil.copytree(Path(__file__).parent / "data" / "version_0.1", folder)
    monkeypatch.chdir(folder)
    return folder


def shards(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = sorted(folder.rglob("*.h5"))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_a_run_continues_from_its_checkpoint_and_its_cache(older: Path, capsys: Capture) -> None:
    before = shards(older / "cache")
    assert len(before) == 2
    args = ["--config", "run/config.yaml", "--run_dir", "run", "--resume", "auto", "--trainer.max_epochs", "2"]
    assert main(["fit", *args]) == 0
    assert shards(older / "cache") == before  # neither features nor activations are computed again
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 12
    written = yaml.safe_load(Path("run/config-resume-1.yaml").read_text())
    assert written["model"]["patch_fit"] == "aligned" and written["data"]["init_args"]["cache_activations"] is True
    assert written["model"]["refine"]["init_args"]["preset"] == "spar"
    assert main(["cache", "verify", "cache"]) == 0
    assert "prefix-1 are intact" in capsys.readouterr().out


def test_a_student_is_loaded(older: Path) -> None:
    (older / "clip.safetensors").unlink()  # the initial weights; the checkpoint has the trained ones
    segmenter = spar.load("run")
    assert segmenter.config.patch_fit == "aligned" and segmenter.config.refine is not None
    assert segmenter.config.refine.identity()["gamma"] == 10.0
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"student.{name}"], t) for name, t in segmenter.backbone.state_dict().items())
    assert segmenter.features("photos/0.png").shape == (5, 6, 32)
    for source in ("run", "run/checkpoints/last.ckpt"):  # also with the run's own configuration passed explicitly
        assert spar.load(source, config="run/config.yaml", refine=None, stride=None).config.refine is None


def test_what_a_user_wrote_names_the_new_key(older: Path, capsys: Capture) -> None:
    for block, key, new in (
        ("model", "geometry", "patch_fit"),
        ("model", "refine", "preset: spar"),
        ("data", "prefix", "cache_activations"),
    ):
        assert main(["fit", "--config", "mine.yaml"]) == 2
        error = capsys.readouterr().err
        assert "mine.yaml" in error and key in error and new in error
        content = yaml.safe_load(Path("mine.yaml").read_text())
        del content[block].get("init_args", content[block])[key]
        Path("mine.yaml").write_text(yaml.safe_dump(content))


def test_caches_know_a_class_by_its_family_not_its_module() -> None:
    moved = type("SmallCLIP", (SmallCLIP,), {"__module__": "elsewhere"})
    declared = type("Renamed", (SmallCLIP,), {"family": "SmallCLIP"})
    torch.manual_seed(0)
    plain = SmallCLIP()
    for cls in (moved, declared):
        other = cls()
        other.load_state_dict(plain.state_dict())
        assert other.identity() == plain.identity()
    older = {"teacher": {"backbone": "tests.any_words.SmallCLIP", "weights": "x"}, "seed": 0}
    assert upgraded(older) == {"teacher": {"family": "SmallCLIP", "weights": "x"}, "seed": 0}
