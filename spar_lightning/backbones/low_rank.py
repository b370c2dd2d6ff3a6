"""LoRA: low-rank updates of linear layers, merged into their weights when a checkpoint is read.

The weight W of a layer becomes W + B A, with A (rank, columns) random and B (rows, rank) zero at the start (Hu et al.,
arXiv 2106.09685). The updates are parametrizations of torch: the sum takes the place of the weight, so no network
changes its code. peft is not used. It replaces `nn.Linear` modules, but networks here also read weights directly, such
as `in_proj_weight` of open_clip's attention, of which MaskCLIP uses only the rows of the values.
"""

import copy
import math
from collections.abc import Collection, Mapping
from typing import Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spar_lightning.errors import UserError, check_at_least

WEIGHTS: Final = {nn.Linear: "weight", nn.MultiheadAttention: "in_proj_weight"}
PLACE: Final = "parametrizations."
ORIGINAL, UP, DOWN = ".original", ".0.up", ".0.down"  # names that torch gives to the tensors of an updated weight


Network = TypeVar("Network", bound=nn.Module)


class LowRank(nn.Module):
    """Low-rank update of a weight (rows, columns), zero at the start.

    Args:
        weight: Weight to update.
        rank: Rank of the update.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        return weight + self.up @ self.down


def add_low_rank(network: nn.Module, chosen: Collection[nn.Parameter], rank: int) -> None:
    """Freeze a network except for low-rank updates of the weights of linear layers among `chosen`.

    Raises:
        UserError: The rank is below 1, or no weight of a linear layer is among `chosen`.
    """
    check_at_least(1, **{"model.lora_rank": rank})
    wanted = {id(parameter) for parameter in chosen}
    weights = [
        (module, name)
        for module in network.modules()
        for kind, name in WEIGHTS.items()
        if isinstance(module, kind) and id(getattr(module, name)) in wanted
    ]
    if not weights:
        raise UserError(
            "model.lora_rank updates the weights of linear layers, but model.trainable selects none. Set it to blocks, "
            'such as ["blocks.*"], or set model.lora_rank: null.'
        )
    network.requires_grad_(False)
    for module, name in weights:
        parametrize.register_parametrization(module, name, LowRank(getattr(module, name), rank))


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return named weights with all low-rank updates added, under the names of the plain network."""
    result = dict(tensors)
    for place in [name.removesuffix(UP) for name in tensors if PLACE in name and name.endswith(UP)]:
        weight, up, down = (result.pop(place + part) for part in (ORIGINAL, UP, DOWN))
        result[place.replace(PLACE, "")] = _sum(weight, up, down)
    return result


def merge(network: nn.Module) -> None:
    """Turn a network with low-rank updates into a plain one with the same features.

    Unlike `remove_parametrizations` of torch, it can be used on a copy. A module and its copy share a class, from which
    torch would remove the weight.
    """
    for module in _updated(network):
        weights = {}
        for name, parts in module.parametrizations.items():  # type: ignore[union-attr, operator]
            weights[name] = nn.Parameter(_sum(parts.original, parts[0].up, parts[0].down).detach(), requires_grad=False)
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, weight in weights.items():
            module.register_parameter(name, weight)


def plain(network: Network) -> Network:
    """Return a copy with merged updates, or the network itself if it has none."""
    if not _updated(network):
        return network
    merged_network = copy.deepcopy(network)
    merge(merged_network)
    return merged_network


def _updated(network: nn.Module) -> list[nn.Module]:
    """Return the modules with low-rank updates; a plugin may have parametrizations of its own."""
    modules = [module for module in network.modules() if parametrize.is_parametrized(module)]
    return [module for module in modules if any(isinstance(part, LowRank) for part in module.modules())]


def _sum(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return the updated weight; an unchanged one stays equal to the bit, because W + 0 would turn -0 into 0."""
    return weight + up @ down if torch.count_nonzero(up) else weight
