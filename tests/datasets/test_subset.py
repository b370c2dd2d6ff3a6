"""Tests of selecting images by keys that are the same text in different Unicode forms."""

import unicodedata
from dataclasses import replace

import pytest

from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.subset import select
from spar_lightning.errors import UserError
from tests.feature_cache.test_cache import collect, sources

ONE, TWO = (unicodedata.normalize(form, "Z\u00fcrich") for form in ("NFC", "NFD"))


def images(*names: str) -> Images:
    return collect([replace(source, key=name) for source, name in zip(sources(len(names)), names, strict=True)])


def found(table: Images) -> list[str]:
    return [key.decode() for key in table.keys.tolist()]


def test_the_form_of_accents_does_not_matter() -> None:
    assert found(select(images("a", TWO, "b"), [ONE, "b"], None)) == [TWO, "b"]
    assert found(select(images("a", ONE, "b"), [TWO], None)) == [ONE]
    assert found(select(images(TWO, "a"), [ONE, TWO], None)) == [TWO]  # once


def test_the_same_bytes_come_first() -> None:
    assert found(select(images(ONE, TWO), [TWO], None)) == [TWO]


def test_what_is_ambiguous_or_missing_is_an_error() -> None:
    parts = ("A\u030a", "\u00c5")  # the Angstrom sign is a third form
    with pytest.raises(UserError, match=r"data\.keys: .*2 keys"):
        select(images(*parts), ["\u212b"], None)
    with pytest.raises(UserError, match=rf"1 of 2 keys .*{ONE}"):
        select(images("a", "b"), ["a", ONE], None)
