"""Measure full and windowed attention, without training, and write docs/methods.md.

    python -m scripts.measure_attention                       # after pretrain_image_level.py; about an hour
    python -m scripts.measure_attention --reuse               # write the page again from finished tables
    python -m scripts.measure_attention --images 2 --seeds 7 --size Tiny --out /tmp/methods.md

The accuracy is that of `Tiny`, and of the network that scripts/pretrain_image_level.py wrote, on synthetic images of
several seeds; students of the latter are trained, too. The cost is that of one pass of SigLIP2 ViT-B/16, with full and
windowed attention in alternation, and its peak memory in separate processes.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.measure_quickstart import FIVE_TIMES, SIZES, measure, results, verdict
from spar_lightning.backbones import Backbone, SigLIP2, Tiny
from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.datamodules.rendered_scenes import VALIDATION
from spar_lightning.datasets.scene_renderer import CLASSES, render
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.timing import Peak
from spar_lightning.formatting import markdown
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter

ROOT = Path(__file__).parents[1]
FULL, TEACHER = "full attention", "sliding window, stride 16 (teacher)"
WIDE = WindowedAttention(reach=1.25, temperature="log", positions="windowed")
MODES = {
    FULL: InferenceConfig(),
    "full, log temperature": InferenceConfig(attention=WindowedAttention(reach=1000, temperature="log")),
    "windowed": InferenceConfig(attention="windowed"),
    "windowed, tile 1": InferenceConfig(attention=WindowedAttention(tile=1)),
    "windowed, tile 4": InferenceConfig(attention=WindowedAttention(tile=4)),
    "windowed, reach 1.25, log temperature, windowed positions": InferenceConfig(attention=WIDE),
    "sliding window, stride 64 (tiling)": InferenceConfig("sliding", stride=64),
    TEACHER: InferenceConfig("sliding", stride=16),
    "sliding window, stride 16, blend hann": InferenceConfig("sliding", stride=16, blend="hann"),
}
SIDES = (64, 192, 320)
GRIDS = {"SigLIP2": ((32, 32), (48, 48), (64, 64), (64, 128), (128, 128)), "Tiny": ((8, 8), (16, 16), (16, 32))}


def accuracy(pretrained: str, seeds: Sequence[int], images: int, distance_images: int) -> str:
    """Return the table of mIoU by mode and size for each seed, and of the distance to the teacher's features."""
    lines = [["single pass with", *(f"{side} px, seeds {', '.join(map(str, seeds))}" for side in SIDES)]]
    lines[0] += [f"share at {side} px" for side in SIDES[1:]] + [f"distance at {side} px" for side in SIDES[1:]]
    segmenters = {name: Segmenter(Tiny(pretrained), CLASSES, config) for name, config in MODES.items()}
    miou: dict[tuple[str, int, int], float] = {}
    for side in SIDES:
        for seed in seeds:
            scenes = [render(seed, VALIDATION + i, side, side) for i in range(images)]
            for name, segmenter in segmenters.items():
                counts = ConfusionMatrix(len(CLASSES))
                for i, scene in enumerate(scenes):
                    counts.update(segmenter(pixels(scene.image)), torch.from_numpy(scene.labels), i)
                miou[name, side, seed] = counts.results().miou
    scenes_of = {
        side: [pixels(render(seeds[0], VALIDATION + i, side, side).image) for i in range(distance_images)]
        for side in SIDES[1:]
    }
    for name, segmenter in segmenters.items():
        cells = [" / ".join(f"{miou[name, side, seed]:.1f}" for seed in seeds) for side in SIDES]
        for side in SIDES[1:]:
            shares = []
            for seed in seeds:
                full, teacher = miou[FULL, side, seed], miou[TEACHER, side, seed]
                shares.append(f"{(miou[name, side, seed] - full) / (teacher - full):.0%}" if teacher > full else "-")
            cells.append(" / ".join(shares))
        for images_of_side in scenes_of.values():
            differences = [
                (segmenter.features(image) - segmenters[TEACHER].features(image)).square().mean().item()
                for image in images_of_side
            ]
            cells.append(f"{statistics.mean(differences):.2f}")
        lines.append([name, *cells])
        print(" | ".join(lines[-1]), flush=True)
    return markdown(lines)


def pixels(image: Any) -> Tensor:
    """Return an array (H, W, 3) as a tensor (3, H, W)."""
    return torch.as_tensor(image).permute(2, 0, 1)


