"""Checks of `spar doctor` that need no configuration: packages, devices, plugins, disk, shared memory."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import torch
from packaging.requirements import Requirement

from spar_lightning.backbones.registry import plugins
from spar_lightning.formatting import bytes_text
from spar_lightning.segmentation.text_embeddings import cache_folder

LITTLE: Final = 2**30  # bytes; with less free disk space or shared memory, a run or its loader processes may fail


@dataclass(frozen=True)
class Finding:
    """Result of one check: a line of the report.

    `name` is the subject of the check, `text` the result, and `fix` the advice to the user (None if all is well).
    """

    name: str
    text: str
    fix: str | None = None


def system() -> Iterator[Finding]:
    """Yield all findings about this machine."""
    yield from packages()
    yield torchvision()
    yield from devices()
    yield from backbone_plugins()
    yield from folders()
    yield from shared_memory()


def packages() -> Iterator[Finding]:
    """Compare the versions of installed packages with the requirements of this package."""
    own = metadata.version("spar-lightning")
    yield Finding("spar_lightning", f"{own}, Python {platform.python_version()} on {platform.platform()}")
    for line in metadata.requires("spar-lightning") or []:
        requirement = Requirement(line)
        extra = requirement.marker is not None
        if extra and not any(requirement.marker.evaluate({"extra": name}) for name in ("context", "onnx")):  # type: ignore[union-attr]
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            fix = None if extra else f"pip install '{requirement.name}{requirement.specifier}'"
            yield Finding(requirement.name, "not installed" + (", optional" if extra else ""), fix)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        fix = None if fits else f"pip install '{requirement.name}{requirement.specifier}'"
        yield Finding(requirement.name, version, fix)


def torchvision() -> Finding:
    """Check that the compiled operators of torchvision work with the installed torch."""
    name, fix = "torchvision", "install matching versions in one command: pip install torch torchvision"
    try:
        import torchvision as vision

        vision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        return Finding(name, f"does not work with torch {torch.__version__}: {str(error).splitlines()[0]}", fix)
    return Finding(name, f"{vision.__version__} works with torch {torch.__version__}")


def devices() -> Iterator[Finding]:
    """Yield findings about CPU, memory and accelerators."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", f"{cores} cores, {torch.get_num_threads()} threads, {bytes_text(memory)} of memory")
    for i in range(torch.cuda.device_count()):
        facts, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        bf16 = "bf16" if facts.major >= 8 else "no bf16: use trainer.precision 16-mixed or 32-true"
        yield Finding(f"cuda:{i}", f"{facts.name}, {bytes_text(free)} of {bytes_text(total)} free, {bf16}")
    if not torch.cuda.is_available() and Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "cuda", f"an NVIDIA driver is installed, but torch {torch.__version__} cannot use it",
            "update the driver, or install a torch build for its CUDA version",
        )  # fmt: skip
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")


def backbone_plugins() -> Iterator[Finding]:
    """Yield findings about backbones of other packages."""
    for plugin in plugins():
        name = f"plugin {plugin.name}"
        if plugin.error is None:
            yield Finding(name, f"{plugin.path} of {plugin.package}")
        else:
            text = f"{plugin.package} cannot be imported: {plugin.reason}"
            yield Finding(name, text, "fix or uninstall that package")


def folders() -> Iterator[Finding]:
    """Check the folders for runs, text embeddings and temporary files."""
    for name, folder, other in (
        ("disk", Path.cwd(), "change to another folder, or set --run_dir and data.cache to another disk"),
        ("text embeddings", cache_folder(), "set the environment variable SPAR_CACHE to another folder"),
        ("temporary files", Path(tempfile.gettempdir()), "set the environment variable TMPDIR to another folder"),
    ):
        yield disk(name, folder, other)


def disk(name: str, folder: Path, other: str) -> Finding:
    """Check that a folder is writable and has free disk space.

    Args:
        name: Name of the finding.
        folder: Folder to check; if it does not exist, its nearest existing parent is checked.
        other: Advice to the user if the folder cannot be used.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        return Finding(name, f"{folder} cannot be a folder: {place} is a file", other)
    if not os.access(place, os.W_OK):
        return Finding(name, f"{folder} is not writable", other)
    free = shutil.disk_usage(place).free
    return Finding(name, f"{folder}: {bytes_text(free)} free", other if free < LITTLE else None)


def shared_memory() -> Iterator[Finding]:
    """Check the size of /dev/shm, through which loader processes pass batches."""
    place = Path("/dev/shm")
    if place.exists():
        size = shutil.disk_usage(place).total
        fix = "start the container with --shm-size 8g, or set data.num_workers 0" if size < LITTLE else None
        yield Finding("shared memory", bytes_text(size), fix)
