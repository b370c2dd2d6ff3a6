"""Shared fixtures: arguments of a small quickstart run, `spar` in a subprocess, test data. Tests use one thread."""

import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch  # noqa: F401  # its log handler stores the stderr of the first import
import pytest
import skimage.data
import torch
from PIL import Image
from tqdm import tqdm

torch.set_num_threads(1)  # tests with two processes run on two cores
# Forks share tqdm's lock between processes. One that was killed while it drew a bar would block all later ones.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "spar_lightning" / "configs" / "quickstart.yaml"


# Tests that start processes. Forked ones cannot train after a test has used autograd in several threads.
LONG = (
    *("test_nodes.py", "test_processes.py", "test_ranks.py", "test_signals.py", "test_run_folder.py"),
    "test_elastic_fit.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long tests first; at the end they would leave a core idle."""
    items.sort(key=lambda item: item.path.name not in LONG)


@dataclass
class Finished:
    """Result of a `spar` process."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Return arguments for a small quickstart run: 12 synthetic images for training, 5 for validation."""
    return [
        "--config", str(QUICKSTART),
        "--data.train_scenes", "12",
        "--data.val_scenes", "5",
        "--data.val_sizes", "[64,96]",
        "--data.batch_size", "1",
        "--model.attention", "full",
        "--model.blend", "mean",
        "--model.trainable", "[blocks.-3,blocks.-2,blocks.-1]",
        "--data.train_canvas", "[128,208]",
        "--trainer.callbacks", "null",
        "--trainer.max_epochs", "2",
        "--trainer.check_val_every_n_epoch", "1",
        "--model.lr_schedule", "null",
        "--trainer.log_every_n_steps", "1",
        "--mean_iou.baselines", "[]",
        "--pictures.images", "0",  # they take a third of such a run's time; tests/cli/test_fit.py covers them
    ]  # fmt: skip


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for synthetic images and features, which the small runs of all tests share."""
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="session")
def spar() -> Callable[..., Finished]:
    """Return a function that runs `spar` in a subprocess."""

    def run(args: Sequence[str], cwd: Path | None = None) -> Finished:
        command = [sys.executable, "-m", "spar_lightning", *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, env=environment())
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a tar file with two photographs in the layout of SA-1B."""
    folder = tmp_path_factory.mktemp("photos")
    path = folder / "sa_000000.tar"
    with tarfile.open(path, "w") as tar:
        for image_id, name in enumerate(("coffee", "chelsea"), start=1):
            pixels = getattr(skimage.data, name)()
            files = {"jpg": io.BytesIO(), "json": io.BytesIO(b'{"image": {}, "annotations": []}')}
            Image.fromarray(pixels).save(files["jpg"], "jpeg", quality=95)
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"./sa_{image_id}.{suffix}")
                member.size = content.getbuffer().nbytes
                content.seek(0)
                tar.addfile(member, content)
    return str(path)


@pytest.fixture(scope="session")
def small_naflex(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a small NaFlex model, written by `save_pretrained`."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_patches=64
    )
    folder = tmp_path_factory.mktemp("naflex")
    torch.manual_seed(0)
    Siglip2VisionModel(config).save_pretrained(folder)
    return str(folder)


def environment() -> dict[str, str]:
    """Return environment variables that limit each process to one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
