"""Checks of positions: the order of patches, and positional embeddings at other image sizes.

Rotary embeddings in the blocks can only be compared with the original library (reference.py).
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.testing.check import Factory, random_images, random_tokens

ROUNDING: Final = 1e-9  # fp64, relative to the standard deviation of the features
CORRELATION: Final = 0.9  # of a resized table; bicubic against bilinear gives 0.95 and more on random tables


@torch.no_grad()
def patches_are_row_major(factory: Factory) -> None:
    """Check that `embed` returns patch tokens row by row."""
    backbone = factory()
    h, w = 3, 5
    images = random_images(backbone, h, w)
    plain = backbone.embed(images)
    prefix = plain.shape[1] - h * w
    for y, x in ((0, 1), (1, 0), (2, 4)):
        changed = images.clone()
        p = backbone.patch_size
        changed[:, :, y * p : (y + 1) * p, x * p : (x + 1) * p] += 1
        moved = (backbone.embed(changed) - plain).abs().amax(-1)[0, prefix:]
        assert moved.argmax().item() == y * w + x, f"patch ({y}, {x}) must be patch token {y * w + x} (row-major)"


@torch.no_grad()
def project_keeps_the_order(factory: Factory) -> None:
    """Check that `project` removes the first tokens and returns the others in their order."""
    backbone, grids = factory(), [(3, 5)]
    tokens = backbone.run_blocks(random_tokens(backbone, 3, 5), grids)
    plain = backbone.project(tokens, grids)
    found, expected = tuple(plain.shape), (1, 15, backbone.embed_dim)
    assert found == expected, f"project returns shape {found} for 3 x 5 patches, expected {expected}"
    prefix = tokens.shape[1] - 15
    noise = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(0))
    for patch in (0, 1, 7, 14):
        changed = tokens.clone()
        changed[:, prefix + patch] += tokens.std() * noise
        moved = int((backbone.project(changed, grids) - plain).abs().amax(-1)[0].argmax())
        assert moved == patch, (
            f"patch token {patch} (after {prefix} class and register tokens) becomes feature {moved}, expected "
            f"{patch}. project must remove the first tokens, and keep the order of the others"
        )


@torch.no_grad()
def positions_affect_the_features(factory: Factory) -> None:
    """Check that the features depend on the order of the patches."""
    backbone = factory().double()  # with random weights, layer scales can make the effect as small as rounding in fp32
    h, w, p = 4, 4, backbone.patch_size
    images = random_images(backbone, h, w).double()
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(0))
    patches = images.unfold(2, p, p).unfold(3, p, p).flatten(2, 3)[:, :, order]  # (1, 3, h * w, p, p)
    shuffled = patches.unflatten(2, (h, w)).permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    expected, found = backbone(images).flatten(1, 2)[:, order], backbone(shuffled).flatten(1, 2)
    differs = (found - expected).abs().max() / expected.std()
    assert differs > ROUNDING, "features of shuffled patches are the shuffled features: positions are missing"


@torch.no_grad()
def table_fits_the_window(factory: Factory) -> None:
    """Check that the positional embedding has as many rows as the window has patches."""
    backbone = factory()
    table = backbone.parameter_groups().get("pos_embed", [])
    if len(table) != 1 or backbone.crops_positions:
        return  # not one row per position of the window
    rows, side = table[0].numel() // table[0].shape[-1], backbone.window // backbone.patch_size
    assert rows - side * side in range(backbone.prefix + 1), (
        f"the positional embedding has {rows} rows, expected {side} x {side}, because window / patch_size is {side}, "
        f"and up to {backbone.prefix} for class and register tokens. Set window to the image side of pretraining"
    )


@torch.no_grad()
def positions_are_resized(factory: Factory) -> None:
    """Check that the positional embedding is resized to the grid, neither cut, repeated nor transposed."""
    backbone = factory()
    side = backbone.window // backbone.patch_size
    table = _table(backbone, side, side)
    if table.std((0, 1)).max() < 1e-6:
        assert "pos_embed" not in backbone.parameter_groups(), (
            "the group pos_embed has parameters, but the embedding of a constant image is the same for all patches"
        )
        return  # rotary embeddings
    for h, w in ((side + 3, 2 * side), (max(1, side - 1), max(2, side - 2))):
        found = _table(backbone, h, w)
        square = max(h, w)
        cropped = backbone.crops_positions
        expected = _table(backbone, square, square)[:h, :w] if cropped else _resized(table, h, w)
        likeness = _correlation(found, expected)
        mistakes = {
            "height and width are exchanged": _resized(table, w, h).reshape(h, w, -1),
            "the table is repeated or cut instead of resized": table.tile(3, 3, 1)[:h, :w],
        }
        why = [text for text, other in mistakes.items() if _correlation(found, other) > CORRELATION]
        assert likeness > CORRELATION, (
            f"on a grid of {h} x {w}, positions have a correlation of {likeness:.2f} with the resized table of the "
            f"window ({side} x {side}), expected more than {CORRELATION}: {(why or ['resize the table (bicubic)'])[0]}"
        )


def _table(backbone: Backbone, h: int, w: int) -> Tensor:
    """Return the patch tokens (h, w, D) of a constant image, whose differences are those of the positions."""
    tokens = backbone.embed(torch.zeros(1, 3, h * backbone.patch_size, w * backbone.patch_size))
    table: Tensor = tokens[0, -h * w :].unflatten(0, (h, w))
    return table


def _resized(table: Tensor, h: int, w: int) -> Tensor:
    channels_first = table.permute(2, 0, 1)[None]
    resized: Tensor = F.interpolate(channels_first, (h, w), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0)


def _correlation(one: Tensor, other: Tensor) -> float:
    one, other = (table - table.mean((0, 1)) for table in (one, other))
    return float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-12))
