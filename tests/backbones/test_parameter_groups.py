"""Selectors select the right parameters; one without a match raises an error that lists all groups."""

import pytest

from spar_lightning.backbones import Tiny
from spar_lightning.backbones.parameter_groups import SelectorError, select, set_trainable


def trained(tiny: Tiny) -> set[str]:
    return {name for name, p in tiny.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("selectors", "prefixes"),
    [
        (["blocks.-2", "blocks.-1"], ("blocks.4.", "blocks.5.")),
        (["blocks.5"], ("blocks.5.",)),
        (["blocks.-1.mlp"], ("blocks.5.mlp.",)),
        (["blocks.*.qkv"], tuple(f"blocks.{i}.attn.qkv." for i in range(6))),
        (["pos_embed", "patch_embed"], ("pos_embed", "patch_embed.")),
        (["all"], ("",)),
    ],
)
def test_selectors(selectors: list[str], prefixes: tuple[str, ...]) -> None:
    tiny = Tiny(pretrained=None)
    set_trainable(tiny, tiny.parameter_groups(), selectors)
    assert trained(tiny) == {name for name, _ in tiny.named_parameters() if name.startswith(prefixes)}


def test_overlapping_selectors_give_each_parameter_once() -> None:
    groups = Tiny(pretrained=None).parameter_groups()
    parameters = select(groups, ["blocks.0", "blocks.0.mlp", "all"])
    assert len({id(p) for p in parameters}) == len(parameters)


@pytest.mark.parametrize("selector", ["blocks.6", "blocks.-7", "block.1", "prefix", "blocks.-1.attn"])
def test_a_selector_without_match_lists_what_exists(selector: str) -> None:
    with pytest.raises(SelectorError, match=r"all, patch_embed, pos_embed, norm, head"):
        select(Tiny(pretrained=None).parameter_groups(), [selector])


def test_nothing_selected() -> None:
    with pytest.raises(SelectorError, match="trainable"):
        select(Tiny(pretrained=None).parameter_groups(), [])


def test_parts_of_blocks_are_allowed_only_if_they_exist() -> None:
    groups = Tiny(pretrained=None).parameter_groups()
    with pytest.raises(
        SelectorError, match=r"a block followed by \.mlp or \.qkv, and patterns such as blocks\.\*\.mlp"
    ):
        select(groups, ["blocks.0.attn"])
    plain = {name: members for name, members in groups.items() if name.count(".") < 2}
    with pytest.raises(SelectorError) as caught:
        select(plain, ["blocks.0.mlp"])
    assert ".qkv" not in str(caught.value) and "patterns such as blocks.*." in str(caught.value)
