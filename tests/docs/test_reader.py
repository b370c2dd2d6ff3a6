"""README, getting started, tutorials and notebook, run as a reader runs them: in an empty folder, block by block."""

import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from spar_lightning.cli import main
from spar_lightning.datasets.scene_renderer import render
from tests.conftest import ROOT
from tests.docs.pages import Block, blocks

TUTORIALS = ROOT / "docs" / "tutorials"
# Lines that need the repository: CI runs them first.
INSTALL = re.compile(r'pip install -e \.( && )?|pip install -e "\.\[test\]" && pytest|pip install -e "\.\[docs\]".*')
# 4 of 16 epochs: only the numbers of the complete training differ, which takes minutes.
FIT, SHORT = "spar fit --config quickstart", "--trainer.max_epochs 4"


def reader(folder: Path) -> dict[str, str]:
    """Return the environment of a reader: a new virtual environment that also sees the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    # Before Python 3.12, a new environment has an old setuptools, which would hide that of this one.
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # Editable installs of this environment are .pth files, so they are processed as well.
    (Path(site) / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n{ROOT}\n")
    for name, module in (("spar", "spar_lightning"), ("pytest", "pytest")):
        script = folder / "venv" / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {python} -m {module} "$@"\n')
        script.chmod(0o755)
    path = f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # One thread: other tests run at the same time, and with two the quickstart would take twice as long.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "HF_HUB_OFFLINE": "1"}  # 0: no isolation
    return {**os.environ, **offline, "PATH": path, "OMP_NUM_THREADS": "1", "SPAR_CACHE": str(folder / "text")}


def follow(steps: list[Block], folder: Path, env: dict[str, str], skip: str = "") -> str:
    """Do what a page says: save files, run shell and Python blocks. Return what was printed."""
    printed = ""
    for step in steps:
        if step.file and step.language in ("python", "yaml", "toml"):
            (folder / step.file).parent.mkdir(exist_ok=True)
            (folder / step.file).write_text(step.code)
            continue
        if step.language not in ("bash", "python"):
            continue
        lines = [line for line in step.code.splitlines() if not (skip and re.search(skip, line))]
        code = "\n".join(lines)
        command = ["bash", "-e", "-c", code] if step.language == "bash" else ["python", "-c", code]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        printed += done.stdout
    return printed


@pytest.mark.slow
def test_readme_and_getting_started(tmp_path: Path) -> None:
    env = reader(tmp_path)
    (folder := tmp_path / "empty").mkdir()

    def steps(page: Path) -> list[Block]:
        return [replace(b, code=INSTALL.sub("", b.code).replace(f"{FIT}\n", f"{FIT} {SHORT}\n")) for b in blocks(page)]

    printed = follow(steps(ROOT / "README.md"), folder, env)
    assert SHORT in "".join(b.code for b in steps(ROOT / "README.md")) and "single pass, after (SPAR)" in printed
    assert (folder / "runs" / "quickstart" / "plots" / "predictions.png").exists()
    # Its first commands are those of the README.
    page = ROOT / "docs" / "getting_started.md"
    assert f"{FIT}\n" in page.read_text()
    follow(steps(page), folder, env, skip=rf"^{FIT} {SHORT}$|^spar doctor$")
    assert len(list((folder / "out" / "overlays").iterdir())) == 100


@pytest.mark.slow
def test_tutorial_your_images(tmp_path: Path) -> None:
    env = reader(tmp_path)
    (folder := tmp_path / "empty").mkdir()
    printed = follow(blocks(TUTORIALS / "your_images.md"), folder, env)
    assert "40 images to do" in printed
    page = (TUTORIALS / "your_images.md").read_text()
    for row in ("single pass, before", "sliding window (teacher)", "single pass, after (SPAR)"):
        shown, found = (float(re.search(rf"\| {re.escape(row)} +\| ([\d.]+)", text)[1]) for text in (page, printed))  # type: ignore[index]
        assert abs(shown - found) < 3  # another CPU rounds differently, and training amplifies it
    assert len(list((folder / "out" / "overlays").iterdir())) == 6
    assert len(list((folder / "runs" / "evaluate").iterdir())) == 2


@pytest.mark.slow
def test_tutorial_plugin(tmp_path: Path) -> None:
    env = reader(tmp_path)
    (folder := tmp_path / "empty").mkdir()
    for i in range(4):
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(render(seed=7, index=i, height=300, width=200 + 40 * i).image).save(
            folder / "photos" / f"{i}.jpg"
        )
    printed = follow(blocks(TUTORIALS / "plugin.md"), folder, env)
    assert "MyViT" in printed and "my-vit 0.1" in printed and "FAILED" not in printed
    assert (folder / "runs" / "vit" / "checkpoints" / "last.ckpt").exists()


def test_the_template_of_the_plugin_passes_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (template,) = (b for b in blocks(TUTORIALS / "plugin.md") if b.file == "my_vit.py")
    (tmp_path / "my_vit.py").write_text(template.code)
    monkeypatch.chdir(tmp_path)
    assert main(["backbones", "check", "my_vit.MyViT"]) == 0
    out = capsys.readouterr().out
    assert out.count("passed") > 10 and "FAILED" not in out


@pytest.mark.slow
def test_notebook(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
