"""Checks of parameters: groups, gradients, weights, copies and eval mode."""

import copy
import pickle
import re
from itertools import combinations

import torch

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.parameter_groups import set_trainable
from spar_lightning.testing.check import Factory, random_images


def stays_in_eval_mode(factory: Factory) -> None:
    """Check that the backbone is in eval mode, also after `train()`."""
    backbone = factory()
    assert not any(module.training for module in backbone.modules()), (
        "in train mode when built: call self.eval() in __init__"
    )
    backbone.train()
    training = [name or "the backbone" for name, module in backbone.named_modules() if module.training]
    assert not training, f"in train mode after train(): {', '.join(training[:5])}"


def gradients_reach_what_is_trained(factory: Factory) -> None:
    """Check that gradients reach the selected groups and nothing else."""
    backbone = factory()
    chosen = set_trainable(backbone, backbone.parameter_groups(), ("blocks.-2", "blocks.-1"))
    backbone(random_images(backbone, 3, 3)).square().mean().backward()
    wanted = {id(p) for p in chosen}
    for name, parameter in backbone.named_parameters():
        reached = parameter.grad is not None
        assert reached == (id(parameter) in wanted), f"{name} {'must not have a' if reached else 'has no'} gradient"


@torch.no_grad()
def weights_round_trip(factory: Factory) -> None:
    """Check that weights can be saved and loaded, and that a missing tensor is an error."""
    backbone, other = factory(), factory()
    for tensor in other.parameters():
        tensor.add_(0.01)
    weights = {name: tensor.clone() for name, tensor in backbone.vision_state_dict().items()}
    other.load_vision_state_dict(weights)
    images = random_images(backbone, 3, 4)
    assert torch.equal(other(images), backbone(images)), "load_vision_state_dict(vision_state_dict()) changed features"
    assert other.weights_digest() == backbone.weights_digest(), "loading vision_state_dict() changed weights_digest()"
    missing = dict(list(weights.items())[1:])
    try:
        other.load_vision_state_dict(missing)
    except (ValueError, RuntimeError, KeyError):
        return
    raise AssertionError("load_vision_state_dict accepted a state dict with a missing tensor")


@torch.no_grad()
def pickles_and_copies(factory: Factory) -> None:
    """Check that copies have the same features."""
    backbone = factory()
    images = random_images(backbone, 3, 3)
    for how, twin in (("deepcopy", copy.deepcopy(backbone)), ("pickle", pickle.loads(pickle.dumps(backbone)))):
        assert torch.equal(twin(images), backbone(images)), f"{how} changed the features"


def every_group_affects_the_features(factory: Factory) -> None:
    """Check that all parameters of all groups affect the features."""
    backbone = factory()
    groups, names = backbone.parameter_groups(), _names(backbone)
    set_trainable(backbone, groups, ("all",))
    backbone(random_images(backbone, 3, 3)).square().mean().backward()
    for group, members in groups.items():
        assert members, f"the group {group} is empty"
        for parameter in members:
            assert parameter.grad is not None, (
                f"{names.get(id(parameter), 'a parameter')} in the group {group} does not affect dense features"
            )


def groups_are_complete(factory: Factory) -> None:
    """Check that blocks are numbered from 0, that groups do not overlap, and that no parameter is left out."""
    backbone = factory()
    groups, names = backbone.parameter_groups(), _names(backbone)
    numbers = sorted(int(found[1]) for group in groups if (found := re.fullmatch(r"blocks\.(\d+)", group)))
    assert numbers == list(range(max(1, len(numbers)))), (
        f"the groups of blocks have the numbers {numbers}, expected blocks.0, blocks.1, .. without gaps"
    )
    for one, other in combinations(groups, 2):
        if not (one.startswith(f"{other}.") or other.startswith(f"{one}.")):
            shared = {id(p) for p in groups[one]} & {id(p) for p in groups[other]}
            listed = ", ".join(names.get(each, "a parameter") for each in shared)
            assert not shared, f"{listed} is in the groups {one} and {other}, expected in one of them"
    grouped = {id(p) for members in groups.values() for p in members}
    backbone.requires_grad_(True)
    backbone(random_images(backbone, 3, 3)).square().mean().backward()
    for name, parameter in backbone.named_parameters():
        assert id(parameter) in grouped or parameter.grad is None, (
            f"{name} affects dense features, but is in no group. Add it to a group of parameter_groups"
        )


def _names(backbone: Backbone) -> dict[int, str]:
    return {id(parameter): name for name, parameter in backbone.named_parameters()}
