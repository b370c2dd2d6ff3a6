"""Files of class names, written for this project or for other projects on open vocabularies.

A text file (.txt) has one class per line. The names of a class are separated by `;`, or by `,` if the line has no `;`;
`label: name, name` sets the label. A JSON file (.json) is a list of such lines, of lists of names, or of objects with
the key `name` as in detectron2 (in the order of `trainId`, if they have one); a COCO file with `categories`; or an
object that maps labels to names.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from spar_lightning.errors import UserError
from spar_lightning.segmentation.prompts import parse_classes

log = logging.getLogger("spar_lightning")

SUFFIXES: Final = (".txt", ".json")


def read_class_file(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the names of each class by its label, in the order of the file.

    Only one of several classes with the same name could be predicted. Such a name is kept by the class of which it is
    the first name, or else by the one with the fewest names; the others keep their other names. A warning says which
    names this concerns.

    Args:
        path: Path of a .txt or .json file.

    Raises:
        UserError: The file cannot be read, has another format, or contains a class without a name of its own.
    """
    lines = _read(path)
    parts = [_parse(line, number, path) for number, line in enumerate(lines, start=1)]
    owners: dict[str, tuple[bool, int, int]] = {}
    shared: set[str] = set()
    for number, (_, names) in enumerate(parts):
        for place, name in enumerate(names):
            rank = (place > 0, len(names), number)
            shared |= {name} & {*owners}
            owners[name] = min(owners.get(name, rank), rank)
    classes: dict[str, tuple[str, ...]] = {}
    for number, (label, names) in enumerate(parts):
        own = tuple(name for name in names if owners[name][2] == number)
        if not own:
            raise UserError(
                f"{path}: class number {number + 1} ({', '.join(names)}) has no name of its own, because other classes "
                "have the same names. Remove it or add a name."
            )
        classes[label or own[0]] = own
    if len(classes) < len(parts):
        raise UserError(f"{path}: two of its {len(parts)} classes have the same label. Labels must be unique.")
    if shared:
        some = ", ".join([*sorted(shared)[:3], *([".."] if len(shared) > 3 else [])])
        log.warning("%s: %d names that several classes have are kept by one of them (%s).", path, len(shared), some)
    return parse_classes(classes)


def _read(path: Path) -> list[Any]:
    """Return the entries of a file, one for each class, in the order of the class ids."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path} is not a file of class names. Pass a .txt file with one class per line, or a .json file."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    except OSError as error:
        raise UserError(
            f"{path}: file not found ({error.strerror}). Pass a text file with one class per line, or a JSON file."
        ) from error
    if isinstance(content, dict):
        content = content.get("categories", [{"name": names, "label": label} for label, names in content.items()])
    if not isinstance(content, list):
        raise UserError(f"{path} must contain a list of classes, but contains {type(content).__name__}.")
    lines: list[Any] = [line for line in content if not isinstance(line, str) or line.strip()]
    if not lines:
        raise UserError(f"{path} contains no classes. Write one class per line.")
    if len(lines) == 1 and ";" in str(lines[0]) and path.suffix.lower() == ".txt":
        raise UserError(
            f"{path} has one line, in which `;` would separate names of one class. Write one class per line."
        )
    if any(isinstance(line, dict) and "trainId" in line for line in lines):
        by_id = {line.get("trainId"): line for line in lines if isinstance(line, dict)}
        if {*by_id} != {*range(len(lines))}:
            raise UserError(
                f"{path}: trainId must be the class id of each entry, from 0 to {len(lines) - 1} without gaps. Remove "
                "entries that are not classes, such as those with -1 or 255."
            )
        return [by_id[number] for number in range(len(lines))]
    return lines


def _parse(entry: Any, number: int, path: Path) -> tuple[str, tuple[str, ...]]:
    """Return label (may be empty) and names of an entry."""
    label = ""
    if isinstance(entry, dict):
        label, entry = entry.get("label", ""), entry.get("name")
    if isinstance(entry, str) and not label:
        before, colon, rest = entry.partition(":")
        label, entry = (before.strip(), rest) if colon else ("", entry)
    names = _separated(entry) if isinstance(entry, str) else entry
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in (label, *names)):
        raise UserError(f"{path}: class number {number} has no name: {entry!r}. Write a name or a list of names.")
    names = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise UserError(f"{path}: class number {number} has no name. Write one class per line.")
    return label, names


def _separated(line: str) -> list[str]:
    return line.split(";" if ";" in line else ",")
