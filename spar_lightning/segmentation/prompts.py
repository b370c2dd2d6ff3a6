"""Classes and prompt templates, and the text embeddings of class names.

A class can have several names (prompt synonyms). Its score is the largest similarity of its names, so a pixel gets
the class of its best name. Each name is inserted into every template, and the unit vectors of these prompts are
averaged (paper, supplement).

Shapes: Q names, C classes, d channels.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError

Classes = Sequence[str] | Mapping[str, Sequence[str]]
Templates = Literal["openai_imagenet"] | Sequence[str]
SAME: Final = 1e-5  # distance of unit vectors; larger than the rounding differences between machines


def prompt_templates(given: Templates) -> tuple[str, ...]:
    """Return the prompt templates of a named set, or the given list; `{}` stands for the class name.

    `openai_imagenet` contains the 80 templates of CLIP's evaluation on ImageNet (configs/templates).

    Raises:
        UserError: If the set is unknown, the list is empty, or a template lacks `{}`.
    """
    if given == "openai_imagenet":
        file = resources.files("spar_lightning.configs") / "templates" / "openai_imagenet.txt"
        return tuple(file.read_text(encoding="ascii").splitlines())
    if isinstance(given, str) or not given or not all("{}" in template for template in given):
        raise UserError(
            "templates must be openai_imagenet, or a list of prompts that contain {} in place of the class name, "
            f"but got {given!r}."
        )
    return tuple(given)


def embed_name(encode_text: Callable[[Sequence[str]], Tensor], name: str, templates: Sequence[str]) -> Tensor:
    """Return the text embedding of a class name, a unit vector (d).

    The embeddings of its prompts are normalized, averaged over the templates, and normalized again.

    Args:
        encode_text: Function from prompts (n) to embeddings (n, d).
        name: Class name.
        templates: Prompts with `{}` in place of the name.
    """
    prompts = encode_text([template.replace("{}", name) for template in templates])  # (templates, d)
    return F.normalize(F.normalize(prompts.float(), dim=-1).mean(0), dim=-1)


def parse_classes(given: str | Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Parse the classes that a user passed into a mapping from label to names.

    The string `cat; grass, lawn; background: wall, floor` defines three classes: `;` separates classes, and `,`
    separates the names of a class. The label is the text before a `:`, otherwise the first name. In a string of
    several lines without `;`, each line is one class, as in a text file. Each item of a list is one class. A mapping
    maps labels to names.

    Raises:
        UserError: If a class has no name, a label or name occurs twice, spans several lines, or is not valid UTF-8.
    """
    _check_types(given)
    if isinstance(given, Mapping):
        parts = [(label, _names(given[label])) for label in given]
    else:
        parts = [_parse_class(text) for text in (_classes(given) if isinstance(given, str) else given)]
    for number, (_, names) in enumerate(parts, start=1):
        if not names or not all(name.strip() for name in names):
            raise UserError(
                f"classes: class number {number} of {len(parts)} has an empty name. "
                "Write classes as 'cat; grass, lawn; background: wall, floor'."
            )
    _refuse_twice("label", [label for label, _ in parts])
    _refuse_twice("name", [name for _, names in parts for name in names])
    _check_text(dict(parts))
    return dict(parts)


def _check_types(given: object) -> None:
    """Raise UserError unless the classes are a string, a sequence of strings or a mapping to these."""
    if isinstance(given, Mapping):
        names = [*given, *(name for names in given.values() for name in _listed(names))]
    else:
        names = _listed(given)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UserError(
            f"classes must be a string, a list of strings or a mapping from label to names, but contain {wrong[0]!r} "
            f"({type(wrong[0]).__name__}). Write each label and name as a string."
        )


def _listed(given: object) -> list[object]:
    return [*given] if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]


def _classes(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines if len(lines) > 1 and ";" not in text else text.split(";")


def _parse_class(text: str) -> tuple[str, tuple[str, ...]]:
    label, colon, rest = text.partition(":")
    names = _names(rest if colon else text)
    return (label.strip() if colon else "") or names[0], names


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (given.split(",") if isinstance(given, str) else given))
    if joined := next((name for name in names if ";" in name), None):
        raise UserError(f"classes: {joined!r} contains ';', which separates classes. Pass each class as its own item.")
    return names


def _refuse_twice(kind: str, words: Sequence[str]) -> None:
    seen: set[str] = set()
    for word in words:
        if word in seen:
            raise UserError(f"classes: the {kind} {word!r} occurs twice. Each pixel gets one class: remove one.")
        seen.add(word)


def _check_text(classes: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError for a label or name of several lines, or with bytes that are not UTF-8."""
    for word in [*classes, *(name for names in classes.values() for name in names)]:
        if len(word.strip().splitlines()) > 1:
            raise UserError(f"classes: {word!r} has several lines. Separate classes with ';', or pass a list.")
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"classes: {word!r} is not valid UTF-8. Write the class name in UTF-8.") from error


@dataclass(frozen=True)
class TextClassifier:
    """Classes of a segmentation task and the text embeddings of their names.

    Attributes:
        labels: Display name of each class (C).
        embeddings: Unit vectors of all names (Q, d).
        owner: Class index of each name (Q).
    """

    labels: tuple[str, ...]
    embeddings: Tensor
    owner: Tensor

    @classmethod
    def from_classes(cls, embed: Callable[[Sequence[str]], Tensor], classes: Classes) -> "TextClassifier":
        """Encode the names of all classes.

        Args:
            embed: Function from names (Q) to unit vectors (Q, d).
            classes: List of names, mapping from label to names, or string as for `parse_classes`, with at least one
                class. Whitespace around names is removed.

        Raises:
            UserError: If `classes` is empty, a class has no names, a class occurs twice, or the text encoder cannot
                distinguish names of two classes.
        """
        if isinstance(classes, str):
            classes = parse_classes(classes)
        _refuse_twice("label", list(classes))
        groups = classes.items() if isinstance(classes, Mapping) else ((name, (name,)) for name in classes)
        by_label = {label: _names(group) for label, group in groups}
        if not by_label or not all(group and all(group) for group in by_label.values()):
            raise UserError(f"classes: pass at least one class, each with at least one name, but got {classes!r}.")
        _check_text(by_label)
        names = [name for group in by_label.values() for name in group]
        owner = [i for i, group in enumerate(by_label.values()) for _ in group]
        made = cls(tuple(by_label), embed(names), torch.tensor(owner))
        made._check_distinct(names)
        return made

    def _check_distinct(self, names: Sequence[str]) -> None:
        """Raise UserError if names of two classes have the same embedding: the second class would never be found."""
        distances = torch.cdist(self.embeddings, self.embeddings, compute_mode="donot_use_mm_for_euclid_dist")
        same = (distances < SAME) & (self.owner[:, None] < self.owner)
        for first, second in same.nonzero().tolist()[:1]:
            one, other = (
                f"{reprlib.repr(names[i])} of class {reprlib.repr(self.labels[self.owner[i]])}" for i in (first, second)
            )
            raise UserError(
                f"classes: {one} and {other} are the same to the text encoder, which ignores case and repeated blanks "
                "and cuts long prompts. Each pixel gets one class: change or remove one of the names."
            )

    def to(self, device: torch.device) -> "TextClassifier":
        """Return a copy on `device`."""
        return replace(self, embeddings=self.embeddings.to(device), owner=self.owner.to(device))
