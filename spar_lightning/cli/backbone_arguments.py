"""Arguments of the backbone that follow a command as --model.backbone.NAME VALUE, as they do for `spar fit`."""

from collections.abc import Sequence
from typing import Any

import yaml

from spar_lightning.errors import UserError

PREFIX = "--model.backbone."


def split_backbone_arguments(args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the other arguments, and the backbone's by name.

    Raises:
        UserError: An argument of the backbone has no value, or one that is not YAML.
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
            raise UserError(f"{arg} needs a value: {arg} VALUE.")
        try:
            found[name.removeprefix("init_args.")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{PREFIX}{name}: {text!r} cannot be read as a YAML value.") from error
    return others, found
