"""Class names to text embeddings.

A class may have several names (prompt synonyms); its score is the largest cosine of any of them, so the
class of a pixel is the owner of its best name. Each name is put into every template, and the unit
vectors of these prompts are averaged (paper, supplement).

Shapes: Q names, C classes, d channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError

Classes = Sequence[str] | Mapping[str, Sequence[str]]
Templates = Literal["openai_imagenet"] | Sequence[str]


def prompt_templates(given: Templates) -> tuple[str, ...]:
    """The templates of a set by name, or those that are given; `{}` stands for the name.

    `openai_imagenet` are the 80 of CLIP's evaluation on ImageNet (configs/templates).

    Raises:
        UserError: There is none, or one lacks `{}`.
    """
    if given == "openai_imagenet":
        file = resources.files("spar_lightning.configs") / "templates" / "openai_imagenet.txt"
        return tuple(file.read_text(encoding="ascii").splitlines())
    if isinstance(given, str) or not given or not all("{}" in template for template in given):
        raise UserError(
            f"templates: allowed are openai_imagenet, or a list of prompts with {{}} for the name, but got {given!r}."
        )
    return tuple(given)


def embed_name(encode_text: Callable[[Sequence[str]], Tensor], name: str, templates: Sequence[str]) -> Tensor:
    """One unit vector (d): normalised prompts, averaged over the templates, normalised again."""
    prompts = encode_text([template.replace("{}", name) for template in templates])  # (templates, d)
    return F.normalize(F.normalize(prompts.float(), dim=-1).mean(0), dim=-1)


def parse_classes(given: str | Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Label to names, from how people write classes.

    `cat; grass, lawn; background: wall, floor` are three classes: `;` parts them, `,` parts the names of one, whose
    first is its label unless one stands before a `:`. A list has a class in each item; a mapping is label to names.

    Raises:
        UserError: A class has no name, or a label or name comes twice.
    """
    if isinstance(given, Mapping):
        parts = [(label, _names(given[label])) for label in given]
    else:
        parts = [_parse_class(text) for text in (given.split(";") if isinstance(given, str) else given)]
    for number, (_, names) in enumerate(parts, start=1):
        if not names or not all(name.strip() for name in names):
            raise UserError(
                f"classes: number {number} of {len(parts)} has an empty name. Write classes as 'cat; grass, lawn; "
                "background: wall, floor'."
            )
    _refuse_twice("label", [label for label, _ in parts])
    _refuse_twice("name", [name for _, names in parts for name in names])
    return dict(parts)


def _parse_class(text: str) -> tuple[str, tuple[str, ...]]:
    label, colon, rest = text.partition(":")
    names = _names(rest if colon else text)
    return (label.strip() if colon else "") or names[0], names


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (given.split(",") if isinstance(given, str) else given))
    if joined := next((name for name in names if ";" in name), None):
        raise UserError(f"classes: {joined!r} holds a ';', which parts classes. Give each class an item of its own.")
    return names


def _refuse_twice(kind: str, words: Sequence[str]) -> None:
    seen: set[str] = set()
    for word in words:
        if word in seen:
            raise UserError(f"classes: the {kind} {word!r} is given twice. Every pixel gets one class: leave one out.")
        seen.add(word)


@dataclass(frozen=True)
class TextClassifier:
    """The text side of a segmentation task.

    Attributes:
        labels: Name of each class, for people (C).
        embeddings: Unit vectors of all names (Q, d).
        owner: Class of each name (Q).
    """

    labels: tuple[str, ...]
    embeddings: Tensor
    owner: Tensor

    @classmethod
    def from_classes(cls, embed: Callable[[Sequence[str]], Tensor], classes: Classes) -> "TextClassifier":
        """Encode class names: a list of names, or a mapping from label to its names.

        Args:
            embed: Names (Q) -> unit vectors (Q, d).
            classes: One or more; each name without blanks around it.

        Raises:
            UserError: There is no class, or one without names.
        """
        by_label = classes if isinstance(classes, Mapping) else {name: (name,) for name in classes}
        if not by_label or not all(by_label.values()):
            raise UserError(f"classes: give at least one, each with at least one name, but got {classes!r}.")
        names = [name.strip() for group in by_label.values() for name in group]
        owner = [i for i, group in enumerate(by_label.values()) for _ in group]
        return cls(tuple(by_label), embed(names), torch.tensor(owner))

    def to(self, device: torch.device) -> "TextClassifier":
        """The same on a device."""
        return replace(self, embeddings=self.embeddings.to(device), owner=self.owner.to(device))
