"""Kill processes that build a feature cache, or an index, at random moments, and check the shards that they leave.

    python scripts/crash_cache.py --kills 100
    python scripts/crash_cache.py --index --images 10000 --kills 20

Each build has two processes. They are killed with SIGKILL and started again until the cache is complete, and builds
are repeated until there were at least `--kills` kills. After every kill, all published shards must exist, be valid,
and have the same bytes as when they were published. At the end of a build, every sample must be equal to that of a
cache which was built without kills. The script prints its counts and exits with status 1 if a shard is damaged or
lost, or a sample differs.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.datamodules import RenderedScenes
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.shard_index import scan_all
from spar_lightning.distillation import Distillation
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.extract import TeacherFeatures
from spar_lightning.feature_cache.shard import CacheError, FeatureShard
from spar_lightning.feature_index import Origin, WritableIndex
from spar_lightning.student import load_student

IDENTITY = {"teacher": "Tiny at stride 32", "augmentation": "small"}
PROCESSES = 2
SMALL = Augmentation("small", (96, 64))


def build(root: Path, tars: list[str]) -> FeatureCache:
    """Index the shards and build the cache, as a process of `spar cache` does."""
    teacher = Distillation(Tiny(), stride=32)
    make = TeacherFeatures(teacher, SMALL, 0, "float16", torch.device("cpu"), torch.no_grad)
    images = scan_all(tars, root, show=False)
    cache = FeatureCache(root, IDENTITY)
    cache.build(images, make, show=False)
    return cache


def build_index(root: Path, tars: list[str]) -> FeatureCache:
    """Index the images, as a process of `spar index` does."""
    segmenter = load_student("tiny").segmenter({})
    index = WritableIndex(root, segmenter, "float16", Origin("tiny"))
    index.add(scan_all(tars, root, show=False), show=False)
    return index


def start(build: Callable[[Path, list[str]], FeatureCache], root: Path, tars: list[str]) -> int:
    """Fork a builder and return its process ID; starting a new Python would take longer than the build."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            build(root, tars)
            code = 0
        finally:
            os._exit(code)
    return pid


class Published:
    """Published shards of a cache, with counts of those that were damaged or lost later."""

    def __init__(self, root: Path) -> None:
        self.root, self.seen, self.damaged, self.lost = root, dict[str, str](), 0, 0

    def look(self, fingerprint: str) -> None:
        """Update the counts: shards that are invalid or have changed are damaged, missing ones are lost."""
        folder = self.root / "shards"
        found = {path.name: path for path in folder.iterdir()} if folder.exists() else {}
        self.lost += len(self.seen.keys() - found.keys())
        for name, path in found.items():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            self.damaged += self.seen.setdefault(name, content) != content
            try:
                with FeatureShard(path, fingerprint) as shard:
                    for row in range(len(shard.keys)):
                        shard.read(row)
            except CacheError:
                self.damaged += 1


def differences(one: FeatureCache, other: FeatureCache, keys: "np.ndarray[tuple[int], np.dtype[np.bytes_]]") -> int:
    """Return the number of samples whose key, image or features differ."""
    pairs = zip(one.dataset(keys), other.dataset(keys), strict=True)  # type: ignore[call-overload]
    return sum(
        not (a.key == b.key and torch.equal(a.image, b.image) and torch.equal(a.features, b.features)) for a, b in pairs
    )


def main() -> int:
    """Build, kill and check until enough processes were killed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", action="store_true", help="Build an index instead of a cache")
    given = parser.parse_args()
    make = build_index if given.index else build
    torch.set_num_threads(1)
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="crash_cache-") as place:
        scenes = RenderedScenes(place, train_scenes=given.images, train_canvas=(48, 96), val_scenes=1, val_sizes=(64,))
        scenes.draw()
        tars = list(scenes.shards)
        began = time.perf_counter()
        whole = make(Path(place) / "undisturbed", tars)
        undisturbed = time.perf_counter() - began
        keys = scan_all(tars, whole.root, show=False).keys
        kills = builds = damaged = lost = different = doubled = 0
        while kills < given.kills:
            root = Path(place) / f"build-{builds}"
            published = Published(root)
            alive = {start(make, root, tars) for _ in range(PROCESSES)}
            while alive:
                # Long enough that some shards are finished; the moment within a shard is random.
                time.sleep(dice.uniform(0, 1.5 * undisturbed * max(64 / given.images, 1 / given.kills)))
                for pid in list(alive):  # processes that have finished
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done and os.waitstatus_to_exitcode(status):
                        raise RuntimeError(f"a builder failed with status {status} before it was killed")
                    if done:
                        alive.remove(pid)
                if alive:
                    victim = dice.choice(sorted(alive))
                    os.kill(victim, signal.SIGKILL)
                    alive.remove(victim)
                    _, status = os.waitpid(victim, 0)
                    kills += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
                    published.look(whole.fingerprint)
                    alive.add(start(make, root, tars))
            published.look(whole.fingerprint)
            cache = FeatureCache(root, whole.identity)
            different += differences(whole, cache, keys)
            doubled += len(cache.index) - len(keys)
            damaged, lost, builds = damaged + published.damaged, lost + published.lost, builds + 1
            print(f"build {builds}: {kills} kills so far, {len(published.seen)} shards", flush=True)
    print(
        f"{kills} kills over {builds} complete builds of {given.images} images with {PROCESSES} processes: "
        f"{damaged} published shards damaged, {lost} lost; {doubled} samples doubled; "
        f"{different} of {builds * len(keys)} samples differ from the undisturbed one "
        f"(built in {undisturbed:.1f} s)"
    )
    return 1 if damaged or lost or different or doubled else 0


if __name__ == "__main__":
    sys.exit(main())
