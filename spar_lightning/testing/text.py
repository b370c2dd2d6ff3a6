"""Checks of the text encoder. They are skipped if its weights are missing."""

import copy
from unittest import SkipTest

import torch

from spar_lightning.backbones.base import embedding_error
from spar_lightning.errors import UserError
from spar_lightning.testing.check import Factory


def text_tower_is_not_a_submodule(factory: Factory) -> None:
    """Check that the text encoder is not part of weights and copies."""
    backbone = factory()
    before = set(backbone.state_dict())
    backbone._text_tower.append(torch.nn.Linear(2, 2))  # as in encode_text
    assert set(backbone.state_dict()) == before, "the state dict contains the text tower"
    assert copy.deepcopy(backbone)._text_tower == [], "a deep copy contains the text tower"


@torch.no_grad()
def text_embeddings_are_valid(factory: Factory) -> None:
    """Check shape, type and repeatability of text embeddings."""
    backbone = factory()
    try:
        tower = backbone.build_text_tower()
    except UserError as reason:
        raise SkipTest(str(reason)) from reason
    prompts = ["a photo.", "a red photo."]
    embeddings = tower(prompts)
    error = embedding_error(embeddings, len(prompts), backbone.embed_dim)
    assert error is None, f"the text encoder {error}"
    assert torch.isfinite(embeddings).all(), "text embeddings contain NaN or infinity"
    assert torch.equal(tower(prompts), embeddings), "the text encoder gives different embeddings for the same prompts"
    assert not torch.equal(embeddings[0], embeddings[1]), f"{prompts[0]!r} and {prompts[1]!r} have equal embeddings"
