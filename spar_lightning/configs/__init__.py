"""The YAML files that ship, as data of the package, and how they are found by name."""

import os
from importlib import resources
from pathlib import Path


def shipped() -> dict[str, Path]:
    """Return the configurations of the package by name, in order."""
    folder = Path(str(resources.files("spar_lightning.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(given: str) -> str:
    """Return the path of the shipped configuration of this name, unless a file has that name; otherwise `given`."""
    known = shipped()
    return str(known[given]) if given in known and not os.path.isfile(given) else given
