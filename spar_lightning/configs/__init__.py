"""Bundled YAML configurations (package data), found by name."""

import os
from importlib import resources
from pathlib import Path


def shipped() -> dict[str, Path]:
    """Return the paths of the bundled configurations by name: those of models, then those of rows of tables."""
    folder = Path(str(resources.files("spar_lightning.configs")))
    return {path.stem: path for place in (folder, folder / "tables") for path in sorted(place.glob("*.yaml"))}


def bundled_names() -> str:
    """Return the names of the bundled configurations for an error message."""
    models = [name for name in shipped() if not name.startswith("table")]
    return f"{', '.join(models)}, or a row of one of the paper's tables (spar configs lists them)"


def find(given: str) -> str:
    """Return the path of a bundled configuration by name; other values and existing files are returned unchanged."""
    known = shipped()
    return str(known[given]) if given in known and not os.path.isfile(given) else given
