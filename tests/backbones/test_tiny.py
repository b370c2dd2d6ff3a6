"""Tiny implements the backbone interface."""

import copy
import pickle
import re
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from spar_lightning.backbones import Tiny
from spar_lightning.backbones.tiny import UnknownWordError
from spar_lightning.backbones.weights import WeightsError
from spar_lightning.errors import UserError
from tests.rounding import assert_rounded


def images(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (192, 40)])
def test_shapes(size: tuple[int, int]) -> None:
    tiny = Tiny(pretrained=None)
    assert tiny(images(*size, batch=2)).shape == (2, size[0] // 8, size[1] // 8, tiny.embed_dim)


def test_depth_counts_blocks() -> None:
    assert Tiny(pretrained=None).depth == 6


def test_features_equal_timm_with_the_same_weights() -> None:
    tiny = Tiny()
    reference = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=128, class_token=False,
        global_pool="", fc_norm=False,
    ).eval()  # fmt: skip
    reference.load_state_dict(tiny.vision_state_dict())
    x = images(64, 64, batch=2)
    with torch.no_grad():
        assert_rounded(tiny(x).flatten(1, 2), reference(x), tiny.depth, tiny.embed_dim)


def test_splitting_the_blocks_changes_nothing() -> None:
    tiny = Tiny()
    tokens, grid = tiny.embed(images(72, 96)), [(9, 12)]
    whole = tiny.run_blocks(tokens, grid)
    for cut in range(tiny.depth + 1):
        assert torch.equal(tiny.run_blocks(tiny.run_blocks(tokens, grid, stop=cut), grid, start=cut), whole)


def test_patches_are_row_major() -> None:
    tiny = Tiny(pretrained=None)
    torch.nn.init.zeros_(tiny.pos_embed)
    x = images(64, 64)
    shifted = torch.roll(x, (8, 16), (2, 3))
    expected = torch.roll(tiny.embed(x).unflatten(1, (8, 8)), (1, 2), (1, 2))
    torch.testing.assert_close(tiny.embed(shifted).unflatten(1, (8, 8)), expected)


def test_always_in_eval_mode() -> None:
    tiny = Tiny(pretrained=None)
    assert not tiny.training
    tiny.train()
    assert not any(module.training for module in tiny.modules())


def test_the_text_tower_is_no_submodule() -> None:
    tiny = Tiny()
    before = set(tiny.state_dict())
    assert tiny.encode_text(["a photo of a blue dot."]).shape == (1, 128)
    assert set(tiny.state_dict()) == before
    assert len(list(tiny.children())) == len(list(Tiny(pretrained=None).children()))
    for twin in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert twin._text_tower == [] and tiny._text_tower
        torch.testing.assert_close(twin.encode_text(["blue dot"]), tiny.encode_text(["blue dot"]))
    tiny.drop_text_tower()
    assert tiny._text_tower == []


def test_case_and_punctuation_do_not_matter_and_padding_neither() -> None:
    tiny = Tiny()
    alone = tiny.encode_text(["a red dot"])
    padded = tiny.encode_text(["A red, Dot.", "a bad photo of the grain in a video game"])[:1]
    assert_rounded(alone, padded, 1, tiny.embed_dim)


def test_an_unknown_word_is_named_with_its_likely_meaning() -> None:
    with pytest.raises(UnknownWordError, match=r"'dots' .*\bdot\b"):
        Tiny().encode_text(["many dots"])


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match=r"\b24 .*\b0\b"):
        Tiny().encode_text([" "])


@pytest.mark.parametrize("name", ["!!!", "🐱", "red dot ..."])
def test_a_name_of_which_nothing_is_left_is_refused(name: str) -> None:
    with pytest.raises(UnknownWordError, match=re.escape(name.split()[-1])):
        Tiny().encode_text([f"a photo of a {name}."])


def test_files_that_are_no_weights_of_tiny(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_text("x")
    with pytest.raises(WeightsError, match=r"broken\.safetensors"):
        Tiny(str(tmp_path / "broken.safetensors"))
    save_file(Tiny().vision_state_dict(), tmp_path / "student.safetensors")
    student = Tiny(str(tmp_path / "student.safetensors"))
    assert torch.equal(student.head.weight, Tiny().head.weight)
    with pytest.raises(WeightsError, match=r"student\.safetensors .*text encoder"):
        student.encode_text(["red dot"])


def test_sides_must_be_multiples_of_the_patch() -> None:
    with pytest.raises(UserError, match=r"\b8\b.*60 x 64"):
        Tiny(pretrained=None)(torch.zeros(1, 3, 60, 64))


def test_weights_from_a_file(tmp_path: object) -> None:
    path = f"{tmp_path}/other.safetensors"
    with resources.as_file(resources.files("spar_lightning.backbones") / "tiny.safetensors") as shipped:
        assert shipped.stat().st_size <= 8 * 2**20
        save_file(load_file(shipped), path)
    assert Tiny(pretrained=path).weights_digest() == Tiny().weights_digest()
    with pytest.raises(UserError, match="'scenes'"):
        Tiny(pretrained="/nowhere.safetensors")


def test_the_digest_follows_the_weights() -> None:
    tiny = Tiny()
    before = tiny.weights_digest()
    with torch.no_grad():
        tiny.head.bias[0] += 1e-3
    assert tiny.weights_digest() != before


def test_groups_cover_every_parameter() -> None:
    tiny = Tiny(pretrained=None)
    grouped = {id(p) for members in tiny.parameter_groups().values() for p in members}
    assert grouped == {id(p) for p in tiny.parameters()}
