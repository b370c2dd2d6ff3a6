"""Option --classes of `spar predict` and `spar query`: class names, or a file of them."""

import os
import sys
from pathlib import Path
from typing import Final

from spar_lightning.errors import UserError
from spar_lightning.segmentation.class_file import SUFFIXES, read_class_file
from spar_lightning.segmentation.prompts import parse_classes

LISTS: Final = (".csv", ".tsv", ".yaml", ".yml", ".names")  # suffixes of files that contain class names


def given_classes(given: str) -> dict[str, tuple[str, ...]]:
    """Return the names of each class by its label, from the value of the option or from a file.

    Raises:
        UserError: The names are malformed, or the file cannot be read.
    """
    path = Path(given)
    if path.suffix.lower() in SUFFIXES:
        try:
            classes = read_class_file(path)
        except UserError as error:
            raise UserError(f"--classes {error}") from error
        print(f"{path}: {len(classes)} classes, {sum(map(len, classes.values()))} names", file=sys.stderr)
    elif path.suffix.lower() in LISTS or os.path.isfile(path):
        raise UserError(
            f"--classes {given} is a file, not class names. Pass a .txt file with one class per line, a .json file, or "
            "the classes, such as 'cat; dog; grass, lawn'."
        )
    else:
        classes = parse_classes(given)
    if len(classes) == 1:
        (names,) = classes.values()
        hint = f"Separate classes with ';': {'; '.join(names)!r}." if len(names) > 1 else ONE
        print(f"There is only one class, so every pixel gets it. {hint}", file=sys.stderr)
    return classes


ONE: Final = "Add another, such as 'background'."
