"""Tests of Table 1: its numbers on the page, marks of measured results, and the script that measures all rows."""

import json
import os
import shlex
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spar_lightning.cli import main
from spar_lightning.evaluation.benchmark_config import SETS, read, shipped
from spar_lightning.evaluation.paper_table import PaperRow, paper_rows
from spar_lightning.files.hashing import hash_json
from spar_lightning.refinement import LPOSS
from spar_lightning.segmentation.prompts import prompt_templates
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "paper.md").read_text()
SCRIPT = ROOT / "scripts" / "reproduce_paper.sh"
NAMES = SETS["paper6"]


def script(*args: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables, **({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})}
    return subprocess.run(["bash", str(SCRIPT), *args], capture_output=True, text=True, env=environment)


def test_numbers_are_those_of_the_page() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if " | " in line]
    on_page = {line[0]: line[1:8] for line in lines if len(line) == 9}
    for row in paper_rows().values():
        assert on_page[row.title] == [f"{row.miou[name]:.1f}" for name in (*NAMES, "Mean6")]
        mean = statistics.fmean(row.miou[name] for name in NAMES)
        assert abs(mean - row.miou["Mean6"]) < 0.11  # rounding of the paper


def test_the_script_has_the_commands_of_the_page() -> None:
    printed = script("--dry-run", "/data/benchmarks", "results").stdout.splitlines()
    section = PAGE.split("## Table 1")[1].split("## Figure 1")[0]
    on_page = [line for line in section.splitlines() if line.startswith("spar evaluate --config")]
    rows = list(paper_rows())
    assert len(printed) == len(rows) + 1 and shlex.split(printed[-1])[2:] == ["--check_paper", "results"]
    for name, command, line in zip(rows, printed, on_page, strict=False):
        assert shlex.split(command) == [*shlex.split(line), "--out", f"results/{name}"]


def test_the_script_continues_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "spar").write_text(
        '#!/bin/sh\necho "$@" >> "$LOG"\ncase "$*" in *openclip*) exit 2;; *stop*) exit 130;; esac\n'
    )
    (tmp_path / "spar").chmod(0o755)
    log = tmp_path / "log"
    variables = {"LOG": str(log), "ROWS": "*-spar", "OPENCLIP": "open clip.ckpt"}
    done = script("/data", "out", "--max_images", "1", path=tmp_path, **variables)
    assert done.returncode == 1 and "Failed: openclip-spar" in done.stderr
    ran = log.read_text().splitlines()
    assert len(ran) == 4 and ran[-1] == "evaluate --check_paper out"
    assert all("--max_images 1" in line and "--root /data" in line for line in ran[:3])
    assert "--weights open clip.ckpt" in ran[1]
    log.unlink()
    stopped = script("/data", "stop", path=tmp_path, LOG=str(log), ROWS="*")
    assert stopped.returncode == 130 and len(log.read_text().splitlines()) == 1  # Ctrl-C stops the script
    wrong = script("--help")
    assert wrong.returncode == 2 and "scripts/reproduce_paper.sh BENCHMARKS RESULTS" in wrong.stderr


def write(folder: Path, row: PaperRow, offset: float, **changes: Any) -> None:
    """Write a result of a row, each mIoU by `offset` higher than in the paper."""
    templates = hash_json(prompt_templates("openai_imagenet"), 12)
    protocol: dict[str, Any] = {"inference": row.inference, "precision": "32-true", "templates_sha256": templates}
    if row.inference == "sliding":
        protocol["stride"] = 24
    if row.refine:
        protocol["refine"] = LPOSS(row.refine).identity()
    if row.upsampler:
        protocol["upsampler"] = {"name": row.upsampler, "weights": "1"}
    benchmarks = {
        name: {
            "mIoU": row.miou[name] + offset,
            "images": read(shipped()[name]).expected_images or 5104,
            "shipped": True,
        }
        for name in NAMES
    }
    model = {"family": row.family, "window": row.window, "weights": folder.name}
    content = {"model": model, "protocol": {**protocol, **changes}, "benchmarks": benchmarks}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


def test_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = paper_rows()
    for name, offset in (("siglip2-spar", 0.3), ("siglip2-sliding", -1.5), ("dinov3-single-anyup", 0.0)):
        write(tmp_path / name, rows[name], offset)
    assert main(["evaluate", "--check_paper", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[:20]}
    assert cells["SigLIP2, SPAR"] == [
        f"{row:.1f} {row + 0.3:.1f} =" for row in (47.3, 81.5, 38.4, 23.4, 33.8, 37.2, 43.6)
    ]
    assert all(cell.endswith("~") for cell in cells["SigLIP2, sliding window"])
    assert cells["SigLIP2, single pass"][0] == "36.1" and len(cells) == 20  # not measured
    write(tmp_path / "openclip-spar", rows["openclip-spar"], 9.0)
    assert main(["evaluate", "--check-paper", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count(" ! ") == 7 + 1  # and the legend


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("siglip2-sliding", {"stride": 32}, "stride 32 instead of 24"),
        ("siglip2-single", {"inference": "sliding"}, "inference sliding instead of single"),
        ("siglip2-single", {"attention": {"tile": 2}}, "attention"),
        ("siglip2-spar", {"refine": {"name": "LPOSS"}}, "refine {'name': 'LPOSS'} instead of None"),
        ("siglip2-spar-lposs", {"refine": LPOSS("pretrained").identity()}, "refine {'name': 'LPOSS', 'gamma': 1.0"),
        ("siglip2-spar", {"precision": "bf16-mixed"}, "precision bf16-mixed instead of 32-true"),
        ("siglip2-spar", {"templates_sha256": "0"}, "templates_sha256 0 instead of"),
    ],
)
def test_other_protocols_are_not_compared(
    name: str, change: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / name, paper_rows()[name], 0.0, **change)
    assert main(["evaluate", "--check_paper", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert f"{name}: not comparable: {text}" in shown and shown.count(" ? ") == 7 + 1


def test_results_of_other_networks_and_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = paper_rows()
    for name in ("siglip2-single", "siglip2-spar"):
        write(tmp_path / name, rows[name], 0.0)
        path = tmp_path / name / "results.json"
        content = json.loads(path.read_text())
        content["model"]["weights"] = "same"
        content["benchmarks"]["context60"]["images"] = 5105 if name == "siglip2-single" else 5
        path.write_text(json.dumps(content))
    (tmp_path / "openclip-spar" / "counts").mkdir(parents=True)  # stopped in its first benchmark
    assert main(["evaluate", "--check_paper", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "siglip2-spar: not comparable: weights are those of siglip2-single" in shown
    assert "context60 has 5 of 5104 images" in shown and "openclip-spar: no results yet" in shown
    assert shown.count(" = ") == 7 + 1 and shown.count(" ? ") == 7 + 1


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([str(tmp_path)], [str(tmp_path), "--max_images", "1"]):
        assert main(["evaluate", "--check_paper", *args]) == 2
        assert "--check_paper" in capsys.readouterr().err
    write(tmp_path / "siglip2-spar", paper_rows()["siglip2-spar"], 0.0)
    (tmp_path / "siglip2-spar" / "results.json").write_text("{")
    assert main(["evaluate", "--check_paper", str(tmp_path)]) == 2
    assert "siglip2-spar" in capsys.readouterr().err
