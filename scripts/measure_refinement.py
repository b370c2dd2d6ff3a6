"""Measure LPOSS and AnyUp, sweep Tiny over strides and areas, and write docs/refinement.md with its figures.

    spar fit --config configs/quickstart.yaml                     # train the student that is measured, a few minutes
    python scripts/measure_refinement.py                          # measure runs/quickstart, about 15 minutes
    python scripts/measure_refinement.py --run runs/other --scenes data/scenes/seed-1 --out /tmp/refinement.md

Results are written by `spar evaluate` to runs/refinement. Results that exist are not measured again.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from spar_lightning.cli import main as spar
from spar_lightning.evaluation.report import read
from spar_lightning.evaluation.timing import Peak
from spar_lightning.formatting import markdown
from spar_lightning.refinement import LPOSS, AnyUp
from spar_lightning.segmentation.label_map import Thresholds, label_map
from spar_lightning.segmentation.similarity import GuidedMaps

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "spar_lightning" / "configs" / "quickstart.yaml"
SMALL, LARGE = "scenes_64", "scenes_192"
WAYS = {
    "single pass, before": [],
    "sliding window (teacher)": ["--inference", "sliding"],
    "single pass, after (SPAR)": ["--weights"],
}
REFINEMENTS = {
    "none": ["null"],
    "none, on the patch grid": [
        "LPOSS",
        "--refine.alpha",
        "0",
    ],  # the input of LPOSS: with alpha 0, neighbors have no influence
    "LPOSS, gamma 1": ["LPOSS"],
    "LPOSS, gamma 3": ["LPOSS", "--refine.gamma", "3"],
    "LPOSS, gamma 10": ["LPOSS", "--refine.preset", "spar"],
}
STRIDES, AREAS = "64,48,32,24,16,12,8", "64,96,128,160,192,256"
SIZES = ((672, 896), (1024, 2048))  # Pascal VOC and Cityscapes in the paper's protocol, multiples of 16
NAMES, CHANNELS, PATCH = 150, 768, 16
LIMIT = 4096  # peak memory of the process in MiB


def evaluate(run: Path, scenes: Path, out: Path, *more: str) -> None:
    """Run `spar evaluate` with the configuration of a run."""
    args = ["evaluate", "--config", str(run / "config.yaml"), "--data.root", str(scenes.parent), *more]
    if spar([*args, "--out", str(out)]):
        sys.exit(f"spar {' '.join(args)} failed.")


def scores(run: Path, scenes: Path, results: Path) -> str:
    """Return a table with one row per mode of inference and refinement."""
    lines = [["inference", "refinement", "mIoU at the window's size", "mIoU at 3x the window", "ms per image (3x)"]]
    for way, options in WAYS.items():
        for title, refine in REFINEMENTS.items():
            if title == "none, on the patch grid" and "sliding" not in way:
                continue  # a single pass is always on the patch grid
            given = [*options, str(run / "checkpoints" / "last.ckpt")] if options == ["--weights"] else options
            out = results / f"{way} {title}".replace(", ", "-").replace(" ", "_")
            evaluate(run, scenes, out, *given, "--refine", *refine)
            found = read(out)["benchmarks"]
            miou = [f"{found[name]['mIoU']:.1f}" for name in (SMALL, LARGE)]
            lines.append([way, title, *miou, f"{found[LARGE]['ms_per_image']:.1f}"])
    return markdown(lines)


@torch.no_grad()
def work(what: str, height: int, width: int) -> None:
    """Refine random maps of an image; print the peak memory of the process, its value before, and the seconds."""
    torch.manual_seed(0)
    maps, upsampler = torch.rand(NAMES, height // PATCH, width // PATCH), AnyUp(None)
    features, image = torch.randn(height // PATCH, width // PATCH, CHANNELS), torch.rand(3, height, width)
    memory, start = Peak(torch.device("cpu")), time.perf_counter()
    before = memory.mebibytes()
    if what == "LPOSS":
        LPOSS()(features, maps, PATCH)
    elif what == "AnyUp":
        label_map(GuidedMaps(upsampler, image, maps), torch.arange(NAMES), (height, width), Thresholds())
    print(memory.mebibytes(), before, time.perf_counter() - start)


def costs() -> str:
    """Return a table with one row per refinement and size, each measured in a separate process."""
    lines = [
        ["refinement", "image", "peak of the process, MiB", "before it, MiB", "seconds", "the published mask, MiB"]
    ]
    for what in ("AnyUp", "LPOSS"):
        for height, width in SIZES:
            command = [sys.executable, __file__, "--work", what, str(height), str(width)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            highest, before, seconds = (float(number) for number in out.split())
            if highest > LIMIT:
                sys.exit(f"{what} takes {highest:.0f} MiB at {height} x {width}. Allowed are {LIMIT} MiB.")
            mask = height * width * (height // PATCH) * (width // PATCH) / 2**20  # booleans
            row = [what, f"{height} x {width}", f"{highest:.0f}", f"{before:.0f}", f"{seconds:.1f}"]
            lines.append([*row, f"{mask:.0f}" if what == "AnyUp" else "-"])
    return markdown(lines)


def sweep(run: Path, scenes: Path, results: Path, pictures: Path) -> tuple[str, str]:
    """Run the sweeps, copy their figures to the folder of the page, and return the tables by stride and by area."""
    more = ["--benchmarks", str(scenes / LARGE), "--weights", str(run), "--inference", "sliding"]
    evaluate(run, scenes, results / "sweep", *more, "--strides", STRIDES, "--sweep", AREAS)
    for figure in ("strides", "areas"):
        for suffix in ("png", "svg"):
            shutil.copy(results / "sweep" / f"{figure}.{suffix}", pictures / f"quickstart_{figure}.{suffix}")
    first, second = (results / "sweep" / "sweep.md").read_text().split("mIoU and time by the area")
    return tuple(part[part.index("|") :].strip() for part in (first, second))  # type: ignore[return-value]  # two


def page(facts: dict[str, Any]) -> str:
    """Return the text of docs/refinement.md."""
    path = Path("/proc/cpuinfo")
    models = [line.split(": ", 1)[1] for line in path.read_text().splitlines() if line.startswith("model name")]
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning"))
    hardware = f"{platform.machine()}, {os.cpu_count()} CPU cores ({models[0]}), no GPU; {packages}, fp32"
    template = (ROOT / "scripts" / "refinement_page.md").read_text()
    return template.format(hardware=hardware, names=NAMES, channels=CHANNELS, strides=STRIDES, areas=AREAS, **facts)


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--scenes", type=Path, default=Path("data/scenes/seed-0"))
    parser.add_argument("--results", type=Path, default=Path("runs/refinement"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "refinement.md")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], int(args.work[1]), int(args.work[2]))
        return
    table = scores(args.run, args.scenes, args.results)
    by_stride, by_area = sweep(args.run, args.scenes, args.results, args.out.parent)
    args.out.write_text(page({"scores": table, "strides_table": by_stride, "areas_table": by_area, "costs": costs()}))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
