"""Tests of classes, prompt templates and the text embeddings of class names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES

from spar_lightning.backbones import Tiny
from spar_lightning.errors import UserError
from spar_lightning.segmentation.prompts import embed_name, parse_classes, prompt_templates
from spar_lightning.segmentation.text_embeddings import text_classifier


def test_several_names_belong_to_one_class() -> None:
    classifier = text_classifier(Tiny(), {"round": ["disc", " ring "], "bar": ["bar"]}, ["{}"])
    assert classifier.labels == ("round", "bar")
    assert classifier.owner.tolist() == [0, 0, 1]
    assert torch.equal(classifier.embeddings[1], embed_name(Tiny().encode_text, "ring", ["{}"]))


def test_templates_are_averaged_unit_vectors() -> None:
    tiny = Tiny()
    one, two = (embed_name(tiny.encode_text, "disc", [t]) for t in ("{}", "a photo of a {}."))
    both = embed_name(tiny.encode_text, "disc", ["{}", "a photo of a {}."])
    torch.testing.assert_close(both, F.normalize(one + two, dim=0))


def test_the_eighty_templates_are_those_of_open_clip() -> None:
    templates = prompt_templates("openai_imagenet")
    assert templates == tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    assert len(templates) == 80


@pytest.mark.parametrize("wrong", ["imagenet", [], ["a photo"]])
def test_what_is_no_template(wrong: list[str]) -> None:
    with pytest.raises(UserError, match=r"templates.*openai_imagenet.*\{\}"):
        prompt_templates(wrong)


@pytest.mark.parametrize("wrong", [[], {}, {"a": []}])
def test_no_classes(wrong: list[str]) -> None:
    with pytest.raises(UserError, match="classes"):
        text_classifier(Tiny(), wrong, ["{}"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cat", {"cat": ("cat",)}),
        ("cat; dog;grass, lawn", {"cat": ("cat",), "dog": ("dog",), "grass": ("grass", "lawn")}),
        (["cat", "background: wall, floor"], {"cat": ("cat",), "background": ("wall", "floor")}),
        ("猫; Straße ; été", {"猫": ("猫",), "Straße": ("Straße",), "été": ("été",)}),
        ({"any": ["a", "b"], "dog": "dog, puppy"}, {"any": ("a", "b"), "dog": ("dog", "puppy")}),
    ],
)
def test_classes_as_people_write_them(given: Any, expected: dict[str, tuple[str, ...]]) -> None:
    assert parse_classes(given) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "number 1 of 1"),
        ("cat;;dog", "number 2 of 3"),
        ("cat; dog, ", "number 2 of 2"),
        ("background:", "number 1 of 1"),
        (["cat; dog"], "'cat; dog' contains ';'"),
        ({"cat": []}, "number 1 of 1"),
        ("cat; dog; cat", "label 'cat'"),
        ("cat; animal: dog, cat", "name 'cat'"),
    ],
)
def test_classes_that_mean_nothing_are_refused(given: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_classes(given)
