"""Parser of the commands that read a configuration: short help, and errors of one sentence.

An error says what was given, which names are closest, and what is allowed. jsonargparse's own messages are shortened
to the sentence that names the cause.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.registry import check_usable, subclasses
from spar_lightning.cli.help import ShortHelp
from spar_lightning.configs import bundled_names, shipped
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.distillation import Distillation
from spar_lightning.errors import nearest
from spar_lightning.losses import ClassSimilarityLoss, CosineLoss, GramLoss, MSECosineLoss
from spar_lightning.refinement.base import Refinement
from spar_lightning.segmentation.config import InferenceConfig

BASES = {"backbone": Backbone, "data": SA1B, "refine": Refinement}  # by the last part of a key
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
# Imported, so that their names are known.
LOSSES = (nn.MSELoss, CosineLoss, MSECosineLoss, GramLoss, ClassSimilarityLoss)


class Parser(ShortHelp, LightningArgumentParser):
    """Parser with short help; an error is one sentence and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # argparse would take --model.strid for --model.stride

    def parse_args(self, args: Any = None, *more: Any, **settings: Any) -> Any:
        """Parse arguments; see the base class."""
        self._given = [arg for arg in args or () if isinstance(arg, str)]
        return super().parse_args(args, *more, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        prog = self.prog.split(" [")[0] if self.prog.startswith("spar") else "spar"
        if "codec can't encode" in message:
            wrong = next((arg for arg in self._given if os.fsencode(arg).decode(errors="replace") != arg), message)
            message = f"{wrong!a} is not valid UTF-8. Rename the file, or pass a link with another name."
        print(f"{prog}: error: {explain(message, self._own())}", file=sys.stderr)
        sys.exit(2)

    def _own(self) -> set[str]:
        """Return the names of the options of this parser."""
        return {name.lstrip("-") for action in self._actions for name in action.option_strings}


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Return the message of jsonargparse, completed by the nearest valid names and what to do.

    Args:
        message: Message about an argument or a key.
        options: Names of the options that the parser knows.
    """
    text = " ".join(message.split())
    if found := re.search(r"File does not exist: '(.+?)'", text):
        return (
            f"No file {found[1]!r} exists. {nearest(found[1], shipped())}Pass a YAML file, or the name of a bundled "
            f"one: {bundled_names()}."
        )
    if found := re.search(r"(?:Option|option) '([^']+)'", text) or re.search(r"[Uu]nrecognized arguments: (\S+)", text):
        given = found[1].lstrip("-").split("=")[0]
        return f"{text}. {_nearest_key(given, options)}Run the command with --help to list the options."
    if found := re.search(r'key "([\w.]+)": .*Expected a dot import path string: (\S+)', text):
        check_usable(found[2])
        if choices := re.search(r"Expected a typing\.Literal\[(.+?)\]", text):
            allowed = [choice.strip("'") for choice in choices[1].split(", ")]
            return (
                f"{found[1]}: got {found[2]!r}. {nearest(found[2], allowed)}Allowed: {', '.join(allowed)}, or settings "
                f"(--{found[1]}.help lists them)."
            )
        classes = _classes(found[1])
        known = f"{', '.join(classes)}, or " if classes else ""
        return (
            f"{found[1]}: no class is named {found[2]!r}. {nearest(found[2], classes)}"
            f"Allowed: {known}the full path of another class: package.module.Class."
        )
    if found := re.search(r'key "([\w.]+)": .*Expected a typing\.Literal\[(.+?)\].*value: (\S+)$', text):
        allowed = [name.strip("'") for name in found[2].split(", ")]
        return f"{found[1]}: got {found[3]!r}. {nearest(found[3], allowed)}Allowed: {', '.join(allowed)}."
    if found := re.search(r'key "([\w.]+)": .*\.(\w+) is abstract', text):
        return (
            f"{found[1]} has settings but no class. Pass the class first: --{found[1]} CLASS. "
            f"Allowed: {', '.join(_classes(found[1]))}."
        )
    if found := re.search(r'key "([\w.]+)": Does not validate .*Subtypes: \[(.+?)\] .*Given value: (.+)$', text):
        types = re.findall(r"<class '(\w+)'>", found[2])
        if set(types) <= set(TYPES):
            return f"{found[1]}: got {found[3]!r}. Allowed: {' or '.join(TYPES[name] for name in types)}."
    if "arguments are required" in text:
        return f"{text}. They usually come from a configuration: --config quickstart."
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", text)


def _classes(key: str) -> list[str]:
    """Return the names of the classes that a key accepts by name."""
    name = key.rpartition(".")[2]
    if name in ("loss", "base"):
        return [cls.__name__ for cls in LOSSES]
    return [cls.__name__ for cls in subclasses(BASES[name])] if name in BASES else []


def _nearest_key(given: str, options: Iterable[str]) -> str:
    """Return a hint with the names closest to a key: options of the command and arguments of known classes."""
    known = [cls for base in BASES.values() for cls in subclasses(base)]
    classes = [Distillation, InferenceConfig, WindowedAttention, Augmentation, *known]
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    names |= {"config", "seed_everything", "run_dir", "resume", "overwrite", "trainer", "model", "data", *options}
    return nearest(given.split(".")[-1], names)
