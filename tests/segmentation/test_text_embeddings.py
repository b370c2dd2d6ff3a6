"""Tests of the text embedding cache: cache key (tower, weights, templates, name) and damaged files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spar_lightning.backbones import Tiny
from spar_lightning.segmentation.text_embeddings import text_classifier
from tests.any_words import AnyWords, SmallCLIP


class Known(AnyWords):
    """Backbone with a cache key that counts the names it encodes."""

    weights = "one"
    encoded = 0

    def text_identity(self) -> dict[str, Any] | None:
        return {"family": "known", "weights": self.weights}

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        self.encoded += 1
        return super().encode_text(prompts)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPAR_CACHE", str(tmp_path))
    return tmp_path


def test_a_name_is_encoded_once(home: Path) -> None:
    first, second = Known(), Known()
    one = text_classifier(first, {"a": ["cat", "dog", "dog"], "b": ["cow"]}, ["{}", "a {}."])
    two = text_classifier(second, ["cow", "dog", "hen"], ["{}", "a {}."])
    assert (first.encoded, second.encoded) == (3, 1)
    assert torch.equal(one.embeddings[[3, 1]], two.embeddings[:2]) and torch.equal(one.embeddings[1], one.embeddings[2])


def test_what_an_embedding_depends_on(home: Path) -> None:
    one, other = Known(), Known()
    other.weights = "two"
    text_classifier(one, ["cat"], ["{}"])
    text_classifier(one, ["cat"], ["a {}"])
    text_classifier(other, ["cat"], ["{}"])
    assert (one.encoded, other.encoded) == (2, 1)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:], lambda b: b""]
)
def test_a_damaged_file_is_made_again(home: Path, damage: Any) -> None:
    expected = text_classifier(Known(), ["cat"], ["{}"]).embeddings
    path = next(home.rglob("*.npz"))
    path.write_bytes(damage(path.read_bytes()))
    again = Known()
    assert torch.equal(text_classifier(again, ["cat"], ["{}"]).embeddings, expected) and again.encoded == 1
    third = Known()
    text_classifier(third, ["cat"], ["{}"])
    assert third.encoded == 0


def test_without_an_identity_nothing_is_kept(home: Path) -> None:
    text_classifier(Tiny(), ["red dot"], ["{}"])
    assert SmallCLIP().text_identity() is None and not list(home.iterdir())


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPAR_CACHE", str(tmp_path / "file"))
    assert text_classifier(Known(), ["cat", "dog"], ["{}"]).embeddings.shape == (2, 128)
    assert caplog.text.count("Text embeddings are not cached") == 1


def test_identity_of_open_clip_weights(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        save_file(open_clip.create_model("ViT-Ti-16-test").state_dict(), path)
    one, again, two = (SmallCLIP(str(path)).text_identity() for path in (paths[0], paths[0], paths[1]))
    assert one == again and one is not None and two is not None and one["weights"] != two["weights"]
