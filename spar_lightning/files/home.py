"""Home folder in paths: `~/x` in a configuration or after an equals sign, which the shell does not replace."""

import os
from argparse import Namespace
from collections.abc import Mapping
from copy import copy
from typing import Any

from spar_lightning.errors import UserError


def expand_home(value: Any) -> Any:
    """Replace `~`, `~/x` and `~user/x` by paths in the home folder, also in lists, mappings and namespaces.

    Other values are returned unchanged, and so is a path of a user who does not exist.

    Raises:
        UserError: The home folder of this user is not known.
    """
    if isinstance(value, str):
        return _expanded(value) if value == "~" or _is_home(value) else value
    if isinstance(value, list | tuple):
        return type(value)([expand_home(item) for item in value])
    if isinstance(value, Mapping):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, Namespace):  # also that of jsonargparse
        value = copy(value)
        vars(value).update(expand_home(vars(value)))
    return value


def expand_argument(arg: str) -> str:
    """Replace `~/x` and `~user/x` in an argument of the command line, which may have the form `--name=~/x`.

    Raises:
        UserError: The home folder of this user is not known.
    """
    name, equals, value = arg.partition("=")
    if equals and name.startswith("-"):
        return f"{name}={_expanded(value)}" if _is_home(value) else arg
    return _expanded(arg) if _is_home(arg) else arg


def _is_home(value: str) -> bool:
    return value.startswith("~") and "/" in value


def _expanded(path: str) -> str:
    found = os.path.expanduser(path)
    if found == path and (path == "~" or path.startswith("~/")):
        raise UserError(f"{path}: the home folder is not known. Set the variable HOME, or pass the complete path.")
    return found
