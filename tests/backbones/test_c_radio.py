"""C-RADIO gives the tokens of transformers and the embeddings of its SigLIP2 adaptor, from the published files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import RadioConfig, RadioModel

from spar_lightning.backbones import CRADIO
from spar_lightning.backbones.weights import WeightsError
from spar_lightning.errors import UserError
from tests.backbones.small_models import register as register  # at import

MODEL = "vit_tiny_patch16_radio_v4"
HEAD = "radio_model.adaptors.siglip2-g.head_mlp."


def adaptor(blocks: int) -> dict[str, Tensor]:
    """Return random weights of the adaptor's summary head under their published names."""
    shapes = {"fc1": (96, 64), "final.0": (96,), "final.2": (1536, 96)}
    shapes |= {f"blocks.{i}.{layer}": (96, 96)[: 1 + layer // 2] for i in range(blocks) for layer in (0, 2)}
    weights = {f"{HEAD}{name}.weight": 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    return weights | {f"{HEAD}{name}.bias": 0.1 * torch.randn(shape[0]) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=[0, 2])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RadioModel]:
    """Folder as published, with an adaptor of 0 or 2 residual blocks, and the model of transformers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("radio")
    model = RadioModel(RadioConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2)).train(False)
    for name, parameter in model.named_parameters():
        if "layer_scale" not in name:  # the published files have none
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)  # names as published: radio_model.model.blocks.0.attn.qkv.weight, ..
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if "layer_scale" not in n}
    save_file({**tensors, **adaptor(request.param)}, folder / "model.safetensors")
    return folder, model


def embeddings(tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Apply the adaptor as published: a residual MLP with LayerNorm and GELU before each linear layer."""

    def layer(name: str, x: Tensor) -> Tensor:
        weight, bias = tensors[f"{HEAD}{name}.weight"], tensors[f"{HEAD}{name}.bias"]
        return nn.functional.layer_norm(x, bias.shape, weight, bias) if weight.ndim == 1 else x @ weight.T + bias

    x = layer("fc1", tokens)
    for i in range(2):
        if f"{HEAD}blocks.{i}.0.weight" in tensors:
            x = x + layer(f"blocks.{i}.2", nn.functional.gelu(layer(f"blocks.{i}.0", x)))
    return layer("final.2", nn.functional.gelu(layer("final.0", x)))


@torch.no_grad()
def test_features_equal_the_original_at_two_sizes(original: tuple[Path, RadioModel]) -> None:
    folder, model = original
    backbone = CRADIO(MODEL, str(folder))
    assert backbone.window == 512 and backbone.prefix == 10
    for h, w in ((32, 32), (5, 9)):
        images = torch.randint(256, (1, 3, 16 * h, 16 * w), dtype=torch.uint8)
        expected = model(images / 255)  # normalizes inside
        normalized = backbone.normalize(images)
        tokens = backbone.trunk_tokens(normalized)
        torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-4)
        text_space = embeddings(load_file(folder / "model.safetensors"), expected.features)
        torch.testing.assert_close(backbone(normalized).flatten(1, 2), text_space, rtol=0, atol=1e-4)


def test_a_student_with_another_adaptor_loads(original: tuple[Path, RadioModel]) -> None:
    backbone, other = CRADIO(MODEL, str(original[0])), CRADIO(MODEL, None)
    other.load_vision_state_dict(backbone.vision_state_dict())
    assert other.weights_digest() == backbone.weights_digest()


def test_errors_say_what_is_missing(original: tuple[Path, RadioModel], tmp_path: Path) -> None:
    tensors = load_file(original[0] / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if HEAD not in n}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="has no SigLIP2 adaptor"):
        CRADIO(MODEL, str(tmp_path))
    name = "radio_model.model.patch_generator.pos_embed"
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"patch_generator\.pos_embed is missing"):
        CRADIO(MODEL, str(tmp_path))
    with pytest.raises(UserError, match=r"unknown model 'vit_tiny'.* vit_so400m_patch16_radio_v4"):
        CRADIO("vit_tiny")
