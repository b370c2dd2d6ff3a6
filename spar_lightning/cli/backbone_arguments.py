"""Backbone arguments on the command line, written as --model.backbone.NAME VALUE as for `spar fit`."""

from collections.abc import Sequence
from typing import Any

import yaml

from spar_lightning.errors import UserError

PREFIX = "--model.backbone."


def split_backbone_arguments(args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split command-line arguments into those of the command and those of the backbone.

    Returns:
        The arguments of the command, in order, and the backbone arguments as a mapping of name to parsed YAML value.

    Raises:
        UserError: A backbone argument has no value, or its value is not valid YAML.
    """
    others: list[str] = []
    found: dict[str, Any] = {}
    rest = iter(args)
    for arg in rest:
        if not arg.startswith(PREFIX):
            others.append(arg)
            continue
        name, equals, value = arg.removeprefix(PREFIX).partition("=")
        text = value if equals else next(rest, None)
        if text is None:
            raise UserError(f"{arg} has no value. Pass {arg} VALUE.")
        try:
            found[name.removeprefix("init_args.")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{PREFIX}{name}: {text!r} is not a valid YAML value.") from error
    return others, found
