"""Exports on the Hugging Face Hub: upload, download in a new process, revisions, offline use, and errors."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from spar_lightning.backbones import OpenCLIP, SigLIP2, Tiny
from spar_lightning.backbones.weights import without_weights
from spar_lightning.cli.lightning_cli import with_run_config
from spar_lightning.files.hub import is_name
from spar_lightning.student import load_student
from tests.files.hub_server import TOKEN, Hub, serving

# Loads an image's features in a process of its own, because huggingface_hub reads its environment when imported.
CODE = """
import sys, json, torch, spar_lightning as spar
from spar_lightning.cli import main
for line in sys.stdin:
    kind, *args = json.loads(line)
    if kind == "features":
        image = torch.arange(3 * 96 * 80).view(3, 96, 80).remainder(256).byte()
        torch.save(spar.load(args[0]).features(image), args[1])
        print("done", flush=True)
    else:
        print("code", main(args), flush=True)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as state:
        yield state


class Fresh:
    """New process with its own cache of the Hub."""

    def __init__(self, hub: Hub, home: Path, token: str | None = TOKEN, offline: bool = False) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.env = {**kept, "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        self.env |= {"HF_TOKEN": token} if token else {}
        self.env |= {"HF_HUB_OFFLINE": "1"} if offline else {}

    def run(self, *lines: list[str]) -> tuple[list[str], str]:
        """Run several calls; return the lines of "done" and "code", and what was printed on stderr."""
        given = "".join(json.dumps(line) + "\n" for line in lines)
        done = subprocess.run(
            [sys.executable, "-c", CODE], input=given, capture_output=True, text=True, timeout=300, env=self.env
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith(("done", "code"))], done.stderr


@pytest.fixture(scope="module")
def published(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the shipped Tiny with --push, and return the folder of the export."""
    folder = tmp_path_factory.mktemp("push")
    out = str(folder / "export")
    pushed = ["command", "export", "--weights", "tiny", "--to", "safetensors", "--out", out, "--push", "org/tiny"]
    codes, errors = Fresh(hub, folder / "home").run([*pushed, "--private"])
    assert codes == ["code 0"], errors
    return Path(out)


def test_push_uploads_the_export_with_a_model_card(hub: Hub, published: Path) -> None:
    files = hub.commits["org/tiny"][hub.branches["org/tiny"]["main"]]
    assert files == {path.name: path.read_bytes() for path in published.iterdir()}
    assert sorted(files) == ["README.md", "config.json", "student.safetensors"] and "org/tiny" in hub.private
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert head["pipeline_tag"] == "image-segmentation" and head["library_name"] == "spar_lightning"
    assert "spar" in head["tags"]
    assert json.loads(files["config.json"])["backbone"].endswith("Tiny")


def predict(image: Path, name: str) -> list[str]:
    return ["command", "predict", str(image), "--weights", name, "--features", "--out", str(image.parent / "out")]


@pytest.mark.slow
def test_a_new_process_computes_the_same_features_online_and_offline(
    hub: Hub, published: Path, png: Path, tmp_path: Path
) -> None:
    image = torch.arange(3 * 96 * 80).view(3, 96, 80).remainder(256).byte()
    expected = load_student(str(published)).segmenter({}).features(image)
    pinned = hub.branches["org/tiny"]["main"]
    home, found = tmp_path / "home", str(tmp_path / "features.pt")
    names = [f"hf-hub:org/tiny@{pinned}", "hf-hub:org/tiny"]
    codes, errors = Fresh(hub, home).run(*(["features", name, found] for name in names))
    assert codes == ["done", "done"], errors
    assert torch.equal(torch.load(found), expected)

    hub.commit("org/tiny", {"student.safetensors": b"damaged"})
    before = len(hub.requests)
    codes, errors = Fresh(hub, home, offline=True).run(*(["features", name, found] for name in names))
    assert codes == ["done", "done"] and len(hub.requests) == before, errors
    assert torch.equal(torch.load(found), expected)
    codes, errors = Fresh(hub, home).run(["features", names[0], found], predict(png, names[1]))
    assert codes == ["done", "code 2"] and "cannot be read as safetensors" in errors, errors
    hub.branches["org/tiny"]["main"] = pinned


@pytest.fixture
def png(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.slow
def test_failures_are_one_sentence(hub: Hub, published: Path, png: Path, tmp_path: Path) -> None:
    hub.commit("org/gated", {"student.safetensors": b""})
    hub.commit("org/other", {"model.safetensors": b""})
    hub.commit("org/public", {})
    hub.gated.add("org/gated")
    out = str(tmp_path / "export")
    expected = {
        "hf-hub:org/tiny": "you have no access",  # private, and no login
        "hf-hub:org/missing": "does not exist, or you have no access",
        "hf-hub:org/gated": "access has to be requested",
        "hf-hub:org/other": "has no student.safetensors",
        "hf-hub:org/other@v9": "no such revision",
        "hf-hub:tiny": "Allowed: org/name or org/name@revision",
    }
    push = ["command", "export", "--weights", "tiny", "--to", "safetensors", "--out"]
    calls = [predict(png, name) for name in expected]
    calls += [[*push, out, "--push", "org/tiny"], [*push, f"{out}2", "--private"], [*push, f"{out}3", "--push", "tiny"]]
    codes, errors = Fresh(hub, tmp_path / "home", token=None).run(*calls)
    assert codes == ["code 2"] * len(calls) and "Traceback" not in errors, errors
    sentences = [*expected.values(), f"hf upload org/tiny {out}", "--private needs --push", "Allowed: org/name."]
    assert [sentence for sentence in sentences if sentence not in errors] == [], errors

    codes, errors = Fresh(hub, tmp_path / "home").run([*push, f"{out}4", "--push", "org/public", "--private"])
    assert codes == ["code 2"] and "is public" in errors and f"{out}4 --private" in errors, errors
    codes, errors = Fresh(hub, tmp_path / "new", token="hf_reader").run(predict(png, "hf-hub:org/busy"))
    assert codes == ["code 2"] and "answered 503" in errors and "Try again later" in errors, errors
    nowhere = "http://127.0.0.1:9"
    cases = {"HF_HUB_OFFLINE is set": Fresh(hub, tmp_path / "empty", offline=True),
             f"{nowhere} cannot be reached": Fresh(Hub(address=nowhere), tmp_path / "empty")}  # fmt: skip
    for sentence, process in cases.items():
        codes, errors = process.run(predict(png, "hf-hub:org/tiny"))
        assert codes == ["code 2"] and sentence in errors and "Traceback" not in errors, errors


def test_evaluate_reads_the_network_from_the_export(published: Path) -> None:
    option, config, *rest = with_run_config(["--x"], str(published), None)
    assert yaml.safe_load(config)["model"]["backbone"]["class_path"].endswith("Tiny") and (option, rest) == (
        "--config",
        ["--x"],
    )


NAMES = [("a/b", True), ("a/b@v1.0", True), ("a", False), ("a/b/c", False), ("a/", False), ("hf-hub:a/b", False)]


@pytest.mark.parametrize(("text", "valid"), NAMES)
def test_names(text: str, valid: bool) -> None:
    assert is_name(text) is valid


def test_base_model_and_license_of_the_card() -> None:
    with without_weights():
        known = SigLIP2("ViT-B-32-SigLIP2-256", "webli").hub_metadata()
        meta = OpenCLIP("ViT-B-16-quickgelu", "metaclip_400m")  # another license than the tag "meta" of PE-Core
    assert known == {"base_model": "timm/ViT-B-32-SigLIP2-256", "license": "apache-2.0"}
    assert "license" not in meta.hub_metadata() and meta.licence().startswith("Unknown")
    assert Tiny().hub_metadata() == {}
