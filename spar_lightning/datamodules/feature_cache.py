"""The teacher's features on disk: a folder of shards with a manifest and a plan.

    manifest.json   identity of the cache (teacher, augmentation, seed, precision) and its fingerprint
    plan.jsonl      one line per source image: shard, key, tar, offset, size, hash; only ever appended to
    shards/         00000.h5 .. of 64 samples each, see `feature_shard`
    tmp/            unfinished shards

The list of images is no part of the identity: more images extend a cache, and training on a subset
selects from it. A shard is done when it exists under its final name; nothing else is believed.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from spar_lightning.datamodules.feature_shard import CacheError, Entry, FeatureShard, write_shard
from spar_lightning.datamodules.plan import Source
from spar_lightning.datamodules.sample import Sample

SAMPLES_PER_SHARD = 64


class FeatureCache:
    """A cache folder of one identity.

    Args:
        root: The folder; made when it is missing.
        identity: Everything that the features depend on, apart from the images themselves.

    Raises:
        CacheError: The folder holds a cache of another identity; the sentence lists the differences.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self.root = root
        canonical = json.dumps(identity, sort_keys=True)
        self.identity = json.loads(canonical)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        manifest = root / "manifest.json"
        if manifest.exists():
            self._compare(json.loads(manifest.read_text())["identity"])
            return
        for folder in (root, self._shards, self._private):
            folder.mkdir(parents=True, exist_ok=True)
        content = {"fingerprint": self.fingerprint, "identity": self.identity}
        unfinished = self._private / f"manifest.{os.getpid()}.json"
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(manifest)

    @property
    def _shards(self) -> Path:
        return self.root / "shards"

    @property
    def _private(self) -> Path:
        return self.root / "tmp"

    def _compare(self, found: dict[str, Any]) -> None:
        if found == self.identity:
            return
        theirs, ours = dict(_flat(found)), dict(_flat(self.identity))
        names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        rows = "\n".join(f"  {name}: cache {theirs.get(name)}, configuration {ours.get(name)}" for name in names)
        raise CacheError(
            f"The features in {self.root} were made by another configuration:\n{rows}\n"
            "Restore these settings, or name another folder for the new features (data.cache; for rendered "
            "scenes data.root), or delete this one."
        )

    def build(self, sources: Sequence[Source], make: Callable[[Source], Entry]) -> None:
        """Compute the features that are missing; every finished shard stays if this is cut off."""
        planned = self._extend_plan(sources)
        if not planned:
            return
        with tqdm(total=sum(map(len, planned.values())), desc="teacher features", unit="image") as bar:
            for shard, rows in planned.items():
                entries = []
                for row in rows:
                    entries.append(make(row))
                    bar.update()
                write_shard(self._path(shard), entries, self.fingerprint, self._private)

    def dataset(self, keys: Sequence[str]) -> "CachedFeatures":
        """The samples with these keys, in this order.

        Raises:
            CacheError: Some of them are not in the cache.
        """
        built = self._built(self._plan())
        places = {row.key: (self._path(shard), i) for shard, rows in built.items() for i, row in enumerate(rows)}
        missing = [key for key in keys if key not in places]
        if missing:
            raise CacheError(
                f"{len(missing)} of {len(keys)} images have no features in {self.root}, the first of them "
                f"{missing[0]}. `spar fit` builds them before it trains; run it with the same data.shards."
            )
        return CachedFeatures(list(keys), [places[key] for key in keys], self.fingerprint)

    def _path(self, shard: int) -> Path:
        return self._shards / f"{shard:05d}.h5"

    def _plan(self) -> dict[int, list[Source]]:
        """Planned images of every shard, in order."""
        plan: dict[int, list[Source]] = {}
        path = self.root / "plan.jsonl"
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # the last line may be torn by a crash; it was never acted on
                    row = json.loads(line)
                    plan.setdefault(row.pop("shard"), []).append(Source(**row))
        return plan

    def _built(self, plan: dict[int, list[Source]]) -> dict[int, list[Source]]:
        """The shards that are done. A planned shard that is not binds nobody: its images may be planned anew."""
        return {shard: rows for shard, rows in plan.items() if self._path(shard).exists()}

    def _extend_plan(self, sources: Sequence[Source]) -> dict[int, list[Source]]:
        """Append the images without features to the plan, in shards of their own, and return these shards."""
        with open(self.root / "plan.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builders must not give one number to different shards
            plan = self._plan()
            known = {row.key: row for rows in self._built(plan).values() for row in rows}
            for source in sources:
                if source.key in known and known[source.key].digest != source.digest:
                    raise CacheError(
                        f"The image {source.key} in {source.tar} is not the one whose features lie in {self.root}. "
                        "Name another folder in data.cache, or restore the old shard."
                    )
            first = max(plan, default=-1) + 1
            new: dict[int, list[Source]] = {}
            for i, source in enumerate(source for source in sources if source.key not in known):
                new.setdefault(first + i // SAMPLES_PER_SHARD, []).append(source)
            rows = [{"shard": shard, **asdict(row)} for shard, members in new.items() for row in members]
            _append(self.root / "plan.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return new


class CachedFeatures(Dataset[Sample]):
    """Images and features by index; shards are opened in the process that reads them, when it first does.

    Args:
        keys: Key of each sample.
        places: Shard file and row of each sample.
        fingerprint: Identity that every shard must carry.
    """

    def __init__(self, keys: list[str], places: list[tuple[Path, int]], fingerprint: str) -> None:
        self.keys = keys
        self.places = places
        self.fingerprint = fingerprint
        self._open: dict[tuple[int, Path], FeatureShard] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        path, row = self.places[index]
        owner = (os.getpid(), path)  # a handle inherited by fork belongs to the parent
        if owner not in self._open:
            self._open[owner] = FeatureShard(path, self.fingerprint)
        shard = self._open[owner]
        if shard.keys[row] != self.keys[index]:
            raise CacheError(f"{path} holds {shard.keys[row]} in row {row} where the plan says {self.keys[index]}.")
        return Sample(self.keys[index], *shard.read(row))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _append(path: Path, text: str) -> None:
    """Append and sync; a torn last line of an earlier crash is cut off first."""
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
