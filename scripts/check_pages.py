"""Check that the built pages contain every public name of the package, and that each has a docstring.

    mkdocs build --strict --site-dir SITE && python scripts/check_pages.py SITE

A public name is a class or function of a module, or a method or property of a class, without a leading underscore. A
method that overrides a documented one needs no docstring and no entry of its own.
"""

import ast
import inspect
import sys
import zlib
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import FunctionType

import spar_lightning


def public_names() -> Iterator[tuple[str, object]]:
    """Yield dotted name and object of every public class, function, method and property."""
    for info in walk_packages(spar_lightning.__path__, "spar_lightning."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        module = import_module(info.name)
        defined = {getattr(node, "name", "_") for node in ast.parse(inspect.getsource(module)).body}
        for name, value in vars(module).items():
            if name.startswith("_") or name not in defined:
                continue
            if isinstance(value, FunctionType):
                yield f"{info.name}.{name}", value
            elif inspect.isclass(value):
                yield f"{info.name}.{name}", value
                for member, part in vars(value).items():
                    function = getattr(part, "__func__", part)  # of a static or class method
                    own = isinstance(part, property | cached_property) or (
                        isinstance(function, FunctionType) and function.__qualname__.startswith(f"{name}.")
                    )
                    if own and not member.startswith("_"):
                        yield f"{info.name}.{name}.{member}", getattr(value, member)


def inherited(name: str) -> bool:
    """Return whether a member is documented by a base class of its class."""
    path, _, member = name.rpartition(".")
    module, _, owner = path.rpartition(".")
    cls = getattr(import_module(module), owner) if module in sys.modules else None
    return inspect.isclass(cls) and any(inspect.getdoc(vars(base).get(member)) for base in cls.__mro__[1:])


def main(site: Path) -> int:
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    shown = {line.split(" ", 1)[0] for line in inventory.splitlines()}
    names = dict(public_names())
    undocumented = [name for name, value in names.items() if not inspect.getdoc(value)]
    absent = [name for name, value in names.items() if name not in shown and not inherited(name)]
    for title, found in (("without a docstring", undocumented), ("not in the API reference", absent)):
        print("\n".join(f"{name}: {title}" for name in found), end="\n" if found else "")
    print(f"{len(names)} public names, {len(undocumented)} without a docstring, {len(absent)} not in the API reference")
    return 1 if undocumented or absent else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
