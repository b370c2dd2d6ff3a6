"""Arguments of the backbone that follow a verb as --model.backbone.NAME VALUE, as they do behind `spar fit`."""

from collections.abc import Sequence
from typing import Any

import yaml

from spar_lightning.errors import UserError


def backbone_arguments(verb: str, rest: Sequence[str]) -> dict[str, Any]:
    """What a verb's own parser has left, by name of the backbone's argument.

    Raises:
        UserError: Something else is left.
    """
    words = [word for arg in rest for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    found = {}
    for i in range(0, len(words), 2):
        key = words[i].removeprefix("--model.backbone.").removeprefix("init_args.")
        if key == words[i] or i + 1 == len(words):
            raise UserError(
                f"spar {verb} does not know {words[i]}. `spar {verb} --help` lists its options; arguments of the "
                "backbone follow as --model.backbone.NAME VALUE."
            )
        try:
            found[key] = yaml.safe_load(words[i + 1])
        except yaml.YAMLError as error:
            raise UserError(f"{words[i]}: {words[i + 1]!r} is no value that YAML can read.") from error
    return found
