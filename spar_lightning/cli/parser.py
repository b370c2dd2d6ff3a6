"""LightningCLI's parser with errors of one screen: what was given, the nearest valid names, what helps.

jsonargparse says what is wrong; here its sentence is cut from the usage text around it, and names
that nothing knows are compared with those that exist.
"""

import inspect
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.plugins import check_usable, subclasses
from spar_lightning.configs import shipped
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.distillation import Distillation
from spar_lightning.errors import nearest
from spar_lightning.refine import LPOSS

BASES = (Backbone, SA1B)


class Parser(LightningArgumentParser):
    """Prints a sentence and exits with 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # argparse would take --model.strid for --model.stride

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"spar: error: {explain(message)}", file=sys.stderr)
        sys.exit(2)


def explain(message: str) -> str:
    """Jsonargparse's message with what a user needs to mend it."""
    text = " ".join(message.split())
    if found := re.search(r"File does not exist: '(.+?)'", text):
        names = shipped()
        return (
            f"There is no file {found[1]}. {nearest(found[1], names)}Give a YAML file, or the name of one that ships: "
            f"{', '.join(names)}."
        )
    if found := re.search(r"(?:Option|option) '([^']+)'", text) or re.search(r"[Uu]nrecognized arguments: (\S+)", text):
        given = found[1].lstrip("-").split("=")[0]
        return f"{text}. {_nearest_key(given)}`spar fit --help` lists all keys."
    if found := re.search(r'key "([\w.]+)": .*Expected a typing\.Literal\[(.+?)\].*Given value: (\S+)$', text):
        allowed = [name.strip("'") for name in found[2].split(", ")]
        return (
            f"{found[1]}: there is no {found[3]!r}. {nearest(found[3], allowed)}Allowed are {', '.join(allowed)}, "
            "and single settings below this key; `spar fit --help` lists them."
        )
    if found := re.search(r'key "([\w.]+)": .*Expected a dot import path string: (\S+)', text):
        check_usable(found[2])
        classes = [cls.__name__ for base in BASES for cls in subclasses(base)]
        return (
            f"{found[1]}: no class is called {found[2]!r}. {nearest(found[2], classes)}"
            f"Known are {', '.join(classes)}, and the full path of any other class, such as package.module.Class."
        )
    if "arguments are required" in text:
        return f"{text}. They usually come from a file: --config configs/quickstart.yaml."
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", text)


def _nearest_key(given: str) -> str:
    """Valid names like a key, looked for in the verb's own keys and in the arguments of known classes."""
    classes = [Distillation, LPOSS, *(cls for base in BASES for cls in subclasses(base))]
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    names |= {"config", "seed_everything", "run_dir", "resume", "overwrite", "trainer", "model", "data"}
    return nearest(given.split(".")[-1], names)
