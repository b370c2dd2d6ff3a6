"""Checks of the module in which the backbone is defined."""

import subprocess
import sys
from importlib import import_module
from typing import Final

from spar_lightning.backbones.base import Backbone
from spar_lightning.testing.check import Factory

HEAVY: Final = ("lightning", "open_clip", "timm", "torchvision", "transformers")


def found_by_short_name(factory: Factory) -> None:
    """Check that configurations find the class by its name."""
    from jsonargparse import ArgumentParser

    cls = type(factory())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    path: str = parser.parse_args(["--backbone", cls.__name__]).backbone.class_path
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    assert found is cls, f"the short name {cls.__name__} refers to another class, {path}"


def import_is_fast(factory: Factory) -> None:
    """Check that the module imports no heavy library; functions may do so when called."""
    module = type(factory()).__module__
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{module} cannot be imported: {done.stderr.strip().splitlines()[-1]}"
    found = set(HEAVY) & set(done.stdout.split())
    assert not found, f"importing {module} imports {', '.join(sorted(found))}; import them inside functions"
