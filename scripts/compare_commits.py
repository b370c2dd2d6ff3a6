"""Compare the results of two commits bit for bit, after running the same commands with both.

    python scripts/compare_commits.py 0269bb7 HEAD --quickstart

Each commit is checked out into a temporary worktree and run by this Python (PYTHONPATH), with one thread per process.
The script compares

- features of all families with seeded weights,
- shards, losses, weights and optimizer state of a short cached fit,
- confusion matrices of evaluations (single pass, sliding window, LPOSS), predictions and exports,
- with --quickstart, the table of the whole quickstart.

It exits with status 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]

FEATURES: Final = """
import sys, torch
from safetensors.torch import save_file
from spar_lightning.backbones import DINOv3Text, NaFlex, OpenCLIP, SigLIP2, Tiny
from spar_lightning.sliding_window import SlidingWindow

torch.manual_seed(0)
made = {"tiny": Tiny(), "siglip2": SigLIP2("ViT-B-32-SigLIP2-256", None), "openclip": OpenCLIP("ViT-S-32", None),
        "dinov3": DINOv3Text("vit_small_patch16_dinov3_qkvb", window=96), "naflex": NaFlex(None)}
found = {}
with torch.no_grad():
    for name, backbone in made.items():
        patch, window = backbone.patch_size, backbone.window
        for h, w in ((window, window), (window + 2 * patch, window - patch)):
            found[f"{name} {h}x{w}"] = backbone(torch.randn(1, 3, h, w)).contiguous()
        image = torch.randn(1, 3, window + 2 * patch, window)
        found[f"{name} sliding"] = SlidingWindow(backbone, patch * 3 // 2)(image).contiguous()
save_file(found, sys.argv[1])
"""

FIT: Final = [
    "fit", "--config", "quickstart", "--data.train_scenes", "40", "--data.val_scenes", "4", "--data.val_sizes",
    "[64,96]", "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps",
    "1", "--trainer.enable_progress_bar", "false", "--data.root", "scenes",
]  # fmt: skip
LPOSS: Final = {
    "old": ["--refine", "lposs_spar"],
    "new": ["--refine", "LPOSS", "--refine.preset", "spar"],
}
CLASSES: Final = "red dot; blue dot; yellow dot, white dot; background: plain, grain, waves, checks"


def run_all(checkout: Path, folder: Path, spelling: str, quickstart: bool) -> None:
    """Run all commands with the package of a checkout and write the results to `folder`.

    Args:
        checkout: Worktree of the commit.
        folder: New folder for the results.
        spelling: `old` or `new`, the spelling of options that the commit understands.
        quickstart: Also run the whole quickstart.
    """
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "SPAR_CACHE": str(folder / "text")}  # fmt: skip

    def python(*args: str) -> None:
        done = subprocess.run([sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{checkout}: {' '.join(args[:6])} failed with {done.returncode}\n{done.stdout}\n{done.stderr}")

    def spar(*args: str) -> None:
        python("-m", "spar_lightning", *args)

    python("-c", FEATURES, str(folder / "features.safetensors"))
    spar(*FIT, "--run_dir", "run")
    activations = {"old": "--data.prefix", "new": "--data.cache_activations"}[spelling]
    spar(*FIT, activations, "true", "--data.pack_tokens", "900", "--data.batch_size", "1", "--run_dir", "packed")
    where = ["--weights", "run", "--benchmarks", "scenes/seed-0/scenes_96"]
    spar("evaluate", *where, "--out", "single")
    spar("evaluate", *where, "--inference", "sliding", "--out", "sliding")
    spar("evaluate", *where, *LPOSS[spelling], "--out", "lposs")
    images = "scenes/seed-0/scenes_96/images"
    spar("predict", images, "--weights", "run", "--classes", CLASSES, "--scores", "--features", "--out", "predictions")
    weights = {"old": ["run"], "new": ["--weights", "run"]}[spelling]
    for library in ("timm", "safetensors"):
        spar("export", *weights, "--to", library, "--out", f"export-{library}")
    if quickstart:
        spar("fit", "--config", "quickstart", "--data.root", "whole", "--run_dir", "quickstart")


def numbers(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every result of a commit: arrays and plain data."""
    for path in sorted(folder.rglob("*.safetensors")):
        yield from ((f"{path.relative_to(folder)} {name}", t.numpy()) for name, t in load_file(path).items())
    for path in sorted((folder / "scenes").rglob("shards/*.h5")):
        kind = "features" if path.parents[1].name == "cache" else "activations"  # the fingerprint names the layout
        with h5py.File(path) as shard:
            yield from ((f"{kind} {path.name} {name}", shard[name][:]) for name in shard)
    for name in ("run", "packed"):
        checkpoint = torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)
        yield from ((f"{name} {key}", tensor.numpy()) for key, tensor in checkpoint["state_dict"].items())
        for number, state in checkpoint["optimizer_states"][0]["state"].items():
            yield from ((f"{name} Adam {number} {key}", tensor.numpy()) for key, tensor in state.items())
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        yield f"{name} metrics.jsonl", rows
        results = json.loads((folder / name / "results.json").read_text())
        yield f"{name} results.json", [(row["stage"], row["miou"], row["images"]) for row in results]
    for name in ("single", "sliding", "lposs"):
        (counts,) = (folder / name / "counts").glob("*.npz")
        yield f"confusion matrix, {name}", np.load(counts)["matrix"]
    for path in sorted((folder / "predictions").rglob("*.png")):
        yield str(path.relative_to(folder)), np.array(Image.open(path))
    for path in sorted((folder / "predictions").rglob("*.npz")):
        yield str(path.relative_to(folder)), np.load(path)["scores"]
    if (folder / "quickstart").exists():
        rows = json.loads((folder / "quickstart" / "results.json").read_text())
        yield "quickstart", [(row["stage"], row["miou"]) for row in rows]


def equal(one: Any, other: Any) -> bool:
    """Return whether two results are the same; NaN equals itself."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return bool(one == other)


def main() -> None:
    """Run both commits and compare their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="commit that uses the option names of 0269bb7")
    parser.add_argument("new", help="commit that uses the current option names")
    parser.add_argument("--quickstart", action="store_true", help="also compare the whole quickstart (takes minutes)")
    parser.add_argument("--keep", type=Path, help="folder for the results; existing results are reused")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = given.keep.absolute() if given.keep else Path(temporary)
        sides = {}
        for spelling, commit in (("old", given.old), ("new", given.new)):
            sides[spelling] = place / f"{spelling}-{commit}"
            if sides[spelling].exists():
                continue
            checkout = Path(temporary) / f"checkout-{spelling}"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), commit], check=True)
            try:
                run_all(checkout, sides[spelling], spelling, given.quickstart)
            finally:
                subprocess.run([*git, "remove", "--force", str(checkout)], check=True)
        before, after = (dict(numbers(folder)) for folder in sides.values())
        print(*(f"quickstart {stage}: {miou}" for stage, miou in after.get("quickstart", [])), sep="\n")
        wrong = [name for name in {**before, **after} if not (name in before and name in after
                                                             and equal(before[name], after[name]))]  # fmt: skip
        print(f"{len(before)} results of {given.old}, {len(after)} of {given.new}: {len(wrong)} differ")
        print("\n".join(f"  {name}" for name in wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
