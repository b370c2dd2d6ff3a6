"""DINOv3Text loads the two files of the official layout and always uses rounded RoPE periods."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones import DINOv3Text
from spar_lightning.backbones.parameter_groups import SelectorError, select
from spar_lightning.backbones.weights import WeightsError

MODEL = "vit_tiny_patch16_dinov3_qkvb"
PERIODS = torch.as_tensor(100.0 ** (torch.arange(16) / 16)).bfloat16().float()


def official_vision(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's tensors as in the official backbone file."""
    official: dict[str, Tensor] = {"mask_token": torch.zeros(1, 192), "rope_embed.periods": PERIODS.bfloat16()}
    for name, tensor in trunk.items():
        if name.endswith("q_bias"):
            value = trunk[name.replace("q_bias", "v_bias")]
            official[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(tensor), value])
            official[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(3 * len(tensor))
        elif not name.endswith("v_bias"):
            name = name.replace("reg_token", "storage_tokens")
            official[name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = tensor
    return official


def official_text(width: int = 128, layers: int = 2, outputs: int = 384) -> dict[str, Tensor]:
    """Return a small text tower and a part of the vision head, with names as in the official file."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div(shape[-1] ** 0.5)

    text = {"token_embedding.weight": draw(49408, width), "positional_embedding": draw(77, width)}
    for i in range(layers):
        block = f"blocks.{i}"
        for norm in ("attention_norm", "ffn_norm"):
            text[f"{block}.{norm}.weight"], text[f"{block}.{norm}.bias"] = 1 + draw(width), draw(width)
        text[f"{block}.attention.qkv.weight"] = draw(3 * width, width)
        text[f"{block}.attention.proj.weight"], text[f"{block}.attention.proj.bias"] = draw(width, width), draw(width)
        text[f"{block}.feed_forward.fc1.weight"] = draw(4 * width, width)
        text[f"{block}.feed_forward.fc1.bias"] = draw(4 * width)
        text[f"{block}.feed_forward.fc2.weight"] = draw(width, 4 * width)
        text[f"{block}.feed_forward.fc2.bias"] = draw(width)
    text["ln_final.weight"], text["ln_final.bias"] = 1 + draw(width), draw(width)
    official = {f"text_model.backbone.{name}": tensor for name, tensor in text.items()}
    official["text_model.head.linear_projection.weight"] = draw(outputs, width)
    return {**official, "logit_scale": torch.ones(1), "visual_model.head.ln_final.weight": torch.ones(192)}


def reference_text(official: dict[str, Tensor], tokens: Tensor, layers: int = 2) -> Tensor:
    """Compute text embeddings with an independent implementation of the official text tower."""
    t = {name.removeprefix("text_model."): tensor for name, tensor in official.items()}
    x = t["backbone.token_embedding.weight"][tokens] + t["backbone.positional_embedding"]
    for i in range(layers):
        block = {n.removeprefix(f"backbone.blocks.{i}."): v for n, v in t.items() if f"backbone.blocks.{i}." in n}

        def linear(name: str, x: Tensor, block: dict[str, Tensor] = block) -> Tensor:
            return F.linear(x, block[f"{name}.weight"], block.get(f"{name}.bias"))

        def norm(name: str, x: Tensor, block: dict[str, Tensor] = block) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"], 1e-5)

        q, k, v = linear("attention.qkv", norm("attention_norm", x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear("attention.proj", mixed)
        x = x + linear("feed_forward.fc2", F.gelu(linear("feed_forward.fc1", norm("ffn_norm", x))))
    x = F.layer_norm(x, x.shape[-1:], t["backbone.ln_final.weight"], t["backbone.ln_final.bias"], 1e-5)
    pooled = x[torch.arange(len(x)), tokens.argmax(-1)]
    return pooled @ t["head.linear_projection.weight"].T


@pytest.fixture(scope="module")
def trunk() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = DINOv3Text(MODEL).vision_state_dict()
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def pair(trunk: dict[str, Tensor], tmp_path: Path) -> tuple[str, str]:
    torch.save(official_vision(trunk), tmp_path / "backbone.pth")
    torch.save(official_text(), tmp_path / "text.pth")
    return str(tmp_path / "backbone.pth"), str(tmp_path / "text.pth")


def test_a_pair_of_official_files(pair: tuple[str, str], trunk: dict[str, Tensor]) -> None:
    backbone = DINOv3Text(MODEL, *pair, window=64)
    for name, tensor in backbone.vision_state_dict().items():
        assert torch.equal(tensor, trunk[name]), name
    prompts = ["a photo of a cat.", "stripes"]
    from open_clip import SimpleTokenizer

    expected = reference_text(official_text(), SimpleTokenizer(context_length=77)(prompts))[:, 192:]
    torch.testing.assert_close(backbone.encode_text(prompts), expected, rtol=1e-4, atol=1e-4)


def test_a_released_student_feeds_both_towers(trunk: dict[str, Tensor], tmp_path: Path) -> None:
    vision = {f"visual_model.backbone.{name}": tensor for name, tensor in official_vision(trunk).items()}
    whole = {f"segmentor.net.model.{name}": tensor for name, tensor in {**vision, **official_text()}.items()}
    path = str(tmp_path / "student.ckpt")
    torch.save({"state_dict": whole}, path)
    backbone = DINOv3Text(MODEL, path, path, window=64)
    assert torch.equal(backbone.vision_state_dict()["blocks.3.attn.qkv.weight"], trunk["blocks.3.attn.qkv.weight"])
    assert backbone.encode_text(["a cat"]).shape == (1, 192)


def test_the_state_dict_may_have_official_names_or_hold_both_towers(trunk: dict[str, Tensor]) -> None:
    official = official_vision(trunk)
    student = {f"visual_model.backbone.{name}": tensor for name, tensor in official.items()}
    for tensors in (trunk, official, {**student, "text_model.x": torch.zeros(1)}):
        backbone = DINOv3Text(MODEL)
        backbone.load_vision_state_dict(tensors)
        assert all(torch.equal(backbone.trunk.state_dict()[name], tensor) for name, tensor in trunk.items())
    with pytest.raises(WeightsError, match="vit_tiny_patch16_dinov3_qkvb"):
        DINOv3Text(MODEL).load_vision_state_dict({"x": torch.zeros(1)})


def test_a_checkpoint_of_our_own(trunk: dict[str, Tensor], tmp_path: Path) -> None:
    state = {f"student.trunk.{name}": tensor for name, tensor in trunk.items()}
    torch.save({"state_dict": state, "spar": {}}, tmp_path / "best.ckpt")
    backbone = DINOv3Text(MODEL, str(tmp_path / "best.ckpt"), window=64)
    assert torch.equal(backbone.vision_state_dict()["blocks.3.attn.qkv.weight"], trunk["blocks.3.attn.qkv.weight"])


def test_the_rounded_periods_survive_everything(pair: tuple[str, str]) -> None:
    backbone = DINOv3Text(MODEL, pair[0], window=64)
    loaded = DINOv3Text(MODEL, window=64)
    loaded.load_vision_state_dict(backbone.vision_state_dict())
    cast = copy.deepcopy(backbone).to(torch.bfloat16).to(torch.float32)
    for twin in (backbone, loaded, copy.deepcopy(backbone), cast):
        assert torch.equal(twin.trunk.rope.periods, PERIODS)
    assert not torch.equal(PERIODS, 100.0 ** (torch.arange(16) / 16))  # rounding changes the periods


def test_missing_tensors_and_files_are_named(trunk: dict[str, Tensor], pair: tuple[str, str], tmp_path: Path) -> None:
    official = official_vision(trunk)
    del official["blocks.7.norm2.weight"]
    torch.save(official, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"cut\.pth .*blocks\.7\.norm2\.weight"):
        DINOv3Text(MODEL, str(tmp_path / "cut.pth"))
    with pytest.raises(WeightsError, match=r"/nowhere\.pth.*8aa4cbdd\.pth .*a442d8f5\.pth"):
        DINOv3Text(MODEL, "/nowhere.pth")
    with pytest.raises(ValueError, match=r"text_weights.*a442d8f5\.pth .*https://"):
        DINOv3Text(MODEL, pair[0]).encode_text(["a cat"])
    with pytest.raises(ValueError, match="vit_large_patch16_dinov3_qkvb"):
        DINOv3Text("vit_base_patch16_224")


def test_weights_that_must_not_be_paired_are_refused(trunk: dict[str, Tensor], tmp_path: Path) -> None:
    official = official_vision(trunk)
    torch.save({**official, "local_cls_norm.weight": torch.ones(192)}, tmp_path / "sat.pth")
    with pytest.raises(WeightsError, match="SAT-493M"):
        DINOv3Text(MODEL, str(tmp_path / "sat.pth"))
    torch.save({**official, "rope_embed.periods": 2 * PERIODS}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="RoPE"):
        DINOv3Text(MODEL, str(tmp_path / "other.pth"))


def test_no_second_copy_of_the_weights_stays(pair: tuple[str, str]) -> None:
    assert "state_dict" not in DINOv3Text(MODEL, pair[0]).trunk.pretrained_cfg


def test_there_is_no_table_of_positions() -> None:
    with pytest.raises(SelectorError, match=r"'pos_embed' .*all, patch_embed, prefix"):
        select(DINOv3Text(MODEL).parameter_groups(), ["pos_embed"])
