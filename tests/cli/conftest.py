"""Fixtures for evaluation tests: small copies of the six benchmarks, and networks that encode any class name."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

from spar_lightning.cli import main
from tests import any_words, fake_benchmarks  # noqa: F401 - any_words adds the small CLIP to open_clip


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with all bundled benchmarks; one image is six times as wide as high."""
    root = tmp_path_factory.mktemp("benchmarks")
    fake_benchmarks.all_ten(root, [(24, 36), (40, 30), (16, 96)])
    fake_benchmarks.training(root, [(96, 128), (128, 96)])
    fake_benchmarks.instances(root)
    for what in ("context", "context459", "ade847"):
        assert main(["evaluate", "--prepare", what, "--root", str(root)]) == 0
    return root


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of an open_clip weight file with both towers of a small CLIP."""
    path = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    torch.manual_seed(3)
    save_file(open_clip.create_model("ViT-Ti-16-test").state_dict(), path)
    return str(path)


@pytest.fixture
def config(tmp_path: Path, clip: str) -> Callable[[str], list[str]]:
    """Return a function that makes the arguments of an evaluation with a given test backbone."""

    def arguments(backbone: str) -> list[str]:
        path = tmp_path / f"{backbone}.yaml"
        chosen = {"class_path": f"tests.any_words.{backbone}"}
        weights = {"init_args": {"pretrained": clip}} if backbone == "SmallCLIP" else {}
        model = {"backbone": {**chosen, **weights}, "templates": ["{}"], "stride": 64}
        data = {"class_path": "spar_lightning.datamodules.SA1B", "init_args": {"shards": "none.tar"}}
        path.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": {"accelerator": "cpu"}}))
        return ["evaluate", "--config", str(path)]

    return arguments


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a separate cache of text embeddings for each test."""
    monkeypatch.setenv("SPAR_CACHE", str(tmp_path / "cache"))
