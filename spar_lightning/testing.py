"""Interface checks for authors of a backbone: they verify that a class implements `backbones.base.Backbone`.

    checks = backbone_checks(lambda: MyBackbone(pretrained=None))

    @pytest.mark.parametrize("check", checks, ids=str)
    def test_contract(check):
        check()

`spar backbones check CLASS` runs the checks without pytest. Each check creates its backbones with the
factory, which should return a small network with random weights.
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

from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.packing import dense_features
from spar_lightning.backbones.parameter_groups import set_trainable

Factory = Callable[[], Backbone]
TOLERANCE = 2e-4  # fp32, relative to the standard deviation of the features


@dataclass(frozen=True)
class Check:
    """Named interface check; calling it raises AssertionError if the backbone fails the check."""

    name: str
    run: Callable[[Factory], None]
    factory: Factory

    def __call__(self) -> None:
        """Run the check; raise AssertionError if it fails."""
        self.run(self.factory)

    def __str__(self) -> str:
        return self.name


def backbone_checks(factory: Factory) -> list[Check]:
    """Return all interface checks for the backbone that `factory` creates."""
    return [Check(run.__name__.removeprefix("_"), run, factory) for run in _CHECKS]


def _images(backbone: Backbone, h: int, w: int, batch: int = 1) -> Tensor:
    """Return smooth random images of h x w patches."""
    generator = torch.Generator().manual_seed(100 * h + w)
    coarse = torch.randn(batch, 3, 2 * h, 2 * w, generator=generator)
    size = (h * backbone.patch_size, w * backbone.patch_size)
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def _tokens(backbone: Backbone, h: int, w: int) -> Tensor:
    return backbone.embed(_images(backbone, h, w))


def _same(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    worst = ((actual - expected).abs().max() / expected.std().clamp(min=1e-6)).item()
    assert worst <= tolerance, f"{what}: differs by {worst:.1e} standard deviations, allowed: {tolerance:.0e}"


@torch.no_grad()
def _attributes_are_consistent(factory: Factory) -> None:
    backbone = factory()
    assert backbone.window % backbone.patch_size == 0, "window is not a multiple of patch_size"
    assert len(backbone.mean) == len(backbone.std) == 3, "mean and std must have three channels"
    assert min(backbone.std) > 0, "std must be positive"
    side = backbone.window // backbone.patch_size
    features = backbone(_images(backbone, side, side))
    assert features.shape == (1, side, side, backbone.embed_dim), (
        f"features of a window have shape {tuple(features.shape)}"
    )
    assert backbone.depth > 0, "parameter_groups has no group blocks.0"


@torch.no_grad()
def _shapes_square_wide_tall(factory: Factory) -> None:
    backbone = factory()
    for h, w in ((4, 4), (3, 7), (6, 2)):
        found = tuple(backbone(_images(backbone, h, w, batch=2)).shape)
        assert found == (2, h, w, backbone.embed_dim), f"features of {h} x {w} patches have shape {found}"


@torch.no_grad()
def _other_sides_raise_an_error(factory: Factory) -> None:
    backbone = factory()
    try:
        backbone(torch.zeros(1, 3, 2 * backbone.patch_size + 1, 2 * backbone.patch_size))
    except ValueError:
        return
    raise AssertionError("image sides that are not multiples of patch_size must raise ValueError")


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
        assert moved.argmax().item() == y * w + x, f"patch ({y}, {x}) must be patch token {y * w + x} (row-major)"


@torch.no_grad()
def _splitting_the_blocks_is_exact(factory: Factory) -> None:
    backbone = factory()
    tokens, grids = _tokens(backbone, 3, 4), [(3, 4)]
    whole = backbone.run_blocks(tokens, grids)
    for cut in range(backbone.depth + 1):
        parts = backbone.run_blocks(backbone.run_blocks(tokens, grids, stop=cut), grids, start=cut)
        assert torch.equal(parts, whole), f"running blocks 0..{cut - 1}, then {cut}.. differs from a single call"


@torch.no_grad()
def _packed_sequence_equals_its_images(factory: Factory) -> None:
    backbone = factory()
    images = [_images(backbone, h, w)[0] for h, w in ((3, 4), (5, 2), (4, 4))]
    for packed, image in zip(dense_features(backbone, images), images, strict=True):
        _same(packed, backbone(image[None])[0], "an image in a packed sequence")


@torch.no_grad()
def _windowed_attention_is_local(factory: Factory) -> None:
    backbone = factory()
    if not backbone.windowable:
        return
    side = backbone.window // backbone.patch_size
    assert backbone.prefix == _tokens(backbone, 2, 3).shape[1] - 6, (
        f"prefix is {backbone.prefix}, but embed adds {_tokens(backbone, 2, 3).shape[1] - 6} tokens"
    )
    windowed = backbone.with_attention(WindowedAttention(tile=1))
    native = _images(backbone, side, side)
    assert torch.equal(windowed(native), backbone(native)), "windowed attention differs at the native size"
    h, w = side + 2, side + 1
    tokens, grids, changed = _tokens(backbone, h, w), [(h, w)], backbone.prefix + (h - 1) * w  # bottom left patch
    others = tokens.clone()
    others[:, changed] += 1
    for block in range(backbone.depth):
        full, near = (
            (network.run_blocks(others, grids, block, block + 1) != network.run_blocks(tokens, grids, block, block + 1))
            .any(-1)[0, backbone.prefix :]
            .unflatten(0, (h, w))
            for network in (backbone, windowed)
        )  # which patches change
        if full.sum() <= 1:
            continue  # a block without attention, such as MaskCLIP's last one
        assert near[-1].any(), f"with windowed attention, block {block} does not attend to patches nearby"
        assert not near[0].any(), (
            f"with windowed attention, block {block} attends to a patch {h - 1} patches away, window: {side}. "
            "run_blocks must call self.attend"
        )


@torch.no_grad()
def _batch_equals_its_images(factory: Factory) -> None:
    backbone = factory()
    images = _images(backbone, 4, 3, batch=4)
    together = backbone(images)
    for i in range(4):
        _same(together[i], backbone(images[i : i + 1])[0], "an image in a batch of 4")


@torch.no_grad()
def _deterministic(factory: Factory) -> None:
    backbone = factory()
    images = _images(backbone, 4, 4)
    assert torch.equal(backbone(images), backbone(images)), "two passes on the same image gave different features"


def _stays_in_eval_mode(factory: Factory) -> None:
    backbone = factory()
    assert not any(module.training for module in backbone.modules()), (
        "in train mode when built: call self.eval() in __init__"
    )
    backbone.train()
    training = [name or "the backbone" for name, module in backbone.named_modules() if module.training]
    assert not training, f"in train mode after train(): {', '.join(training[:5])}"


def _gradients_reach_what_is_trained(factory: Factory) -> None:
    backbone = factory()
    chosen = set_trainable(backbone, backbone.parameter_groups(), ("blocks.-2", "blocks.-1"))
    backbone(_images(backbone, 3, 3)).square().mean().backward()
    wanted = {id(p) for p in chosen}
    for name, parameter in backbone.named_parameters():
        reached = parameter.grad is not None
        assert reached == (id(parameter) in wanted), f"{name} {'must not have a' if reached else 'has no'} gradient"


def _every_group_affects_the_features(factory: Factory) -> None:
    backbone = factory()
    groups = backbone.parameter_groups()
    set_trainable(backbone, groups, ("all",))
    backbone(_images(backbone, 3, 3)).square().mean().backward()
    for name, members in groups.items():
        assert members, f"the group {name} is empty"
        assert all(p.grad is not None for p in members), f"a parameter of {name} does not affect dense features"


@torch.no_grad()
def _weights_round_trip(factory: Factory) -> None:
    backbone, other = factory(), factory()
    for tensor in other.parameters():
        tensor.add_(0.01)
    weights = {name: tensor.clone() for name, tensor in backbone.vision_state_dict().items()}
    other.load_vision_state_dict(weights)
    images = _images(backbone, 3, 4)
    assert torch.equal(other(images), backbone(images)), "load_vision_state_dict(vision_state_dict()) changed features"
    assert other.weights_digest() == backbone.weights_digest(), "loading vision_state_dict() changed weights_digest()"
    missing = dict(list(weights.items())[1:])
    try:
        other.load_vision_state_dict(missing)
    except (ValueError, RuntimeError, KeyError):
        return
    raise AssertionError("load_vision_state_dict accepted a state dict with a missing tensor")


@torch.no_grad()
def _pickles_and_copies(factory: Factory) -> None:
    backbone = factory()
    images = _images(backbone, 3, 3)
    for how, twin in (("deepcopy", copy.deepcopy(backbone)), ("pickle", pickle.loads(pickle.dumps(backbone)))):
        assert torch.equal(twin(images), backbone(images)), f"{how} changed the features"


def _text_tower_is_not_a_submodule(factory: Factory) -> None:
    backbone = factory()
    before = set(backbone.state_dict())
    backbone._text_tower.append(torch.nn.Linear(2, 2))  # as in encode_text
    assert set(backbone.state_dict()) == before, "the state dict contains the text tower"
    assert copy.deepcopy(backbone)._text_tower == [], "a deep copy contains the text tower"


@torch.no_grad()
def _bf16_autocast_is_close(factory: Factory) -> None:
    backbone = factory()
    images = _images(backbone, 3, 4)
    exact = backbone(images)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        rounded = backbone(images).float()
    cosine = torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).min().item()
    assert cosine > 0.99, f"bf16 autocast: the cosine similarity to fp32 features is only {cosine:.3f}"


def _found_by_short_name(factory: Factory) -> None:
    from jsonargparse import ArgumentParser

    cls = type(factory())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    path: str = parser.parse_args(["--backbone", cls.__name__]).backbone.class_path
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    assert found is cls, f"the short name {cls.__name__} refers to another class, {path}"


HEAVY = ("lightning", "open_clip", "timm", "torchvision", "transformers")


def _import_is_fast(factory: Factory) -> None:
    module = type(factory()).__module__
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{module} cannot be imported: {done.stderr.strip().splitlines()[-1]}"
    found = set(HEAVY) & set(done.stdout.split())
    assert not found, f"importing {module} imports {', '.join(sorted(found))}; import them inside functions"


_CHECKS = [
    _attributes_are_consistent,
    _shapes_square_wide_tall,
    _other_sides_raise_an_error,
    _patches_are_row_major,
    _splitting_the_blocks_is_exact,
    _packed_sequence_equals_its_images,
    _windowed_attention_is_local,
    _batch_equals_its_images,
    _deterministic,
    _stays_in_eval_mode,
    _gradients_reach_what_is_trained,
    _every_group_affects_the_features,
    _weights_round_trip,
    _pickles_and_copies,
    _text_tower_is_not_a_submodule,
    _bf16_autocast_is_close,
    _found_by_short_name,
    _import_is_fast,
]
