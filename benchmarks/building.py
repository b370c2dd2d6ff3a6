"""Benchmark of a cache build: two processes that build one cache together, compared with one process.

    python benchmarks/building.py

Prints the ratio of the build times, with one thread per process. The ratio is meaningful only if two cores are free.
Also checks that the two processes computed each image exactly once.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from spar_lightning.backbones import Tiny
from spar_lightning.datamodules import RenderedScenes
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.image_source import Source
from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.shard_index import scan_all
from spar_lightning.distillation import Distillation
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.extract import TeacherFeatures
from spar_lightning.feature_cache.shard import Entry, Rejected

IDENTITY = {"teacher": "Tiny"}
AUGMENTATION = Augmentation("released", (160, 128), (0.7, 1.0), min_side=64, multiple=8)


def build(root: Path, images: Images, processes: int) -> float:
    """Return the seconds that `processes` forked processes need to build a cache together."""

    def work() -> None:
        teacher = Distillation(Tiny(), stride=16)
        make = TeacherFeatures(teacher, AUGMENTATION, 0, "float16", torch.device("cpu"), torch.no_grad)

        def count(sources: Iterable[Source]) -> Iterator[Entry | Rejected]:
            for sample in make(sources):
                with open(root / "made", "a") as file:
                    file.write(f"{sample.key}\n")
                yield sample

        FeatureCache(root, IDENTITY).build(images, count, show=False)

    start = time.perf_counter()
    pids = [fork(work) for _ in range(processes)]
    for pid in pids:
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("a builder failed")
    return time.perf_counter() - start


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and return its process ID."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def main() -> int:
    """Run both builds alternately and print the ratio of their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="building-") as place:
        scenes = RenderedScenes(place, train_scenes=given.images, val_scenes=1, val_sizes=(64,))
        scenes.draw()
        images = scan_all(list(scenes.shards), Path(place), show=False)
        times = {1: list[float](), 2: list[float]()}
        for repeat in range(given.repeats):
            for processes in times:  # alternately, so that machine noise affects both
                times[processes].append(build(Path(place) / f"{processes}-{repeat}", images, processes))
        one, two = (statistics.median(times[n]) for n in (1, 2))
        made = [(Path(place) / f"2-{repeat}" / "made").read_text().split() for repeat in range(given.repeats)]
    once = all(len(keys) == len(set(keys)) == given.images for keys in made)
    print(
        f"building {given.images} images: {one:.1f} s with one process, {two:.1f} s with two, ratio {two / one:.2f}; "
        f"the two computed each image {'once' if once else 'NOT ONCE'}"
    )
    return 0 if once else 1


if __name__ == "__main__":
    sys.exit(main())
