"""Bundled YAML configurations (package data), found by name."""

import os
from importlib import resources
from pathlib import Path


def shipped() -> dict[str, Path]:
    """Return the paths of the bundled configurations by name, sorted."""
    folder = Path(str(resources.files("spar_lightning.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(given: str) -> str:
    """Return the path of a bundled configuration by name; other values and existing files are returned unchanged."""
    known = shipped()
    return str(known[given]) if given in known and not os.path.isfile(given) else given
