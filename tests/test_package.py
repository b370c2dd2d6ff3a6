"""Tests of the wheel (data files, type information, each module once despite the links), container, lowest versions."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


def built(source: Path, folder: Path) -> set[str]:
    """Build the wheel of a folder and return the names of its files."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("spar_lightning-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    return {name for name in names if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def package() -> set[str]:
    files = (ROOT / "spar_lightning").rglob("*")
    return {p.relative_to(ROOT).as_posix() for p in files if p.is_file() and "__pycache__" not in p.parts}


def test_the_wheel(package: set[str], tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns(*(".git", ".ci", "runs", "data", "*.egg-info", "__pycache__", ".*_cache", "tests"))
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=ignored)
    assert built(tmp_path / "source", tmp_path) == package and "spar_lightning/py.typed" in package


def test_the_files_of_the_container_suffice(package: set[str], tmp_path: Path) -> None:
    """Build the wheel from what the Dockerfile copies, because images cannot be built here."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = [line.split()[1:] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    for *names, place in lines:
        assert set(names) <= allowed
        for name in names:
            target = tmp_path / place.strip("/") / ("" if place.endswith("/") else ".")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, target)
    (tmp_path / "out").mkdir()
    assert built(tmp_path / "source", tmp_path / "out") == package
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r"/source\[([^]]+)\]", (ROOT / "Dockerfile").read_text())
    assert set(installed.split(",")) <= set(extras)


def test_lowest_versions_are_those_of_the_project() -> None:
    """CI installs the versions of .ci/lowest.txt."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = [line for line in (ROOT / ".ci" / "lowest.txt").read_text().splitlines() if not line.startswith("#")]
    tested = dict(line.split("==") for line in lines)
    for text in requirements:
        name, lowest = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", text).groups()  # type: ignore[union-attr]
        assert [int(n) for n in tested[name].split(".")][: lowest.count(".") + 1] == [int(n) for n in lowest.split(".")]