def students(pretrained: str, seeds: Sequence[int], runs: Path, reuse: bool) -> str:
    """Return the tables of the quickstart with another network than the bundled weights."""
    more = ("--model.backbone.pretrained", pretrained, "--trainer.max_epochs", "8", *FIVE_TIMES)
    found = [measure(seed, runs / "image-level", torch.get_num_threads(), reuse, *more) for seed in seeds]
    return f"{results(found, SIZES)}\n\n{verdict(found)}"


def network(size: str, attention: str) -> Backbone:
    """Return the network of the cost measurement with full or windowed attention."""
    backbone: Backbone = Tiny() if size == "Tiny" else SigLIP2(pretrained=None)
    return backbone.requires_grad_(False).with_attention(InferenceConfig(attention=attention).windowed)  # type: ignore[arg-type]


@torch.no_grad()
def cost(size: str, repeats: int) -> str:
    """Return the table of time and peak memory by image size."""
    lines = [["image", "patches", "full, ms", "windowed, ms", "full / windowed", "windowed, ms per 1,000 patches",
              "full, peak MiB", "windowed, peak MiB"]]  # fmt: skip
    full = network(size, "full")
    both = (full, full.with_attention(WindowedAttention()))
    for h, w in GRIDS[size]:
        images = torch.randn(1, 3, h * full.patch_size, w * full.patch_size)
        times: tuple[list[float], list[float]] = ([], [])
        full(images[..., : full.window, : full.window])  # warm-up
        for repeat in range(repeats):
            for i in (0, 1) if repeat % 2 == 0 else (1, 0):
                start = time.perf_counter()
                both[i](images)
                times[i].append(1000 * (time.perf_counter() - start))
        ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
        ms = [statistics.median(found) for found in times]
        memory = [peak(size, attention, h, w) for attention in ("full", "windowed")]
        lines.append([f"{images.shape[2]} x {images.shape[3]}", f"{h * w:,}", *(f"{each:,.0f}" for each in ms)])
        lines[-1] += [f"{ratio:.2f}", f"{1000 * ms[1] / (h * w):,.0f}", *(f"{each:,.0f}" for each in memory)]
        print(" | ".join(lines[-1]), flush=True)
    return markdown(lines)


def peak(size: str, attention: str, h: int, w: int) -> float:
    """Return the peak memory of a process that runs one pass, in MiB."""
    command = [sys.executable, "-m", "scripts.measure_attention", "--peak", attention, str(h), str(w), "--size", size]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--images", type=int, default=40, help="images of each size and seed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=list(GRIDS), default="SigLIP2", help="network of the cost measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "methods.md")
    parser.add_argument("--reuse", action="store_true", help="take finished tables from --runs")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "measured")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        attention, h, w = args.peak[0], int(args.peak[1]), int(args.peak[2])
        backbone = network(args.size, attention)
        with torch.no_grad():
            memory = Peak(torch.device("cpu"))
            backbone(torch.zeros(1, 3, h * backbone.patch_size, w * backbone.patch_size))
        print(memory.mebibytes())
        return
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "timm"))
    threads = torch.get_num_threads()
    machine = f"threads: {threads}; {platform.machine()}, {os.cpu_count()} CPU cores ({cpu}), no GPU; {packages}"
    page = (ROOT / "scripts" / "methods_page.md").read_text(encoding="utf-8")

    def fill(name: str, measure: Callable[[], str], conditions: str) -> None:
        nonlocal page
        path: Path = args.runs / f"attention-{name}.md"
        if not (args.reuse and path.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{measure()}\n\n({conditions}, {machine})\n", encoding="utf-8")
        page = page.replace(f"{name.upper()}\n", path.read_text(encoding="utf-8"))

    second = str(args.runs / "image-level.safetensors")
    few = min(10, args.images)
    scenes = f"{args.images} images per size and seed, {few} of seed {args.seeds[0]} for the distance"
    fill("accuracy", lambda: accuracy("scenes", args.seeds, args.images, few), scenes)
    fill("image-level", lambda: accuracy(second, args.seeds, args.images, few), scenes)
    fill("students", lambda: students(second, args.seeds, args.runs, args.reuse), "100 images per size and seed")
    fill("cost", lambda: cost(args.size, args.repeats), f"{args.repeats} repeats")
    args.out.write_text(page, encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
