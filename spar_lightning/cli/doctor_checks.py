"""What `spar doctor` looks at without a configuration: packages, devices, plugins, disk, shared memory."""

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

LITTLE: Final = 2**30  # bytes: less free disk than this stops a run sooner or later, less shared memory its loaders


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        text: What was found.
        mend: What to do; None where all is well.
    """

    name: str
    text: str
    mend: str | None = None


def system() -> Iterator[Finding]:
    """All findings about this machine."""
    yield from packages()
    yield torchvision()
    yield from devices()
    yield from backbone_plugins()
    yield from folders()
    yield from shared_memory()


def packages() -> Iterator[Finding]:
    """Versions of what this package requires, compared with its metadata."""
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
            mend = None if extra else f"pip install '{requirement.name}{requirement.specifier}'"
            yield Finding(requirement.name, "not installed" + (", optional" if extra else ""), mend)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        mend = None if fits else f"pip install '{requirement.name}{requirement.specifier}'"
        yield Finding(requirement.name, version, mend)


def torchvision() -> Finding:
    """Whether torchvision's compiled operators fit torch."""
    name, mend = "torchvision", "install both of one release, in one command: pip install torch torchvision"
    try:
        import torchvision as vision

        vision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        return Finding(name, f"does not work with torch {torch.__version__}: {str(error).splitlines()[0]}", mend)
    return Finding(name, f"{vision.__version__} works with torch {torch.__version__}")


def devices() -> Iterator[Finding]:
    """Processor, memory, accelerators."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", f"{cores} cores, {torch.get_num_threads()} threads, {bytes_text(memory)} of memory")
    for i in range(torch.cuda.device_count()):
        facts, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        bf16 = "bf16" if facts.major >= 8 else "no bf16: trainer.precision 16-mixed or 32-true"
        yield Finding(f"cuda:{i}", f"{facts.name}, {bytes_text(free)} of {bytes_text(total)} free, {bf16}")
    if not torch.cuda.is_available() and Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "cuda", f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it",
            "update the driver, or install a torch that is built for its CUDA version",
        )  # fmt: skip
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")


def backbone_plugins() -> Iterator[Finding]:
    """Backbones of other packages."""
    for plugin in plugins():
        name = f"plugin {plugin.name}"
        if plugin.error is None:
            yield Finding(name, f"{plugin.path} of {plugin.package}")
        else:
            text = f"{plugin.package} cannot be imported: {type(plugin.error).__name__}: {plugin.error}"
            yield Finding(name, text, "mend or uninstall that package")


def folders() -> Iterator[Finding]:
    """Where runs and text embeddings are written."""
    for name, folder, other in (
        ("disk", Path.cwd(), "start somewhere else, or give --run_dir and data.cache elsewhere"),
        ("text embeddings", cache_folder(), "give another folder in the environment variable SPAR_CACHE"),
        ("temporary files", Path(tempfile.gettempdir()), "give another folder in the environment variable TMPDIR"),
    ):
        yield disk(name, folder, other)


def disk(name: str, folder: Path, other: str) -> Finding:
    """Whether a folder, or the nearest above it that exists, can be written, and how much fits.

    Args:
        name: Of the finding.
        folder: Need not exist.
        other: What to do where it is no place to write.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(place, os.W_OK):
        return Finding(name, f"{folder} cannot be written", other)
    free = shutil.disk_usage(place).free
    return Finding(name, f"{folder}: {bytes_text(free)} free", other if free < LITTLE else None)


def shared_memory() -> Iterator[Finding]:
    """What loader processes hand batches through."""
    place = Path("/dev/shm")
    if place.exists():
        size = shutil.disk_usage(place).total
        mend = "in a container start it with --shm-size 8g, or set data.num_workers 0" if size < LITTLE else None
        yield Finding("shared memory", bytes_text(size), mend)
