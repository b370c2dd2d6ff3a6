"""Windowed attention equals full attention at the native size, and an explicit mask over the image at any size."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spar_lightning.backbones import Backbone, Tiny, attention
from spar_lightning.backbones.attention import WindowedAttention, attend
from spar_lightning.backbones.base import Grid
from spar_lightning.backbones.packing import dense_features
from spar_lightning.backbones.pos_embed import placed, resized
from spar_lightning.errors import UserError
from tests.rounding import assert_rounded
from tests.testing.test_checks import FAMILIES, built

LENGTH = st.integers(1, 13)
SETTINGS = st.builds(
    WindowedAttention,
    reach=st.sampled_from([1.0, 1.3, 2.5, 100.0]),
    tile=st.none() | st.integers(1, 4),
    temperature=st.sampled_from(["none", "log"]),
)


def masked(q: Tensor, k: Tensor, v: Tensor, grid: Grid, prefix: int, windows: WindowedAttention, g: int) -> Tensor:
    """Compute windowed attention of one image with a mask over all tokens, patch by patch."""
    t, keys = windows.sides(g)

    def seen(n: int) -> Tensor:
        mask = torch.zeros(n, n, dtype=torch.bool)
        tile, reach = min(t, n), min(keys, n)
        for i in range(n):
            start = min(i // tile * tile, n - tile)  # of the tile of patch i; the last one is shifted inward
            first = min(max(start - (reach - tile) // 2, 0), n - reach)
            assert first <= i < first + reach
            mask[i, first : first + reach] = True
        return mask

    h, w = grid
    near = (seen(h)[:, None, :, None] & seen(w)[None, :, None, :]).reshape(h * w, h * w)
    n = min(keys, h) * min(keys, w)
    assert (near.sum(1) == n).all()  # every patch sees equally many
    if windows.temperature == "log":
        q = q * max(1.0, math.log(n) / math.log(g * g))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(near, (prefix, 0, prefix, 0), value=True))


@settings(max_examples=150, deadline=None)
@given(windows=SETTINGS, grids=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=3), prefix=st.integers(0, 5))
def test_equals_a_mask_over_the_whole_image(windows: WindowedAttention, grids: list[Grid], prefix: int) -> None:
    """Also in packed sequences, with class tokens, in both directions, and in chunks of one tile."""
    batch = 2 if len(grids) == 1 else 1
    lengths = [prefix + h * w for h, w in grids]
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 2, sum(lengths), 8, requires_grad=True) for _ in range(3))
    images = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), grids, strict=True)
    expected = torch.cat([masked(*image, prefix, windows, 4) for image in images], dim=2)
    found = attend(q, k, v, grids, prefix, windows, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad(found, (q, k, v), weights)
    theirs = torch.autograd.grad(expected, (q, k, v), weights)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "GATHERED", {"cpu": 1})
        patch.setattr(attention, "CACHED", 0)
        torch.testing.assert_close(attend(q, k, v, grids, prefix, windows, 4), expected, rtol=0, atol=1e-5)


def images(backbone: Backbone, *grids: Grid) -> list[Tensor]:
    generator, p = torch.Generator().manual_seed(0), backbone.patch_size
    return [torch.randn(3, h * p, w * p, generator=generator) for h, w in grids]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_full_attention_to_the_bit_in_the_native_grid(family: str, small_naflex: str) -> None:
    full = built(family, small_naflex)
    g = full.window // full.patch_size
    for windows in (WindowedAttention(), WindowedAttention(2.5, 1, "log", "windowed")):
        network = full.with_attention(windows)
        for image in images(full, (g, g), (g - 1, g), (2, 1)):
            assert torch.equal(network(image[None]), full(image[None]))
        larger = images(full, (g + 3, g + 1))[0][None]
        assert not torch.equal(network(larger), full(larger))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_full_attention_in_half_precision(dtype: torch.dtype) -> None:
    full, windowed = Tiny(), Tiny().with_attention(WindowedAttention(positions="windowed"))
    for h, w in ((8, 8), (5, 8)):
        image = images(full, (h, w))[0][None]
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            assert torch.equal(windowed(image), full(image))


def test_training_after_validation_in_inference_mode() -> None:
    """Both use the same cached tiles."""
    network, grid = Tiny().with_attention(WindowedAttention()), (19, 17)  # no other test has this grid
    image = images(network, grid)[0][None]
    with torch.inference_mode():
        expected = network(image)
    found = network(image)
    torch.testing.assert_close(found, expected.clone())
    found.sum().backward()


def test_gradients_of_class_tokens_in_bf16() -> None:
    """Each is a sum over all tiles, which bf16 could not accumulate."""
    grid, prefix = (48, 48), 2
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(3, 1, 2, prefix + 48 * 48, 8, generator=generator).bfloat16().float()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = exact.to(dtype).requires_grad_().unbind()
        value = v.detach().requires_grad_()
        attend(q.detach(), k.detach(), value, [grid], prefix, WindowedAttention(), 8).sum().backward()
        assert value.grad is not None
        found[dtype] = value.grad[:, :, :prefix].float()
    error = (found[torch.bfloat16] - found[torch.float32]).norm() / found[torch.float32].norm()
    assert error < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_and_its_gradients_equal_the_images_one_by_one(family: str, small_naflex: str) -> None:
    network = copy.deepcopy(built(family, small_naflex)).with_attention(WindowedAttention(positions="windowed"))
    g = network.window // network.patch_size
    pixels = images(network, (g + 2, g + 1), (2, 3), (g + 1, 2))
    parameter = network.parameter_groups()["blocks.0.qkv"][0]
    together = dense_features(network, pixels)
    alone = [network(image[None])[0] for image in pixels]
    for ours, theirs in zip(together, alone, strict=True):
        assert_rounded(ours, theirs, network.depth, network.embed_dim)
    gradients = [
        torch.autograd.grad(torch.stack([f.square().mean() for f in each]).mean(), parameter)[0]
        for each in (together, alone)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-4 * float(gradients[1].abs().max()))


def test_both_networks_share_parameters_and_text() -> None:
    tiny = Tiny()
    windowed = tiny.with_attention(WindowedAttention())
    assert windowed is not tiny and windowed.with_attention(WindowedAttention()) is windowed
    assert type(windowed) is Tiny and windowed.windowed == WindowedAttention() and tiny.windowed is None
    tiny.encode_text(["red dot"])
    assert windowed._text_tower and windowed._text_tower is tiny._text_tower
    with torch.no_grad():
        windowed.pos_embed.add_(1)
    assert torch.equal(tiny.pos_embed, windowed.pos_embed)
    windowed.double()
    assert tiny.pos_embed.dtype == torch.float64
    back = windowed.with_attention(None)
    image = images(tiny, (10, 12))[0][None].double()
    assert torch.equal(back(image), tiny(image))
    assert copy.deepcopy(windowed).windowed == WindowedAttention()


def test_windowed_positions_are_the_mean_over_all_windows() -> None:
    table, g = torch.randn(1, 16, 3), 4
    h, w = 6, 3  # windows are clamped to the image: 4 x 3
    window = resized(table, (4, 3), (g, g)).unflatten(1, (4, 3))
    total, count = torch.zeros(1, h, w, 3), torch.zeros(h, w, 1)
    for top in range(h - g + 1):
        total[:, top : top + g] += window
        count[top : top + g] += 1
    windows = WindowedAttention(positions="windowed")
    found = placed(lambda grid: resized(table, grid, (g, g)), (h, w), (g, g), windows)
    torch.testing.assert_close(found, (total / count).flatten(1, 2))


class Plain(Tiny):
    """Backbone that does not support windowed attention."""

    windowable = False


def test_a_backbone_without_it_says_so() -> None:
    with pytest.raises(UserError, match=r"Plain does not support windowed attention.*self\.attend"):
        Plain().with_attention(WindowedAttention())
    assert Plain().with_attention(None).windowed is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"reach": 0.5}, "reach"),
        ({"reach": math.nan}, "reach"),
        ({"reach": math.inf}, "reach"),
        ({"tile": 0}, "tile"),
        ({"temperature": "exp"}, "temperature"),
        ({"positions": "rope"}, "positions"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=rf"attention\.{named} must be"):
        WindowedAttention(**settings)  # type: ignore[arg-type]


def test_a_tile_larger_than_its_window() -> None:
    with pytest.raises(UserError, match=r"attention\.tile must be at most 8.*got 9"):
        Tiny().with_attention(WindowedAttention(tile=9))
