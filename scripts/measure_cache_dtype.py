"""Measure features in int8: their error, bytes of the cache, and mIoU of students of the quickstart trained from them.

    python scripts/measure_cache_dtype.py runs/cache_dtype --seeds 0 1 2

For each seed, two `spar fit` with one thread each run at the same time, 15 minutes on two cores. Finished runs are not
repeated. The cache of features is the only difference between them.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import torch

from spar_lightning.backbones import Backbone, DINOv3Text, OpenCLIP, SigLIP2, Tiny
from spar_lightning.feature_cache.int8 import quantized, relative_error
from spar_lightning.formatting import markdown
from spar_lightning.sliding_window import SlidingWindow

DTYPES = ("float16", "int8")


def train(folder: Path, seed: int) -> None:
    """Train one student of each type, in parallel."""
    started = []
    for dtype in DTYPES:
        run = folder / f"{dtype}-{seed}"
        if (run / "results.json").exists():
            continue
        options = {"seed_everything": seed, "data.seed": seed, "run_dir": run}
        options |= {"data.cache_dtype": dtype, "data.root": folder / dtype}
        command = [sys.executable, "-m", "spar_lightning", "fit", "--config", "quickstart"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with open(folder / f"{dtype}-{seed}.log", "w") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
    for process in started:
        if process.wait():
            raise SystemExit(f"spar fit failed, see {folder}/*.log")


@torch.no_grad()
def errors() -> list[list[str]]:
    """Return the errors of features of two images, noise and smooth, also after a random rotation of the channels."""
    backbones: list[Backbone] = [
        Tiny(), SigLIP2("ViT-B-32-SigLIP2-256", None), OpenCLIP("ViT-B-32", None),
        DINOv3Text("vit_small_patch16_dinov3_qkvb", window=224),
    ]  # fmt: skip
    rows = [["backbone", "image", "error", "deviation from the mean", "after a rotation"]]
    for backbone in backbones:
        side = 2 * backbone.window
        noise = torch.randint(256, (1, 3, side, side + 4 * backbone.patch_size), dtype=torch.uint8)
        smooth = torch.nn.functional.interpolate(255 * torch.rand(1, 3, 9, 11), noise.shape[-2:], mode="bicubic")
        for name, image in (("noise", noise), ("smooth", smooth.clamp(0, 255).byte())):
            features = SlidingWindow(backbone, stride=backbone.window // 2)(backbone.normalize(image))[0]
            rotation, _ = torch.linalg.qr(torch.randn(features.shape[-1], features.shape[-1]))
            error, rotated = (relative_error(f, *quantized(f)) for f in (features, features @ rotation))
            scale = float(features.norm() / (features - features.mean((0, 1))).norm())
            rows.append([type(backbone).__name__, name, *(f"{100 * e:.2f} %" for e in (error, error * scale, rotated))])
    return rows


def miou(run: Path) -> dict[str, float]:
    """Return the mIoU of the student on each benchmark, in percent."""
    rows = json.loads((run / "results.json").read_text())
    found: dict[str, float] = next(row["miou"] for row in rows if row["stage"] == "after")
    return found


def sizes(cache: Path) -> tuple[int, int]:
    """Return the bytes of the shards of a cache, and of the features in them."""
    shards = sorted((cache / "shards").glob("*.h5"))
    features = 0
    for path in shards:
        with h5py.File(path) as file:
            features += sum(file[name].id.get_storage_size() for name in ("tok", "range") if name in file)
    return sum(path.stat().st_size for path in shards), features


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder for runs and caches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    print(markdown(errors()))
    rows = []
    for seed in given.seeds:
        train(given.folder, seed)
        plain, small = (miou(given.folder / f"{dtype}-{seed}") for dtype in DTYPES)
        rows += [
            [str(seed), name, f"{plain[name]:.2f}", f"{small[name]:.2f}", f"{small[name] - plain[name]:+.2f}"]
            for name in plain
        ]
    print(markdown([["seed", "benchmark", *DTYPES, "difference"], *rows]))
    (plain_all, plain_features), (all_bytes, features) = (
        sizes(given.folder / dtype / f"seed-{given.seeds[0]}" / "cache") for dtype in DTYPES
    )
    print(f"bytes of int8 / float16: shards {all_bytes / plain_all:.3f}, features {features / plain_features:.3f}")


if __name__ == "__main__":
    main()
