"""Backbones of other packages, found through the entry point group `spar_lightning.backbones`.

An installed package names its class under that group; importing it makes it a subclass of
`Backbone`, and so a short name in configurations. A plugin that cannot be imported is reported
and costs nothing else; its error is raised only when somebody asks for it by name.
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
    """A plugin was asked for that cannot be imported."""


@dataclass(frozen=True)
class Plugin:
    """One entry point: its class, or the error that importing it raised."""

    name: str
    path: str
    package: str
    backbone: type[Backbone] | None
    error: Exception | None


@cache
def plugins() -> tuple[Plugin, ...]:
    """All plugins that are installed, imported once per process; broken ones are warned about."""
    found = tuple(_load(entry) for entry in entry_points(group=GROUP))
    for plugin in found:
        if plugin.error is not None:
            log.warning(
                f"The backbone plugin {plugin.name} of {plugin.package} cannot be used: "
                f"{type(plugin.error).__name__}: {plugin.error}"
            )
    return found


def check_usable(name: str) -> None:
    """Raise PluginError, from the original error, if `name` is the name or class path of a broken plugin."""
    for plugin in plugins():
        if plugin.error is not None and name in (plugin.name, plugin.path):
            raise PluginError(
                f"The backbone plugin {name} of {plugin.package} cannot be imported: "
                f"{type(plugin.error).__name__}: {plugin.error}. Mend or uninstall that package."
            ) from plugin.error


def find_backbone(name: str) -> type[Backbone]:
    """The backbone class of a short name, in any case of letters, or of a full path.

    Raises:
        UserError: There is none.
        PluginError: A plugin of that name cannot be imported.
    """
    check_usable(name)
    known = {cls.__name__: cls for cls in subclasses(Backbone)}
    for short, cls in known.items():
        if name.lower() == short.lower():
            return cls
    module, _, attribute = name.rpartition(".")
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ImportError(f"{name!r} is no path of a class")
        cls = getattr(import_module(module or "spar_lightning.backbones"), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"No backbone is called {name!r} ({error}). {nearest(name, known)}Known are {', '.join(known)}, and the "
            "full path of any other class."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Backbone)):
        raise UserError(f"{name} is no subclass of spar_lightning.backbones.Backbone.")
    return cls


def subclasses(base: type) -> list[type]:
    """Return the base and everything below it that can be constructed, each once."""
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
            raise TypeError(f"{path} is no subclass of spar_lightning.backbones.Backbone")
    except Exception as error:  # whatever a foreign import raises
        return Plugin(entry.name, path, package, None, error)
    return Plugin(entry.name, path, package, backbone, None)
