"""Tests of `spar doctor`: each line is ok or says what to do."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from spar_lightning.cli import doctor_checks, doctor_config, main
from spar_lightning.cli.doctor_checks import Finding
from tests.conftest import ROOT, environment

Capture = pytest.CaptureFixture[str]


def test_this_machine_is_well(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    for name in ("torch", "lightning", "torchvision", "cpu", "disk"):
        assert any(line.split()[1] == name for line in lines), name


def test_json_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "timm" else version(name))
    monkeypatch.setattr(doctor_checks, "LITTLE", 2**60)
    assert main(["doctor", "--json"]) == 1
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert not found["timm"]["ok"] and found["timm"]["fix"].startswith("pip install 'timm>=")
    assert not found["disk"]["ok"] and "--run_dir" in found["disk"]["fix"]
    assert "--shm-size" in found["shared memory"]["fix"] and found["torch"]["ok"]


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def absent(name: str) -> str:
        if name in ("timm", "onnxruntime"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", absent)
    found = {finding.name: finding for finding in doctor_checks.packages()}
    assert found["timm"].text == "not installed" and found["timm"].fix is not None
    assert found["onnxruntime"] == Finding("onnxruntime", "not installed, optional")


def test_torchvision_of_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def missing(*_: torch.Tensor) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    found = doctor_checks.torchvision()
    assert "operator torchvision::nms does not exist" in found.text and "more" not in found.text
    assert found.fix is not None and "pip install torch torchvision" in found.fix


def test_torchvision_that_cannot_be_imported(tmp_path: Path) -> None:
    """Lightning imports torchvision, so the check must run before its import."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    done = subprocess.run(
        [sys.executable, "-m", "spar_lightning", "doctor", "--config", "quickstart"],
        capture_output=True, text=True, cwd=tmp_path, env={**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "operator torchvision::nms does not exist" in done.stdout and "not checked" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "spar_lightning", "validate", "--config", "quickstart"],
        capture_output=True, text=True, cwd=tmp_path, env={**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 2 and "Run spar doctor" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert doctor_checks.disk("run_dir", tmp_path / "a" / "b", "elsewhere").fix == "elsewhere"


def test_a_configuration_takes_two_steps(small: list[str], tmp_path: Path, capsys: Capture) -> None:
    args = [*small, "--data.root", str(tmp_path / "scenes"), "--run_dir", str(tmp_path / "run")]
    assert main(["doctor", *args]) == 0
    out = capsys.readouterr().out
    assert "2 steps of Tiny on cpu in " in out and "is empty: spar fit fills it before training" in out
    assert not list(tmp_path.iterdir())  # all files of the check are deleted


def test_a_configuration_with_packs_and_workers(photos: str, tmp_path: Path) -> None:
    found = doctor_config.configuration([
        "--model.backbone", "Tiny", "--data", "SA1B", "--data.shards", photos, "--data.pack_tokens", "4096",
        "--data.augmentation.scale", "[200,160]", "--data.augmentation.min_side", "64",
        "--data.augmentation.multiple", "8", "--trainer.accelerator", "cpu", "--run_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert found[-1].name == "dry run" and found[-1].fix is None, found
    assert found[1] == Finding("cache", "not set: the teacher runs in every step")


def test_a_cache_of_another_configuration(small: list[str], tmp_path: Path, capsys: Capture) -> None:
    args = [*small, "--data.root", str(tmp_path / "scenes")]
    assert main(["cache", *args]) == 0
    assert main(["doctor", *args]) == 0
    assert "12 images with features" in capsys.readouterr().out
    assert main(["doctor", *args, "--model.stride", "64"]) == 1
    assert "teacher.stride" in capsys.readouterr().out


def test_memory_that_is_too_small(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("spar_lightning.distillation.Distillation.training_step", full)
    found = doctor_config.configuration([*small, "--data.root", str(tmp_path / "scenes")])
    assert found[-1].name == "dry run" and "data.batch_size 1" in str(found[-1].fix)


def test_mistakes_of_a_configuration_are_lines(small: list[str], capsys: Capture) -> None:
    for args, sentence in (
        (["--model.stride", "99"], "stride 99"),
        (["--model.strid", "9"], "Did you mean stride?"),
        (["--data.class_path", "spar_lightning.datamodules.SA1B", "--data.shards", "no.tar"], "no.tar"),
    ):
        assert main(["doctor", *small[:2], *args]) == 1
        found = capsys.readouterr()
        assert "FIX   configuration" in found.out and sentence in found.out and "Traceback" not in found.err
    assert main(["doctor", "--model.stride", "9"]) == 2


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        found = doctor_checks.disk("run_dir", path, "set another --run_dir")
        assert found.fix is not None and str(tmp_path / "file") in found.text
    assert doctor_checks.disk("run_dir", tmp_path / "run", "set another --run_dir").text.endswith("free")
