"""Tests of reading images: altered bytes raise an error that names the shard."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.shard_index import scan_all
from tests.datasets.test_shard_index import write_tar
from tests.feature_cache.test_cache import damage

RNG = np.random.default_rng(1)
IMAGES = {f"sa_{i}.jpg": RNG.bytes(3000) for i in range(8)}


@pytest.mark.parametrize("kind", ["bit flip", "hole", "truncation"])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_altered_is_ever_returned(tmp_path: Path, packed: bool, kind: str) -> None:
    """Damage a tar at 50 positions without changing its modification time."""
    path = write_tar(tmp_path / "sa_0.tar", IMAGES)
    if packed:
        path = tmp_path / "sa_0.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "sa_0.tar").read_bytes()))
    whole, times = path.read_bytes(), path.stat()
    images = scan_all([str(path)], tmp_path, show=False)
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 50).tolist():
        path.write_bytes(damage(whole, kind, place))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        for i in range(len(images)):
            try:
                assert images[i].read() == IMAGES[f"sa_{i}.jpg"]
            except ShardError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 20
