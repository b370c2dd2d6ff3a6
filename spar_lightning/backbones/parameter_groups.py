"""Which parameters of a student train: selectors over the names of `Backbone.parameter_groups`.

A selector is a group name (`patch_embed`, `blocks.3.mlp`), a name with a block counted from the end
(`blocks.-1`), a pattern (`blocks.*.qkv`), or `all`. The paper trains the last two blocks (section 4).
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError, nearest

Groups = Mapping[str, Sequence[nn.Parameter]]


class SelectorError(UserError):
    """A selector of trainable parameters matches nothing."""


def select(groups: Groups, selectors: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of all groups that some selector matches, each once, in the order of the groups.

    Raises:
        SelectorError: A selector matches no group, or there is no selector.
    """
    if not selectors:
        raise SelectorError(f"trainable is empty: nothing would be trained. {_choices(groups)}")
    names = {name for selector in selectors for name in _matches(groups, selector)}
    unique = {id(p): p for name, members in groups.items() if name in names for p in members}
    return list(unique.values())


def set_trainable(module: nn.Module, groups: Groups, selectors: Sequence[str]) -> list[nn.Parameter]:
    """Freeze the module, then thaw what the selectors match; returns the trainable parameters."""
    chosen = select(groups, selectors)
    module.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def frozen_blocks(network: Backbone, depth: int) -> int:
    """How many of the first blocks give the same tokens whatever training does: no gradient reaches them.

    Args:
        network: Its trainable parameters require gradients.
        depth: Number of its blocks.

    Raises:
        UserError: The embedding of images trains.
    """
    grids, pixels = [(1, 1)], torch.zeros(1, 3, network.patch_size, network.patch_size)
    with torch.enable_grad():
        tokens = network.embed(pixels.to(next(network.parameters())))
        if tokens.requires_grad:
            raise UserError(
                "data.cache_activations stores the output of the frozen blocks, but with this model.trainable the "
                "patch embedding trains too. Set data.cache_activations: false, or train only blocks, norm and head."
            )
        for block in range(depth):
            tokens = network.run_blocks(tokens, grids, block, block + 1)
            if tokens.requires_grad:
                return block
    return depth


def _matches(groups: Groups, selector: str) -> list[str]:
    depth = sum(re.fullmatch(r"blocks\.\d+", name) is not None for name in groups)
    wanted = "*" if selector == "all" else selector
    if from_end := re.match(r"blocks\.-(\d+)", wanted):
        wanted = f"blocks.{depth - int(from_end[1])}{wanted[from_end.end() :]}"
    found = [name for name in groups if fnmatchcase(name, wanted)]
    if not found:
        raise SelectorError(
            f"trainable: {selector!r} matches no group of parameters. {nearest(selector, groups)}{_choices(groups)}"
        )
    return found


def _choices(groups: Groups) -> str:
    blocks = [name for name in groups if name.startswith("blocks.")]
    others = [name for name in groups if not name.startswith("blocks.")]
    depth = sum(name.count(".") == 1 for name in blocks)
    return (
        f"Allowed are all, {', '.join(others)}, blocks.0 to blocks.{depth - 1} (or blocks.-{depth} to blocks.-1), "
        "each block with .mlp or .qkv behind it, and patterns such as blocks.*.mlp."
    )
