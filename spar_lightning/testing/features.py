"""Checks of the features: attributes, shapes, splits, packed sequences, batches, attention and precision."""

import torch

from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.backbones.packing import dense_features
from spar_lightning.testing.check import Factory, assert_same, random_images, random_tokens


@torch.no_grad()
def attributes_are_consistent(factory: Factory) -> None:
    """Check `window`, `patch_size`, `mean`, `std`, `prefix` and `embed_dim`."""
    backbone = factory()
    window, patch = backbone.window, backbone.patch_size
    assert window % patch == 0, f"window is {window}, which is not a multiple of patch_size, {patch}"
    for name, low, high in (("mean", -0.1, 1), ("std", 0.05, 1)):
        values = getattr(backbone, name)
        assert len(values) == 3, f"{name} has {len(values)} values, expected 3, one per channel"
        assert all(low <= value <= high for value in values), (
            f"{name} is {tuple(values)}, expected values from {low} to {high}, because pixels are in [0, 1]"
        )
    tokens = random_tokens(backbone, 2, 3).shape[1]
    assert tokens - 6 == backbone.prefix, (
        f"prefix is {backbone.prefix}, expected {tokens - 6}: embed returns {tokens} tokens for 2 x 3 patches"
    )
    side = window // patch
    found, expected = tuple(backbone(random_images(backbone, side, side)).shape), (1, side, side, backbone.embed_dim)
    assert found == expected, f"features of a window have shape {found}, expected {expected}"


@torch.no_grad()
def inputs_stay_unchanged(factory: Factory) -> None:
    """Check that no step changes its input in place; inputs can be cached."""
    backbone, grids = factory(), [(3, 4)]
    images = random_images(backbone, 3, 4)
    tokens = backbone.embed(images)
    last = backbone.run_blocks(tokens, grids)
    copies = [given.clone() for given in (images, tokens, last)]
    backbone.embed(images), backbone.run_blocks(tokens, grids), backbone.project(last, grids)
    for name, given, before in zip(("embed", "run_blocks", "project"), (images, tokens, last), copies, strict=True):
        assert torch.equal(given, before), f"{name} changes its input in place"


@torch.no_grad()
def shapes_square_wide_tall(factory: Factory) -> None:
    """Check the shape of the features of images with other sides than the window."""
    backbone = factory()
    for h, w in ((4, 4), (3, 7), (6, 2)):
        found = tuple(backbone(random_images(backbone, h, w, batch=2)).shape)
        expected = (2, h, w, backbone.embed_dim)
        assert found == expected, f"features of 2 images of {h} x {w} patches have shape {found}, expected {expected}"


@torch.no_grad()
def other_sides_raise_an_error(factory: Factory) -> None:
    """Check that `embed` raises ValueError for sides that are not multiples of the patch size."""
    backbone = factory()
    try:
        backbone(torch.zeros(1, 3, 2 * backbone.patch_size + 1, 2 * backbone.patch_size))
    except ValueError:
        return
    raise AssertionError("image sides that are not multiples of patch_size must raise ValueError")


@torch.no_grad()
def splitting_the_blocks_is_exact(factory: Factory) -> None:
    """Check that `run_blocks` gives the same tokens in one call and in two."""
    backbone = factory()
    tokens, grids = random_tokens(backbone, 3, 4), [(3, 4)]
    whole = backbone.run_blocks(tokens, grids)
    for cut in range(backbone.depth + 1):
        parts = backbone.run_blocks(backbone.run_blocks(tokens, grids, stop=cut), grids, start=cut)
        assert torch.equal(parts, whole), f"running blocks 0..{cut - 1}, then {cut}.. differs from a single call"


@torch.no_grad()
def packed_sequence_equals_its_images(factory: Factory) -> None:
    """Check that attention stays within each image of a packed sequence."""
    backbone = factory()
    images = [random_images(backbone, h, w)[0] for h, w in ((3, 4), (5, 2), (4, 4))]
    for packed, image in zip(dense_features(backbone, images), images, strict=True):
        assert_same(packed, backbone(image[None])[0], "an image in a packed sequence")


@torch.no_grad()
def windowed_attention_is_local(factory: Factory) -> None:
    """Check windowed attention: exact at the native size, and local on larger grids."""
    backbone = factory()
    if not backbone.windowable:
        return
    side = backbone.window // backbone.patch_size
    windowed = backbone.with_attention(WindowedAttention(tile=1))
    native = random_images(backbone, side, side)
    assert torch.equal(windowed(native), backbone(native)), "windowed attention differs at the native size"
    h, w = side + 2, side + 1
    tokens, grids, changed = random_tokens(backbone, h, w), [(h, w)], backbone.prefix + (h - 1) * w  # bottom left patch
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
def batch_equals_its_images(factory: Factory) -> None:
    """Check that the features of an image do not depend on others in the batch."""
    backbone = factory()
    images = random_images(backbone, 4, 3, batch=4)
    together = backbone(images)
    for i in range(4):
        assert_same(together[i], backbone(images[i : i + 1])[0], "an image in a batch of 4")


@torch.no_grad()
def deterministic(factory: Factory) -> None:
    """Check that two passes give the same features."""
    backbone = factory()
    images = random_images(backbone, 4, 4)
    assert torch.equal(backbone(images), backbone(images)), "two passes on the same image gave different features"


@torch.no_grad()
def bf16_autocast_is_close(factory: Factory) -> None:
    """Check that features in bf16 are close to those in fp32."""
    backbone = factory()
    images = random_images(backbone, 3, 4)
    exact = backbone(images)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        rounded = backbone(images).float()
    cosine = torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).min().item()
    assert cosine > 0.99, f"bf16 autocast: the cosine similarity to fp32 features is only {cosine:.3f}"
