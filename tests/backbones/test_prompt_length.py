"""Prompts that a text encoder cuts are named, once per class name."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spar_lightning.backbones.open_clip_base import _tokenizer
from spar_lightning.backbones.prompt_length import token_counts, warn_if_cut
from spar_lightning.segmentation.text_embeddings import text_classifier
from tests.any_words import SmallCLIP

LONG = "meadow " * 80 + "with a cow"


def test_one_warning_per_name(caplog: pytest.LogCaptureFixture) -> None:
    text_classifier(SmallCLIP(), ["cat", LONG, "dog"], ["{}", "a photo of a {}."])
    (record,) = (record for record in caplog.records if record.name == "spar_lightning")
    assert "with a cow" in record.getMessage() and "77" in record.getMessage()


def test_a_prompt_that_just_fits_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    backbone = SmallCLIP()
    backbone.encode_text(["cat " * 75])
    assert "tokens" not in caplog.text
    backbone.encode_text(["cat " * 76])
    assert "78 tokens" in caplog.text


def test_tokens_of_a_tokenizer_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "cat": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    loaded = _tokenizer("ViT-B-16-SigLIP2-512", str(tmp_path))
    assert token_counts(loaded, ["cat cat", "cat " * 70]) == [2, 70]
    warn_if_cut(["cat " * 70], [70], loaded.context_length)
    assert "70 tokens" in caplog.text and "64" in caplog.text
