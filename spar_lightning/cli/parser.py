"""Parsers with errors of one screen: what was given, the nearest valid names, what to do.

jsonargparse says what is wrong; the sentence is cut from the usage text around it, and unknown names are compared with
those that exist.
"""

import inspect
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.registry import check_usable, subclasses
from spar_lightning.configs import shipped
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.distillation import Distillation
from spar_lightning.errors import nearest
from spar_lightning.refinement.base import Refinement
from spar_lightning.segmentation.config import InferenceConfig

BASES = {"backbone": Backbone, "data": SA1B, "refine": Refinement}  # by the last part of a key


class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and epilogs as they are."""


class Parser(LightningArgumentParser):
    """Prints a sentence and exits with 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # argparse would take --model.strid for --model.stride

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        prog = self.prog.split(" [")[0] if self.prog.startswith("spar") else "spar"
        print(f"{prog}: error: {explain(message, self._own())}", file=sys.stderr)
        sys.exit(2)

    def _own(self) -> set[str]:
        """Return the names of this parser's options."""
        return {name.lstrip("-") for action in self._actions for name in action.option_strings}


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Return jsonargparse's message with what a user needs to fix it.

    Args:
        message: About an argument or a key.
        options: Names that the parser knows.
    """
    text = " ".join(message.split())
    if found := re.search(r"File does not exist: '(.+?)'", text):
        names = shipped()
        return (
            f"There is no file {found[1]}. {nearest(found[1], names)}Give a YAML file, or the name of a shipped one: "
            f"{', '.join(names)}."
        )
    if found := re.search(r"(?:Option|option) '([^']+)'", text) or re.search(r"[Uu]nrecognized arguments: (\S+)", text):
        given = found[1].lstrip("-").split("=")[0]
        return f"{text}. {_nearest_key(given, options)}The command with --help lists all keys."
    if found := re.search(r'key "([\w.]+)": .*Expected a dot import path string: (\S+)', text):
        check_usable(found[2])
        base = BASES.get(found[1].rpartition(".")[2])
        classes = [cls.__name__ for cls in subclasses(base)] if base else []
        return (
            f"{found[1]}: no class is called {found[2]!r}. {nearest(found[2], classes)}"
            f"Allowed are {', '.join([*classes, ''])}and the full path of any other class: package.module.Class."
        )
    if found := re.search(r'key "([\w.]+)": .*Expected a typing\.Literal\[(.+?)\].*value: (\S+)$', text):
        allowed = [name.strip("'") for name in found[2].split(", ")]
        return f"{found[1]}: got {found[3]!r}. {nearest(found[3], allowed)}Allowed are {', '.join(allowed)}."
    if found := re.search(r'key "([\w.]+)": .*\.(\w+) is abstract', text):
        known = [cls.__name__ for base in BASES.values() if base.__name__ == found[2] for cls in subclasses(base)]
        return f"{found[1]} has settings but no class. Give it first: --{found[1]} CLASS, of {', '.join(known)}."
    if "arguments are required" in text:
        return f"{text}. They usually come from a file: --config quickstart."
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", text)


def _nearest_key(given: str, options: Iterable[str]) -> str:
    """Return a hint with valid names like a key, among the commands' own keys and the arguments of known classes."""
    known = [cls for base in BASES.values() for cls in subclasses(base)]
    classes = [Distillation, InferenceConfig, Augmentation, *known]
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    names |= {"config", "seed_everything", "run_dir", "resume", "overwrite", "trainer", "model", "data", *options}
    return nearest(given.split(".")[-1], names)
