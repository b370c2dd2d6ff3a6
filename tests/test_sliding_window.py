"""Windows cover the image, and stitching with matrices equals averaging on an upsampled canvas."""

import math
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spar_lightning.backbones import Tiny
from spar_lightning.errors import UserError
from spar_lightning.sliding_window import Blend, SlidingWindow, stitch_matrices, window_starts
from tests.rounding import assert_rounded


class Local(nn.Module):
    """Encoder in float64: a linear patch embedding, scaled by 1 + the mean of the window."""

    def __init__(self, patch_size: int, window: int) -> None:
        super().__init__()
        self.patch_size, self.window = patch_size, window
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(5, 3, patch_size, patch_size, generator=generator, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.conv2d(images, self.weight, stride=self.patch_size)
        return (maps * (1 + images.mean((1, 2, 3), keepdim=True))).permute(0, 2, 3, 1)


def blended(height: int, width: int, blend: Blend) -> Tensor:
    """Return the weights (height, width) of a window: equal, or the product of two periodic Hann windows."""
    if blend == "mean":
        return torch.ones(height, width, dtype=torch.float64)
    # A periodic Hann window of twice the length has its values between ours at the even places.
    rows, columns = (torch.hann_window(2 * n, dtype=torch.float64)[1::2] for n in (height, width))
    return rows[:, None] * columns


def stitch_on_canvas(encoder: Local, image: Tensor, stride: int, window: int, blend: Blend) -> Tensor:
    """Stitch by definition: upsample each map, average all maps on a canvas, and resize to the patch grid."""
    patch = encoder.patch_size
    r = patch // math.gcd(patch, stride)
    height, width = image.shape[-2:]
    k, l = min(window, height), min(window, width)
    canvas = torch.zeros(1, 5, height // patch * r, width // patch * r, dtype=torch.float64)
    count = torch.zeros_like(canvas)
    for y in sorted({*range(0, height - k + 1, stride), height - k}):
        for x in sorted({*range(0, width - l + 1, stride), width - l}):
            features = encoder(image[None, :, y : y + k, x : x + l]).permute(0, 3, 1, 2)
            fine = F.interpolate(features, scale_factor=r, mode="bilinear", align_corners=False)
            top, left = y * r // patch, x * r // patch
            weights = blended(fine.shape[2], fine.shape[3], blend)
            canvas[:, :, top : top + fine.shape[2], left : left + fine.shape[3]] += weights * fine
            count[:, :, top : top + fine.shape[2], left : left + fine.shape[3]] += weights
    mean = canvas / count
    size = (height // patch, width // patch)
    return F.interpolate(mean, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


geometry = st.tuples(
    st.sampled_from([2, 4, 8, 14, 16]),  # patch
    st.integers(1, 5),  # window in patches
    st.integers(1, 9),  # height in patches
    st.integers(1, 9),  # width in patches
    st.floats(0.05, 1.3),  # stride as a fraction of the window
)


@given(geometry, st.integers(1, 7), st.sampled_from(get_args(Blend)))
@settings(max_examples=80, deadline=None)
def test_equals_the_canvas(sizes: tuple[int, int, int, int, float], batch_size: int, blend: Blend) -> None:
    patch, k, h, w, share = sizes
    window = k * patch
    stride = max(1, min(window, round(share * window)))
    encoder = Local(patch, window)
    generator = torch.Generator().manual_seed(h * 100 + w)
    image = torch.randn(3, h * patch, w * patch, dtype=torch.float64, generator=generator)
    stitched = SlidingWindow(encoder, stride, batch_size=batch_size, blend=blend)(image[None])[0]
    torch.testing.assert_close(stitched, stitch_on_canvas(encoder, image, stride, window, blend), rtol=0, atol=1e-10)


@given(geometry, st.integers(1, 7), st.sampled_from(get_args(Blend)), st.integers(1, 50), st.data())
@settings(max_examples=80, deadline=None)
def test_rows_equal_the_whole(
    sizes: tuple[int, int, int, int, float], batch_size: int, blend: Blend, band: int, data: st.DataObject
) -> None:
    patch, k, h, w, share = sizes
    window = k * patch
    windows = SlidingWindow(Local(patch, window), min(max(1, int(share * window)), window), None, batch_size, blend)
    image = torch.randn(3, h * patch, w * patch, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, size = windows(image[None])[0], (h * patch, w * patch)
    torch.testing.assert_close(torch.cat(list(windows.rows(image.split(band, dim=1), size))), whole)
    first = data.draw(st.integers(0, h - 1))
    last = data.draw(st.integers(first + 1, h))
    part = torch.cat(list(windows.rows(image.split(band, dim=1), size, first, last)))
    torch.testing.assert_close(part, whole[first:last])


def test_rows_are_read_and_computed_only_as_far_as_needed() -> None:
    encoder, image = Local(4, 16), torch.randn(3, 400, 20, dtype=torch.float64)
    windows, read, computed = SlidingWindow(encoder, 12, blend="hann"), [0], [0]

    def bands() -> Iterator[Tensor]:
        for band in image.split(4, dim=1):
            read[0] += 4
            yield band

    encoder.register_forward_hook(lambda _, images, __: computed.__setitem__(0, computed[0] + len(images[0])))
    rows = windows.rows(bands(), (400, 20))
    next(rows)
    # The first 3 rows of patches are yielded when the pixels of the second row of windows are there: 12 + 16.
    assert read == [28] and computed == [2]
    computed[0] = read[0] = 0
    assert len(torch.cat(list(windows.rows(bands(), (400, 20), 50, 53)))) == 3
    # Rows 200 to 211 in pixels are covered by the windows that begin at row 192 and 204, and no others.
    assert computed == [4] and read == [232]


@given(st.integers(1, 400), st.integers(1, 200), st.integers(1, 200))
def test_windows_cover_the_axis(length: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    starts = window_starts(length, window, stride)
    covered = {i for start in starts for i in range(start, min(start + window, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts))
    assert starts[-1] == max(length - window, 0)


def test_constants_are_preserved() -> None:
    matrices = stitch_matrices(length=176, window=64, stride=24, patch=16)
    assert matrices.shape == (6, 11, 4)
    torch.testing.assert_close(matrices.sum((0, 2)), torch.ones(11, dtype=torch.float64))


def test_one_window_is_the_single_pass() -> None:
    tiny = Tiny()
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_rounded(SlidingWindow(tiny, 16)(image), tiny(image), tiny.depth, tiny.embed_dim)


@pytest.mark.parametrize("stride", [8, 12, 20])
def test_batch_size_changes_nothing(stride: int) -> None:
    tiny = Tiny()
    image = torch.randn(1, 3, 96, 120, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = SlidingWindow(tiny, stride, batch_size=1000)(image)
        pieces = SlidingWindow(tiny, stride, batch_size=3)(image)
    assert_rounded(pieces, whole, tiny.depth, tiny.embed_dim)


def test_sides_must_be_multiples_of_the_patch() -> None:
    with pytest.raises(UserError, match=r"\b8\b.*100 x 64"):
        SlidingWindow(Tiny())(torch.zeros(1, 3, 100, 64))


def test_window_must_be_a_multiple_of_the_patch() -> None:
    with pytest.raises(UserError, match=r"window .*\b8\b.*\b60\b"):
        SlidingWindow(Tiny(), window=60)


def test_a_stride_that_leaves_gaps_is_refused() -> None:
    with pytest.raises(UserError, match=r"stride 65 .*64"):
        SlidingWindow(Tiny(pretrained=None), stride=65)


def test_autocast_does_not_round_the_stitching() -> None:
    class Fixed(Local):
        def forward(self, images: Tensor) -> Tensor:  # operations that autocast does not affect
            maps: Tensor = images.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).mean((3, 5))
            return maps.permute(0, 2, 3, 1)

    image = torch.randn(1, 3, 48, 56, generator=torch.Generator().manual_seed(0))
    plain = SlidingWindow(Fixed(8, 32), 12)(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SlidingWindow(Fixed(8, 32), 12)(image), plain)
