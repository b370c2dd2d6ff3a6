"""Tests of the image codec: images convertible to RGB are decoded, all others are rejected with the reason."""

import io
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from spar_lightning.image.codec import ImageError, decode_image, encode_image, image_size

PHOTO = Image.fromarray(getattr(skimage.data, "chelsea")()[:64, :80])  # noqa: B009 - untyped


def content(image: Image.Image, suffix: str = "png", **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("RGB", "jpeg"), ("L", "jpeg"), ("CMYK", "jpeg"), ("RGBA", "png"), ("LA", "png"), ("P", "png"),
     ("1", "png"), ("YCbCr", "jpeg"), ("RGB", "webp"), ("RGB", "bmp"), ("CMYK", "tiff")],
)  # fmt: skip
def test_modes_that_can_be_converted(mode: str, suffix: str) -> None:
    image = decode_image(content(PHOTO.convert(mode), suffix))
    assert image.shape == (3, 64, 80) and image.dtype == torch.uint8
    close = torch.from_numpy(np.array(PHOTO.convert(mode).convert("RGB"))).permute(2, 0, 1)
    lossy = suffix in ("jpeg", "webp")
    assert (image.float() - close).abs().mean() <= (2.2 if lossy else 0)  # measured: 1.2 to 2.12 (lossy), 0 (lossless)


def test_16_bits_keep_their_range() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = decode_image(content(Image.fromarray(ramp)))
    assert torch.equal(image[0], torch.from_numpy((ramp >> 8).astype(np.uint8))) and torch.equal(image[0], image[2])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode}"):
        decode_image(content(PHOTO.convert("L").convert(mode), "tiff"))


@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "tiff"])
def test_every_truncation_is_refused(suffix: str) -> None:
    whole = content(PHOTO, suffix)
    for cut in range(0, len(whole) - len(whole) // 50 - 1, max(1, len(whole) // 40)):
        with pytest.raises(ImageError):
            decode_image(whole[:cut])


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ImageError, match="0 bytes"):
        decode_image(b"")
    with pytest.raises(ImageError, match="not an image in a known format"):
        decode_image(b"<html>not found</html>")


def test_sizes_and_round_trip() -> None:
    image = decode_image(content(PHOTO))
    assert torch.equal(decode_image(encode_image(image)), image)
    long = torch.randint(0, 256, (3, 2, 16384), dtype=torch.uint8)  # one pixel wider than the limit of WebP
    assert torch.equal(decode_image(encode_image(long)), long)
    assert image_size(content(PHOTO)) == (64, 80) and image_size(b"nothing") == (0, 0)
