"""Tests of classes, prompt templates and the text embeddings of class names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from open_clip import OPENAI_IMAGENET_TEMPLATES

from spar_lightning.backbones import Tiny
from spar_lightning.errors import UserError
from spar_lightning.evaluation.benchmark_config import shipped
from spar_lightning.segmentation.prompts import embed_name, parse_classes, prompt_templates
from spar_lightning.segmentation.text_embeddings import text_classifier
from tests.any_words import SmallCLIP


def test_several_names_belong_to_one_class() -> None:
    classifier = text_classifier(Tiny(), {"round": ["red dot", " blue dot "], "waves": ["waves"]}, ["{}"])
    assert classifier.labels == ("round", "waves")
    assert classifier.owner.tolist() == [0, 0, 1]
    assert torch.equal(classifier.embeddings[1], embed_name(Tiny().encode_text, "blue dot", ["{}"]))


def test_templates_are_averaged_unit_vectors() -> None:
    tiny = Tiny()
    one, two = (embed_name(tiny.encode_text, "red dot", [t]) for t in ("{}", "a photo of a {}."))
    both = embed_name(tiny.encode_text, "red dot", ["{}", "a photo of a {}."])
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
        ("cat\ngrass, lawn\r\n\nsky: blue\n", {"cat": ("cat",), "grass": ("grass", "lawn"), "sky": ("blue",)}),
        ("cat;\n dog;\r\nbird\n", {"cat": ("cat",), "dog": ("dog",), "bird": ("bird",)}),
        ("cat\n", {"cat": ("cat",)}),
        (["cat\n", " dog"], {"cat": ("cat",), "dog": ("dog",)}),
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
        ("cat; dog\nbird", r"'dog\\nbird'"),
        (["cat\rdog"], r"'cat\\rdog'"),
        ({"a\nb": ["cat"]}, r"'a\\nb'"),
        ({"a": ["cat\u2028dog"]}, r"'cat\\u2028dog'"),
        (["cat", "caf\udce9"], r"'caf\\udce9' .*UTF-8"),
        ({"caf\udce9": ["cat"]}, r"'caf\\udce9' .*UTF-8"),
    ],
)
def test_classes_that_mean_nothing_are_refused(given: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_classes(given)


@pytest.mark.parametrize(
    ("classes", "parts"),
    [
        (["Red dot", "red dot"], ["'Red dot'", "'red dot'"]),
        (["dark  blue dot", "dark blue dot"], ["'dark  blue dot'", "'dark blue dot'"]),
        ({"x": ["blue dot", "red dot"], "y": ["red dot"]}, ["'red dot' of class 'x'", "'red dot' of class 'y'"]),
        ({"x": ["red dot"], "y": ["red dot!"]}, ["'red dot'", "'red dot!'"]),
        (["red dot", "red dot"], ["label 'red dot'"]),
        (["red dot", "a\nb"], [r"'a\nb'"]),
        ({"x": ["caf\udce9"]}, [r"'caf\udce9'"]),
        ({"x": [" "]}, ["classes"]),
    ],
)
def test_classes_that_the_text_encoder_cannot_tell_apart(classes: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        text_classifier(Tiny(), classes, ["{}", "a photo of a {}."])
    assert all(part in str(error.value) for part in parts)


def test_names_beyond_the_context_are_the_same() -> None:
    long = "a very long description of a meadow " * 20
    with pytest.raises(UserError, match=r"red car'.*blue whale'"):
        text_classifier(SmallCLIP(), [f"{long} red car", f"{long} blue whale"], ["{}"])


def test_names_of_one_class_may_be_the_same() -> None:
    classifier = text_classifier(Tiny(), {"round": ["Red dot", "red dot"], "waves": "waves, grain"}, ["{}"])
    assert classifier.owner.tolist() == [0, 0, 1, 1] and torch.equal(*classifier.embeddings[:2])
    assert text_classifier(Tiny(), "red dot; blue dot, waves", ["{}"]).labels == ("red dot", "blue dot")


@pytest.mark.parametrize("path", sorted(shipped()))
def test_the_names_of_bundled_benchmarks_differ(path: str) -> None:
    """Text encoders fold case and blanks."""
    classes = yaml.safe_load(shipped()[path].read_text())["classes"]
    names = [(i, " ".join(name.lower().split())) for i, entry in enumerate(classes) for name in entry["names"]]
    assert len({name for _, name in names}) == len({(i, name) for i, name in names})
