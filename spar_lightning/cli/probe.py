"""`spar probe`: probes of a frozen backbone, vision only; one action per probe."""

from collections.abc import Sequence
from importlib import import_module
from typing import Final

from spar_lightning.cli.help import CommandParser
from spar_lightning.errors import UserError, nearest

PROBES: Final = ("linear", "knn", "panoptic")

DESCRIPTION = """Measure how much the patch features of a frozen backbone know about the classes of a benchmark.

`linear` trains a linear layer on them, `knn` labels a patch like the most similar training patches (Tables 4 and 7 of
the paper). Both do not use text, so that backbones without a text encoder can be measured, too.

`panoptic` classifies the segments of the ground truth by class names (Table 8).

`spar probe PROBE --help` lists the options of a probe."""
EXAMPLES = (
    "spar probe knn --weights tiny --benchmark data/scenes/seed-0/scenes_192 --train data/scenes/seed-0/scenes_64",
    "spar probe knn --help",
)


def run(args: Sequence[str]) -> int:
    """Run a probe."""
    parser = CommandParser("spar probe", DESCRIPTION, EXAMPLES, f"{{{','.join(PROBES)}}} [options]")
    if not args or args[0].startswith("-"):
        parser.parse_args(args)
        raise UserError(f"The probe is missing. Pass one of: {', '.join(PROBES)}.")
    if args[0] not in PROBES:
        raise UserError(f"Unknown probe {args[0]!r}. {nearest(args[0], PROBES)}Allowed: {', '.join(PROBES)}.")
    code: int = import_module(f"spar_lightning.cli.probe_{args[0]}").run(args[1:])
    return code
