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
    error: Exception | None


@cache
def plugins() -> tuple[Plugin, ...]:
    """Return all installed plugins, imported once per process; log a warning for each broken one."""
    found = tuple(_load(entry) for entry in entry_points(group=GROUP))
    for plugin in found:
        if plugin.error is not None:
            log.warning(
                f"The backbone plugin {plugin.name} of {plugin.package} cannot be used: "
                f"{type(plugin.error).__name__}: {plugin.error}"
            )
    return found


def check_usable(name: str) -> None:
    """Raise PluginError if `name` is the name or class path of a plugin that cannot be imported."""
    for plugin in plugins():
        if plugin.error is not None and name in (plugin.name, plugin.path):
            raise PluginError(
                f"The backbone plugin {name} of {plugin.package} cannot be imported: "
                f"{type(plugin.error).__name__}: {plugin.error}. Fix or uninstall that package."
            ) from plugin.error


def find_backbone(name: str) -> type[Backbone]:
    """Return the backbone class for a short name (case-insensitive) or a full class path.

    Raises:
        UserError: No backbone has this name.
        PluginError: The plugin with this name cannot be imported.
    """
    check_usable(name)
    known = {cls.__name__: cls for cls in subclasses(Backbone)}
    for short, cls in known.items():
        if name.lower() == short.lower():
            return cls
    module, _, attribute = name.rpartition(".")
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ImportError(f"{name!r} is not a class path")
        cls = getattr(import_module(module or "spar_lightning.backbones"), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"Unknown backbone {name!r} ({error}). {nearest(name, known)}Allowed: {', '.join(known)}, and the "
            "full path of any other backbone class."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Backbone)):
        raise UserError(f"{name} is not a subclass of spar_lightning.backbones.Backbone.")
    return cls


def subclasses(base: type) -> list[type]:
    """Return `base` and all its subclasses, direct or indirect, without abstract classes and duplicates."""
    found = [] if inspect.isabstract(base) else [base]
    below: list[type] = base.__subclasses__()
    return list(dict.fromkeys([*found, *(cls for child in below for cls in subclasses(child))]))


def _load(entry: EntryPoint) -> Plugin:
    distribution = entry.dist
    package = f"{distribution.name} {distribution.version}" if distribution else "an unknown package"
    path = entry.value.replace(":", ".")
    try:
        backbone = entry.load()
        if not (isinstance(backbone, type) and issubclass(backbone, Backbone)):
            raise TypeError(f"{path} is not a subclass of spar_lightning.backbones.Backbone")
    except Exception as error:  # the import of a plugin can raise any exception
        return Plugin(entry.name, path, package, None, error)
    return Plugin(entry.name, path, package, backbone, None)
