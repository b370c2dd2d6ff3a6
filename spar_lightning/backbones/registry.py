"""Backbones of other packages, found through the entry point group `spar_lightning.backbones`.

An installed package registers its backbone class in that group. Once the class is imported, its short name
can be used in configurations. A plugin that cannot be imported only causes a warning; its error is raised
when the plugin is requested by name.
"""

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError, nearest

GROUP = "spar_lightning.backbones"
log = logging.getLogger("spar_lightning")


class PluginError(UserError):
    """Error for a requested plugin that cannot be imported."""


@dataclass(frozen=True)
class Plugin:
    """Entry point of a plugin, with its class or the error that its import raised."""

    name: str
    path: str
    package: str
    backbone: type[Backbone] | None
    error: BaseException | None

    @property
    def reason(self) -> str:
        """Type and text of the error, on one line."""
        return printable(f"{type(self.error).__name__}: {self.error}")


@cache
def plugins() -> tuple[Plugin, ...]:
    """Return all installed plugins, imported once per process; log a warning for each broken one."""
    found = tuple(_load(entry) for entry in entry_points(group=GROUP))
    for plugin in found:
        if plugin.error is not None:
            log.warning(f"The backbone plugin {plugin.name} of {plugin.package} cannot be used: {plugin.reason}")
    return found


def check_usable(name: str) -> None:
    """Raise PluginError if `name` is the name or class path of a plugin that cannot be imported."""
    for plugin in plugins():
        if plugin.error is not None and name in (plugin.name, plugin.path):
            raise PluginError(
                f"The backbone plugin {name} of {plugin.package} cannot be imported: {plugin.reason}. Fix or uninstall "
                "that package."
            ) from plugin.error


def find_backbone(name: str) -> type[Backbone]:
    """Return the backbone class for a short name (case-insensitive) or a full class path.

    Raises:
        UserError: No backbone has this name.
        PluginError: The plugin with this name cannot be imported.
    """
    plugins()  # their classes are known only after they were imported
    known = {class_path(cls): cls for cls in subclasses(Backbone)}
    named = [path for path, cls in known.items() if name.lower() == cls.__name__.lower()]
    if len(named) > 1:
        raise UserError(f"Several backbones are named {name!r}. Pass the full path. Allowed: {', '.join(named)}.")
    if named:
        return known[named[0]]
    check_usable(name)
    module, _, attribute = name.rpartition(".")
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ImportError(f"{name!r} is not a class path")
        cls = getattr(import_module(module or "spar_lightning.backbones"), attribute)
    except (ImportError, AttributeError) as error:
        names = [cls.__name__ for cls in known.values()]
        raise UserError(
            f"Unknown backbone {name!r} ({error}). {nearest(name, names)}Allowed: {', '.join(names)}, and the "
            "full path of any other backbone class."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Backbone)):
        raise UserError(f"{name} is not a subclass of spar_lightning.backbones.Backbone.")
    return cls


def package_of(cls: type[Backbone]) -> str | None:
    """Return name and version of the plugin package that registers a class, or None."""
    return next((plugin.package for plugin in plugins() if plugin.backbone is cls), None)


def class_path(cls: type) -> str:
    """Return the full path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def printable(text: str) -> str:
    """Return a text of another package on one line, with control characters as escape sequences."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.split()))


def subclasses(base: type) -> list[type]:
    """Return `base` and all its subclasses, direct or indirect, without abstract classes and duplicates."""
    found = [] if inspect.isabstract(base) else [base]
    below: list[type] = base.__subclasses__()
    return list(dict.fromkeys([*found, *(cls for child in below for cls in subclasses(child))]))


def _load(entry: EntryPoint) -> Plugin:
    distribution = entry.dist
    package = printable(f"{distribution.name} {distribution.version}") if distribution else "an unknown package"
    name, path = printable(entry.name), printable(entry.value.replace(":", "."))
    try:
        backbone = entry.load()
        if not (isinstance(backbone, type) and issubclass(backbone, Backbone)):
            raise TypeError(f"{path} is not a subclass of spar_lightning.backbones.Backbone")
    except (Exception, SystemExit) as error:  # the import of a plugin can raise any exception
        return Plugin(name, path, package, None, error)
    return Plugin(name, path, package, backbone, None)
