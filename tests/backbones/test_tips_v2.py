"""TIPSv2 gives the features and text embeddings of transformers, from the files of the published repositories."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Tipsv2Config, Tipsv2Model

from spar_lightning.backbones import TIPSv2
from spar_lightning.backbones.weights import WeightsError
from spar_lightning.errors import UserError
from tests.backbones.small_models import register as register  # at import

MODEL = "vit_tiny_patch14_reg1_tipsv2"
WORDS = {"<pad>": 0, "<unk>": 1, "a": 2, "road": 3, "tree": 4}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tipsv2Model]:
    """Folder as published, and the model of transformers with these weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tips")
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56}
    text = {"vocab_size": 5, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    model = Tipsv2Model(Tipsv2Config(vision_config=vision, text_config={**text, "num_attention_heads": 2}))
    model.train(False)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)  # names as published: vision_encoder.blocks.0.attn.qkv.weight, ..
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def values_trick(model: Tipsv2Model, images: Tensor) -> Any:
    """Return the patch tokens (1, N, D) of the official zero-shot segmentation, with the layers of transformers."""
    vision = model.vision_model
    tokens = vision.embeddings(images)
    *layers, last = vision.encoder.layer
    for layer in layers:
        tokens = layer(tokens)
    values = last.attention.o_proj(last.attention.v_proj(last.norm1(tokens)))
    tokens = tokens + last.layer_scale1(values)
    tokens = tokens + last.layer_scale2(last.mlp(last.norm2(tokens)))
    return vision.layernorm(tokens)[:, 2:]  # class token, register


@torch.no_grad()
def test_features_equal_the_original_at_two_sizes(original: tuple[Path, Tipsv2Model]) -> None:
    folder, model = original
    assert "vision_encoder.register_tokens" in load_file(folder / "model.safetensors")
    backbone = TIPSv2(MODEL, str(folder))
    for h, w in ((4, 4), (7, 3)):
        images = torch.rand(1, 3, 14 * h, 14 * w)
        assert torch.equal(backbone.normalize((255 * images).byte()), (255 * images).byte().float() / 255)
        found = backbone(images).flatten(1, 2)
        torch.testing.assert_close(found, values_trick(model, images), rtol=0, atol=1e-4)
        expected = model.vision_model(images).last_hidden_state
        backbone.value_path = False
        torch.testing.assert_close(backbone(images).flatten(1, 2), expected[:, 2:], rtol=0, atol=1e-4)
        backbone.value_path = True


@torch.no_grad()
def test_text_embeddings_equal_the_original(original: tuple[Path, Tipsv2Model]) -> None:
    folder, model = original
    ids, mask = torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, 64)
    ids[0, :2], ids[1, :1] = torch.tensor([2, 3]), 4
    mask[0, :2] = mask[1, :1] = 1
    found = TIPSv2(MODEL, None, str(folder)).encode_text(["A Road", "tree"])
    expected = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_student_loads_under_names_of_timm(original: tuple[Path, Tipsv2Model]) -> None:
    backbone, other = TIPSv2(MODEL, str(original[0])), TIPSv2(MODEL, None)
    other.load_vision_state_dict(backbone.vision_state_dict())
    assert other.weights_digest() == backbone.weights_digest()


def test_names_of_swiglu(original: tuple[Path, Tipsv2Model], tmp_path: Path) -> None:
    """The giant's MLP has the official names w12 and w3."""
    tensors = load_file(original[0] / "model.safetensors")
    renamed = {n.replace("mlp.c_fc", "mlp.w12").replace("mlp.c_proj", "mlp.w3"): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    assert TIPSv2(MODEL, str(tmp_path)).weights_digest() == TIPSv2(MODEL, str(original[0])).weights_digest()


def test_errors_say_what_is_missing(original: tuple[Path, Tipsv2Model], tmp_path: Path) -> None:
    tensors = load_file(original[0] / "model.safetensors")
    del tensors["vision_encoder.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"norm\.weight is missing"):
        TIPSv2(MODEL, str(tmp_path))
    with pytest.raises(WeightsError, match=r"text encoder .*config\.json"):
        TIPSv2(MODEL, None, str(tmp_path)).encode_text(["a"])
    with pytest.raises(WeightsError, match=r"/nowhere does not exist"):
        TIPSv2(MODEL, "/nowhere")
    with pytest.raises(UserError, match=r"unknown model 'vit_tiny'.* vit_base_patch14_reg1_tipsv2"):
        TIPSv2("vit_tiny")
    with pytest.raises(UserError, match="text_pretrained"):
        TIPSv2(MODEL, None).encode_text(["a"])
