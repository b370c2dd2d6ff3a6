"""Checks that a backbone keeps the contract of `backbones.base.Backbone`, for those who write one.

    checks = backbone_checks(lambda: MyBackbone(pretrained=None))

    @pytest.mark.parametrize("check", checks, ids=str)
    def test_contract(check):
        check()

`spar backbones check CLASS` runs them without pytest. Every check makes what it needs from the factory,
which should give a small network with random weights.
"""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.packing import dense_features
from spar_lightning.backbones.parameter_groups import set_trainable

Factory = Callable[[], Backbone]
TOLERANCE = 2e-4  # of features with a standard deviation of about one, fp32


@dataclass(frozen=True)
class Check:
    """One named check; calling it raises AssertionError where the contract is broken."""

    name: str
    run: Callable[[Factory], None]
    factory: Factory

    def __call__(self) -> None:
        self.run(self.factory)

    def __str__(self) -> str:
        return self.name


def backbone_checks(factory: Factory) -> list[Check]:
    """All checks of a backbone that `factory` makes."""
    return [Check(run.__name__.removeprefix("_"), run, factory) for run in _CHECKS]


def _images(backbone: Backbone, h: int, w: int, batch: int = 1) -> Tensor:
    """Smooth random images of h x w patches."""
    generator = torch.Generator().manual_seed(100 * h + w)
    coarse = torch.randn(batch, 3, 2 * h, 2 * w, generator=generator)
    size = (h * backbone.patch_size, w * backbone.patch_size)
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def _tokens(backbone: Backbone, h: int, w: int) -> Tensor:
    return backbone.embed(_images(backbone, h, w))


