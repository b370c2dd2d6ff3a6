"""Header of an exported weight file: the `model` block of its network as JSON, in the metadata of safetensors.

A header comes with a downloaded file, so it must not decide which code is run. Only classes that are known without it
are accepted: those of this package, of installed plugins, and of modules that are already imported.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.registry import class_path, plugins, printable, subclasses
from spar_lightning.configs.renamed import upgraded
from spar_lightning.errors import UserError
from spar_lightning.refinement.base import Refinement
from spar_lightning.segmentation.config import InferenceConfig

HEADER: Final = "spar_lightning"  # key of the metadata
PACKAGE: Final = "spar_lightning_plugin"  # key of the name and version of the package with the backbone, if any


def read_header(file: Path) -> dict[str, Any] | None:
    """Return the `model` block in the metadata of a safetensors file, or None if it has no header.

    Raises:
        UserError: The file is not a safetensors file, or its header is damaged or names an unknown class.
    """
    try:
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata() or {}
            recorded = metadata.get(HEADER)
    except Exception as error:  # safetensors raises a direct subclass of Exception
        raise UserError(f"{file} cannot be read as safetensors ({error}). Download or export it again.") from error
    if recorded is None:
        return None
    try:
        block = json.loads(recorded)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its header is not valid JSON ({error}). Export it again.") from error
    if not isinstance(block, Mapping) or not block.get("backbone"):
        raise UserError(f"{file}: its header does not name a backbone. Export it again.")
    names = ("backbone", *InferenceConfig.__dataclass_fields__)  # other settings could name classes, too
    model = {key: value for key, value in upgraded({"model": block})["model"].items() if key in names}
    known = known_paths()
    for path in _classes(model):
        if path not in known:
            package = f" (package {printable(metadata[PACKAGE])})" if PACKAGE in metadata else ""
            raise UserError(
                f"{file} names the class {path!r}{package}, which is not part of spar_lightning or of an installed "
                "plugin. If you trust it, install its package, pass the YAML file of the training (--config, or "
                "config=.. in Python), or import the class before spar_lightning.load."
            )
    return model


def known_paths() -> set[str]:
    """Return the names and full paths of all imported backbones and refinements, also by their parent packages."""
    plugins()  # imports them
    known: set[str] = set()
    for cls in (*subclasses(Backbone), *subclasses(Refinement)):
        packages = cls.__module__.split(".")
        known |= {cls.__name__, class_path(cls)}
        known |= {f"{'.'.join(packages[:end])}.{cls.__qualname__}" for end in range(1, len(packages))}
    return known


def _classes(value: Any, is_class: bool = False) -> Iterator[str]:
    """Yield all class paths in a model block."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _classes(part, key in ("backbone", "refine", "class_path"))
    elif isinstance(value, list):
        for part in value:
            yield from _classes(part)
    elif is_class and value is not None:
        yield str(value)
