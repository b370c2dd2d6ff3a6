"""Measure the peak resident memory of planning, caching and training with 2,000 and with 20,000 small images.

    python scripts/measure_memory.py

The teacher is a stub, so that the measurement covers the lists, the cache and the loaders. Each stage of each size runs
in a separate process. The script prints a table and exits with status 1 if a stage takes over 10 % more memory for the
larger set than for the smaller one.
"""

import argparse
import io
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor, nn

from spar_lightning.backbones import Tiny
from spar_lightning.datamodules.dataloader import ResumableLoader
from spar_lightning.datamodules.samplers import EpochOrder
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.shard_index import scan_all
from spar_lightning.distillation import Distillation
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.extract import TeacherFeatures
from spar_lightning.formatting import markdown

PER_TAR = 2000
SIZE, PATCH, CHANNELS = 64, 8, 32
ALLOWED = 1.1


class Patches(nn.Module):
    """Network without computation: features are the pixels of a patch, cut to `CHANNELS`."""

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, h, w, CHANNELS) of images (B, 3, H, W)."""
        patches = nn.functional.pixel_unshuffle(images, PATCH)[:, :CHANNELS]
        return patches.permute(0, 2, 3, 1)


class Stub(TeacherFeatures):
    """Teacher that takes its features from `Patches`."""

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Return features (h, w, CHANNELS) of an image (3, H, W)."""
        features: Tensor = Patches()(image[None].float())[0]
        return features


def write_tars(folder: Path, count: int) -> list[str]:
    """Write small JPEG images in the layout of SA-1B to a new folder and return the paths of the tars."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for first in range(0, count, PER_TAR):
        paths.append(str(folder / f"sa_{first // PER_TAR:06d}.tar"))
        with wds.TarWriter(paths[-1], encoder=False, mtime=0.0) as tar:
            for i in range(first, min(first + PER_TAR, count)):
                pixels = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "jpeg")
                tar.write({"__key__": f"sa_{i + 1}", "jpg": buffer.getvalue(), "json": b"{}"})
    return paths


def plan(tars: list[str], root: Path) -> None:
    """Index the shards."""
    scan_all(tars, root, show=False)


def cache(tars: list[str], root: Path) -> None:
    """Build the cache."""
    augmentation = Augmentation("released", (SIZE, SIZE), (1.0, 1.0), SIZE, PATCH)
    teacher = Distillation(Tiny(None))
    make = Stub(teacher, augmentation, 0, "float16", torch.device("cpu"), torch.no_grad)
    FeatureCache(root, {"teacher": "stub"}).build(scan_all(tars, root, show=False), make, show=False)


def train(tars: list[str], root: Path) -> None:
    """Train a linear student for two epochs from a loader with two workers."""
    dataset = FeatureCache(root, {"teacher": "stub"}).dataset(scan_all(tars, root, show=False).keys)
    order = EpochOrder(len(dataset), 4, 0, 1, seed=0)
    loader = ResumableLoader(dataset, order, num_workers=2)
    student = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for epoch in range(2):
        order.set_epoch(epoch)
        for batch in loader:
            images = torch.stack([sample.image for sample in batch]).float() / 255
            targets = torch.stack([sample.features for sample in batch]).float() / 255
            optimizer.zero_grad()
            nn.functional.mse_loss(student(images).permute(0, 2, 3, 1), targets).backward()
            optimizer.step()


def peak(stage: Callable[[list[str], Path], None], tars: list[str], root: Path) -> int:
    """Run a stage in a forked process and return the peak resident memory of its largest process in bytes."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            stage(tars, root)
            largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            os.write(write, str(largest * 1024).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{stage.__name__} failed")
    return int(text)


def main() -> int:
    """Measure all stages and print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=[2000, 20000])
    few, many = parser.parse_args().images
    torch.set_num_threads(1)
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory(prefix="measure_memory-") as place:
        tars = {count: write_tars(Path(place) / str(count), count) for count in (few, many)}
        for stage in (plan, cache, train):
            peaks = [peak(stage, tars[count], Path(place) / f"cache-{count}") for count in (few, many)]
            worst = max(worst, peaks[1] / peaks[0])
            rows.append([stage.__name__, *(f"{p / 1e6:.0f} MB" for p in peaks), f"{peaks[1] / peaks[0]:.3f}"])
    print(markdown([["stage", f"{few:,} images", f"{many:,} images", "ratio"], *rows]))
    return 1 if worst > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
