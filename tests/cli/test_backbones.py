"""Tests of `spar backbones`, and of a plugin package that is installed, found, checked and trained."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.backbones.registry import find_backbone, package_of, plugins
from spar_lightning.cli import main
from tests.conftest import ROOT, Finished, environment

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the installed example plugin and a plugin that cannot be imported."""
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copytree(ROOT / "examples" / "plugin", folder / "source")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "broken_vit.py").write_text("import a_package_that_nobody_has\n")
    (broken / "pyproject.toml").write_text(
        '[project]\nname = "broken-vit"\nversion = "0.7"\n[tool.setuptools]\npy-modules = ["broken_vit"]\n'
        '[project.entry-points."spar_lightning.backbones"]\nBrokenViT = "broken_vit:BrokenViT"\n'
    )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(folder / "site"), str(folder / "source"), str(broken)], check=True)
    return folder / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the plugins of `site` available in this process."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    plugins.cache_clear()
    yield
    plugins.cache_clear()


@pytest.fixture
def run(site: Path, tmp_path: Path) -> Callable[..., Finished]:
    """Return a function that runs `spar` with the plugins of `site` in a new process."""

    def run(*args: str) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "spar_lightning", *args],
            capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**environment(), "PYTHONPATH": str(site)},
        )  # fmt: skip
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.mark.usefixtures("installed")
def test_plugins_are_listed_and_a_broken_one_breaks_nothing(capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["backbones"]) == 0
    rows = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert rows["TimmViT"] == "TimmViT spar_timm_vit.TimmViT spar-timm-vit 0.1 224 16 512 ok"
    assert rows["SigLIP2"].endswith(" 512 16 768 ok")
    assert "broken: ModuleNotFoundError: No module named 'a_package_that_nobody_has'" in rows["BrokenViT"]
    assert "plugin BrokenViT of broken-vit 0.7 cannot be used: ModuleNotFoundError" in caplog.text


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "args", [["fit", "--model.backbone", "BrokenViT", "--data", "RenderedScenes"], ["backbones", "show", "BrokenViT"]]
)
def test_a_broken_plugin_asked_for_by_name_tells_its_error(args: list[str], capsys: Capture) -> None:
    assert main(args) == 2
    assert "No module named 'a_package_that_nobody_has'" in capsys.readouterr().err


@pytest.mark.usefixtures("installed")
def test_the_example_keeps_the_contract(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the text encoder is not downloaded
    code = main(["backbones", "check", "TimmViT"])
    out = capsys.readouterr().out
    assert code == 0 and "FAILED" not in out and out.count("passed") > 10, out
    assert package_of(find_backbone("TimmViT")) == "spar-timm-vit 0.1" and package_of(Tiny) is None


@pytest.mark.slow
def test_the_example_trains_two_steps(run: Callable[..., Finished], photos: str, tmp_path: Path) -> None:
    done = run(
        "fit", "--model.backbone", "TimmViT", "--model.stride", "96", "--data", "SA1B", "--data.shards", photos,
        "--data.augmentation.scale", "[352,288]", "--data.augmentation.min_side", "128", "--trainer.max_epochs", "1",
        "--trainer.accelerator", "cpu", "--run_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "class_path: spar_timm_vit.TimmViT" in (tmp_path / "run" / "config.yaml").read_text()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


class Patch14(Tiny):
    """Backbone with patches of 14 pixels and random weights."""

    patch_size, window = 14, 56

    def __init__(self) -> None:
        super().__init__(None)


def test_a_patch_of_14_pixels_trains_by_default(photos: str, tmp_path: Path) -> None:
    arguments = [
        "fit", "--model.backbone", "tests.cli.test_backbones.Patch14", "--model.stride", "56", "--data", "SA1B",
        "--data.shards", photos, "--trainer.max_epochs", "1", "--trainer.max_steps", "1",
        "--trainer.accelerator", "cpu", "--run_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(arguments) == 0


def test_show_prints_groups_with_counts(capsys: Capture) -> None:
    assert main(["backbones", "show", "SigLIP2"]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[4:]}
    assert rows["blocks.11"] == "7.09" and rows["pos_embed"] == "0.79" and rows["patch_embed"] == "0.59"
    assert rows["all"] == "93.52"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["show"], "Pass a backbone: spar backbones show NAME"),
        (["show", "Siglip"], "Did you mean SigLIP2? Allowed: "),
        (["show", "no.such.Class"], "Unknown backbone 'no.such.Class'"),
        (["show", "pathlib.Path"], "pathlib.Path"),
        (["show", "SigLIP2", "--model", "ViT-B-61"], "'ViT-B-61'"),
        (["show", "Tiny", "--size", "3"], "Tiny: unrecognized arguments: --size 3"),
        (["list", "Tiny"], "Tiny"),
    ],
)
def test_mistakes_are_sentences(args: list[str], sentence: str, capsys: Capture) -> None:
    assert main(["backbones", *args]) == 2
    assert sentence in capsys.readouterr().err


def test_check_fails_a_broken_backbone(capsys: Capture) -> None:
    assert main(["backbones", "check", "tests.testing.test_checks.Awake"]) == 1
    captured = capsys.readouterr()
    assert "FAILED  stays_in_eval_mode: AssertionError: in train mode" in captured.out
    assert f"{ROOT}/tests/testing/test_checks.py:" in captured.out
    assert "Awake" in captured.err


def test_check_with_a_reference_as_json(capsys: Capture) -> None:
    reference = ["--reference", "tests.testing.test_broken.original"]
    for name, code in (("SmallRope", 0), ("RopeCut", 1)):
        assert main(["backbones", "check", f"tests.testing.test_broken.{name}", "--json", *reference]) == code
        results = {result["check"]: result for result in json.loads(capsys.readouterr().out)}
        assert results["equals_its_reference"]["status"] == ("failed" if code else "passed")
        assert results["text_embeddings_are_valid"]["status"] == "skipped"
        assert sum(result["status"] == "failed" for result in results.values()) == code
    assert "check positions" in results["equals_its_reference"]["message"]
    assert main(["backbones", "check", "Tiny", "--reference", "tests.testing.no_such.function"]) == 2
    assert "--reference tests.testing.no_such.function" in capsys.readouterr().err


def test_one_cause_is_told_once(capsys: Capture) -> None:
    assert main(["backbones", "check", "tests.testing.test_broken.WrongWidth"]) == 1
    out = capsys.readouterr().out
    assert out.count("normalized_shape") == 1 and out.count("the same error as attributes_are_consistent") >= 5


class Copies(Tiny):
    """Backbone whose constructor copies weights, which is impossible on the meta device."""

    def __init__(self) -> None:
        super().__init__(None)
        self.head.weight.data.copy_(torch.zeros(128, 128, device="meta" if self.head.weight.is_meta else "cpu").cpu())


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_constructor_that_needs_values(capsys: Capture) -> None:
    assert main(["backbones", "show", "tests.cli.test_backbones.Copies"]) == 0
    assert "window 64 px" in capsys.readouterr().out
    assert main(["backbones"]) == 0
    rows = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert rows["Copies"].endswith("64 8 128 ok")
