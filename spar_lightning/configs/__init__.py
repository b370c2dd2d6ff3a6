"""The YAML files that ship, as data of the package, and how they are found by name."""

from importlib import resources
from pathlib import Path


def shipped() -> dict[str, Path]:
    """Configurations of the package by name, in order."""
    folder = Path(str(resources.files("spar_lightning.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def named(given: str) -> str:
    """The path of the shipped file, if it is the name of one and no file is called so; otherwise as given."""
    known = shipped()
    return str(known[given]) if given in known and not Path(given).is_file() else given
