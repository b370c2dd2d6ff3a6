"""Class names to text embeddings."""

import pytest
import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES

from spar_lightning.backbones import Tiny
from spar_lightning.errors import UserError
from spar_lightning.text_embeddings import text_classifier
from spar_lightning.zero_shot import embed_name, prompt_templates


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
    with pytest.raises(UserError, match=r"allowed are openai_imagenet, or a list of prompts with \{\} for the name"):
        prompt_templates(wrong)


@pytest.mark.parametrize("wrong", [[], {}, {"a": []}])
def test_no_classes(wrong: list[str]) -> None:
    with pytest.raises(UserError, match="give at least one, each with at least one name"):
        text_classifier(Tiny(), wrong, ["{}"])
