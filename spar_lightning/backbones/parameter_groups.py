"""Selection of a student's trainable parameters by the group names of `Backbone.parameter_groups`.

A selector is a group name (`patch_embed`, `blocks.3.mlp`), a group name with a block index counted from the
end (`blocks.-1`), a pattern (`blocks.*.qkv`), or `all`. The paper trains the last two blocks (section 4).
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
    """Error for a list of selectors that is empty, or a selector that matches no parameter group."""


def select(groups: Groups, selectors: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters of all groups that match a selector, without duplicates, in the order of the groups.

    Raises:
        SelectorError: A selector matches no group, or `selectors` is empty.
    """
    if not selectors:
        raise SelectorError(f"trainable is empty, so nothing would be trained. {_choices(groups)}")
    names = {name for selector in selectors for name in _matches(groups, selector)}
    unique = {id(p): p for name, members in groups.items() if name in names for p in members}
    return list(unique.values())


def set_trainable(module: nn.Module, groups: Groups, selectors: Sequence[str]) -> list[nn.Parameter]:
    """Freeze the module except for the parameters that match the selectors, and return these parameters."""
    chosen = select(groups, selectors)
    module.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def frozen_blocks(network: Backbone, depth: int) -> int:
    """Return the number of leading blocks with an output that does not change during training.

    Args:
        network: Backbone with `requires_grad` set for the trainable parameters only.
        depth: Number of its blocks.

    Raises:
        UserError: The input of the first block (`Backbone.embed`) has trainable parameters.
    """
    grids, pixels = [(1, 1)], torch.zeros(1, 3, network.patch_size, network.patch_size)
    with torch.enable_grad():
        tokens = network.embed(pixels.to(next(network.parameters())))
        if tokens.requires_grad:
            raise UserError(
                "data.cache_activations stores the output of the frozen blocks, but this model.trainable also trains "
                "the patch embedding. Set data.cache_activations: false, or train only blocks, norm and head."
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
            f"trainable: {selector!r} does not match any parameter group. {nearest(selector, groups)}{_choices(groups)}"
        )
    return found


def _choices(groups: Groups) -> str:
    blocks = [name for name in groups if name.startswith("blocks.")]
    others = [name for name in groups if not name.startswith("blocks.")]
    depth = sum(name.count(".") == 1 for name in blocks)
    parts = sorted({name.split(".", 2)[2] for name in blocks if name.count(".") > 1})
    nested = f"a block followed by {' or '.join(f'.{part}' for part in parts)}, " if parts else ""
    return (
        f"Allowed: all, {', '.join(others)}, blocks.0 to blocks.{depth - 1} (or blocks.-{depth} to blocks.-1), "
        f"{nested}and patterns such as blocks.*{f'.{parts[0]}' if parts else ''}."
    )