def _same(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    worst = ((actual - expected).abs().max() / expected.std().clamp(min=1e-6)).item()
    assert worst <= tolerance, f"{what}: differs by {worst:.1e} standard deviations, allowed are {tolerance:.0e}"


@torch.no_grad()
def _facts_are_true(factory: Factory) -> None:
    backbone = factory()
    assert backbone.window % backbone.patch_size == 0, "window is no multiple of patch_size"
    assert len(backbone.mean) == len(backbone.std) == 3, "mean and std have three channels"
    assert min(backbone.std) > 0, "std is positive"
    side = backbone.window // backbone.patch_size
    features = backbone(_images(backbone, side, side))
    assert features.shape == (1, side, side, backbone.embed_dim), f"features at the window are {tuple(features.shape)}"
    assert backbone.depth > 0, "parameter_groups names no blocks.0"


@torch.no_grad()
def _shapes_square_wide_tall(factory: Factory) -> None:
    backbone = factory()
    for h, w in ((4, 4), (3, 7), (6, 2)):
        found = tuple(backbone(_images(backbone, h, w, batch=2)).shape)
        assert found == (2, h, w, backbone.embed_dim), f"{h} x {w} patches gave features {found}"


@torch.no_grad()
def _sides_off_the_patch_are_refused(factory: Factory) -> None:
    backbone = factory()
    try:
        backbone(torch.zeros(1, 3, 2 * backbone.patch_size + 1, 2 * backbone.patch_size))
    except ValueError:
        return
    raise AssertionError("an image whose sides are no multiples of patch_size must raise ValueError")


@torch.no_grad()
def _patches_are_row_major(factory: Factory) -> None:
    backbone = factory()
    h, w = 3, 5
    images = _images(backbone, h, w)
    plain = backbone.embed(images)
    prefix = plain.shape[1] - h * w
    for y, x in ((0, 1), (1, 0), (2, 4)):
        changed = images.clone()
        p = backbone.patch_size
        changed[:, :, y * p : (y + 1) * p, x * p : (x + 1) * p] += 1
        moved = (backbone.embed(changed) - plain).abs().amax(-1)[0, prefix:]
        assert moved.argmax().item() == y * w + x, f"patch ({y}, {x}) is not token {y * w + x} behind the prefix"


@torch.no_grad()
def _splitting_the_blocks_changes_nothing(factory: Factory) -> None:
    backbone = factory()
    tokens, grids = _tokens(backbone, 3, 4), [(3, 4)]
    whole = backbone.run_blocks(tokens, grids)
    for cut in range(backbone.depth + 1):
        parts = backbone.run_blocks(backbone.run_blocks(tokens, grids, stop=cut), grids, start=cut)
        assert torch.equal(parts, whole), f"blocks 0..{cut - 1}, then {cut}.. differ from all at once"


@torch.no_grad()
def _a_pack_equals_its_images(factory: Factory) -> None:
    backbone = factory()
    images = [_images(backbone, h, w)[0] for h, w in ((3, 4), (5, 2), (4, 4))]
    for packed, image in zip(dense_features(backbone, images), images, strict=True):
        _same(packed, backbone(image[None])[0], "an image in a pack")


@torch.no_grad()
def _a_batch_equals_its_images(factory: Factory) -> None:
    backbone = factory()
    images = _images(backbone, 4, 3, batch=4)
    together = backbone(images)
    for i in range(4):
        _same(together[i], backbone(images[i : i + 1])[0], "an image in a batch of 4")


@torch.no_grad()
def _deterministic(factory: Factory) -> None:
    backbone = factory()
    images = _images(backbone, 4, 4)
    assert torch.equal(backbone(images), backbone(images)), "the same image gave other features"


def _stays_in_eval(factory: Factory) -> None:
    backbone = factory()
    assert not any(module.training for module in backbone.modules()), "in train mode when made: end with self.eval()"
    backbone.train()
    training = [name or "the backbone" for name, module in backbone.named_modules() if module.training]
    assert not training, f"in train mode after train(): {', '.join(training[:5])}"


def _gradients_reach_what_trains(factory: Factory) -> None:
    backbone = factory()
    chosen = set_trainable(backbone, backbone.parameter_groups(), ("blocks.-2", "blocks.-1"))
    backbone(_images(backbone, 3, 3)).square().mean().backward()
    wanted = {id(p) for p in chosen}
    for name, parameter in backbone.named_parameters():
        reached = parameter.grad is not None
        assert reached == (id(parameter) in wanted), f"{name} {'has a' if reached else 'lacks its'} gradient"


def _every_group_takes_part(factory: Factory) -> None:
    backbone = factory()
    groups = backbone.parameter_groups()
    set_trainable(backbone, groups, ("all",))
    backbone(_images(backbone, 3, 3)).square().mean().backward()
    for name, members in groups.items():
        assert members, f"the group {name} is empty"
        assert all(p.grad is not None for p in members), f"a parameter of {name} takes no part in dense features"


@torch.no_grad()
def _weights_round_trip(factory: Factory) -> None:
    backbone, other = factory(), factory()
    for tensor in other.parameters():
        tensor.add_(0.01)
    weights = {name: tensor.clone() for name, tensor in backbone.vision_state_dict().items()}
    other.load_vision_state_dict(weights)
    images = _images(backbone, 3, 4)
    assert torch.equal(other(images), backbone(images)), "load_vision_state_dict(vision_state_dict()) is no round trip"
    assert other.weights_digest() == backbone.weights_digest(), "the digest differs after a round trip"
    missing = dict(list(weights.items())[1:])
    try:
        other.load_vision_state_dict(missing)
    except (ValueError, RuntimeError, KeyError):
        return
    raise AssertionError("load_vision_state_dict accepted a dictionary with a tensor missing")


@torch.no_grad()
def _pickles_and_copies(factory: Factory) -> None:
    backbone = factory()
    images = _images(backbone, 3, 3)
    for how, twin in (("deepcopy", copy.deepcopy(backbone)), ("pickle", pickle.loads(pickle.dumps(backbone)))):
        assert torch.equal(twin(images), backbone(images)), f"{how} changed the features"


def _text_tower_is_no_submodule(factory: Factory) -> None:
    backbone = factory()
    before = set(backbone.state_dict())
    backbone._text_tower.append(torch.nn.Linear(2, 2))  # what encode_text does after build_text_tower
    assert set(backbone.state_dict()) == before, "the text tower shows in the state dict"
    assert copy.deepcopy(backbone)._text_tower == [], "a copy carries the text tower along"


@torch.no_grad()
def _bf16_autocast_is_close(factory: Factory) -> None:
    backbone = factory()
    images = _images(backbone, 3, 4)
    exact = backbone(images)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        rounded = backbone(images).float()
    cosine = torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).min().item()
    assert cosine > 0.99, f"under bf16 autocast a feature has cosine {cosine:.3f} to its fp32 value"


def _found_by_short_name(factory: Factory) -> None:
    from jsonargparse import ArgumentParser

    cls = type(factory())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    path: str = parser.parse_args(["--backbone", cls.__name__]).backbone.class_path
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    assert found is cls, f"the short name {cls.__name__} means {path}, another class"


HEAVY = ("lightning", "open_clip", "timm", "torchvision", "transformers")


def _import_is_light(factory: Factory) -> None:
    module = type(factory()).__module__
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{module} cannot be imported: {done.stderr.strip().splitlines()[-1]}"
    found = set(HEAVY) & set(done.stdout.split())
    assert not found, f"importing {module} imports {', '.join(sorted(found))}; import that where a backbone is made"


_CHECKS = [
    _facts_are_true,
    _shapes_square_wide_tall,
    _sides_off_the_patch_are_refused,
    _patches_are_row_major,
    _splitting_the_blocks_changes_nothing,
    _a_pack_equals_its_images,
    _a_batch_equals_its_images,
    _deterministic,
    _stays_in_eval,
    _gradients_reach_what_trains,
    _every_group_takes_part,
    _weights_round_trip,
    _pickles_and_copies,
    _text_tower_is_no_submodule,
    _bf16_autocast_is_close,
    _found_by_short_name,
    _import_is_light,
]
