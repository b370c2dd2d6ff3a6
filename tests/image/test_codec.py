"""Tests of the image codec: images convertible to RGB are decoded, all others are rejected with the reason."""

import io
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps, PngImagePlugin

from spar_lightning.image.codec import ImageError, decode_image, encode_image, encode_jpeg, from_pillow, image_size
from spar_lightning.image.resize import at_most

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
    with pytest.raises(ImageError, match="no pixels"):
        from_pillow(Image.new("RGB", (0, 4)), upright=True)
    with pytest.raises(ImageError, match="not an image in a known format"):
        decode_image(b"<html>not found</html>")


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are not defined
@pytest.mark.parametrize("suffix", ["png", "jpeg", "tiff", "webp"])
def test_orientations(orientation: int, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    photo = content(PHOTO, suffix, exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(photo))))
    for band in (2**24, 500):  # rows at once: all, 6
        monkeypatch.setattr("spar_lightning.image.codec.BAND", band)
        assert np.array_equal(decode_image(photo, upright=True).permute(1, 2, 0).numpy(), upright)
        assert image_size(photo, upright=True) == upright.shape[:2]
        small = at_most(torch.from_numpy(upright).permute(2, 0, 1), 30)
        assert torch.equal(decode_image(photo, upright=True, max_side=30), small)
        as_stored = np.array(Image.open(io.BytesIO(photo)))
        assert np.array_equal(decode_image(photo).permute(1, 2, 0).numpy(), as_stored)


def test_pgm_uses_its_own_range() -> None:
    ramp = np.arange(1024, dtype=">u2").reshape(32, 32)
    image = decode_image(b"P5 32 32 1023 " + ramp.tobytes())  # 10 bits
    assert torch.equal(image[0], torch.from_numpy((np.arange(1024) * 65535 // 1023 >> 8).reshape(32, 32)).byte())


@pytest.mark.parametrize("chunks", ["texts", "profile", "texts at the end"])
def test_texts_and_profiles_of_any_size(chunks: str) -> None:
    texts = PngImagePlugin.PngInfo()
    for _ in range(3):
        texts.add_text("prompt", "x" * 2**21, zip=True)
    given = {"icc_profile": bytes(2**21)} if chunks == "profile" else {"pnginfo": texts}
    photo = content(PHOTO, **given)
    if chunks == "texts at the end":
        end, first = photo.rindex(b"IEND") - 4, photo.index(b"zTXt") - 4
        picture = photo.index(b"IDAT") - 4
        photo = photo[:first] + photo[picture:end] + photo[first:picture] + photo[end:]
    assert torch.equal(decode_image(photo), torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1))
    assert image_size(photo) == (64, 80)


def test_the_limit_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = content(PHOTO)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 80 // 3)  # Pillow raises an error above twice its limit
    assert decode_image(photo).shape == (3, 64, 80)
    assert Image.MAX_IMAGE_PIXELS == 64 * 80 // 3
    monkeypatch.setattr("spar_lightning.image.codec.LARGEST", 64 * 80 - 1)
    with pytest.raises(ImageError, match="80 x 64 pixels"):
        decode_image(photo)


def _warnings(caplog: pytest.LogCaptureFixture, photo: bytes) -> list[str]:
    caplog.clear()
    decode_image(photo, name="scan.tif")
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("suffix", ["gif", "tiff", "webp", "png"])
def test_frames_and_pages_after_the_first_are_named(suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = _warnings(caplog, content(PHOTO, suffix, save_all=True, append_images=[ImageOps.invert(PHOTO)]))
    assert "scan.tif" in said and "first of 2" in said
    assert not _warnings(caplog, content(PHOTO, suffix))
    assert not _warnings(caplog, content(PHOTO, "mpo", save_all=True, append_images=[PHOTO]))  # a preview


@pytest.mark.parametrize(("bits", "suffix"), [(10, "png"), (12, "tiff"), (14, "png")])
def test_16_bits_of_which_few_are_used_are_named(bits: int, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    (said,) = _warnings(caplog, content(Image.fromarray(ramp), suffix))
    assert f"with {bits} bits" in said and f"by {2 ** (16 - bits)}" in said
    assert not _warnings(caplog, content(Image.fromarray(ramp << (16 - bits)), suffix))
    assert not _warnings(
        caplog, content(Image.fromarray((ramp >> (bits - 5)).astype(np.uint8)), suffix)
    )  # dark, 8 bits


def test_sizes_and_round_trip() -> None:
    image = decode_image(content(PHOTO))
    assert torch.equal(decode_image(encode_image(image)), image)
    long = torch.randint(0, 256, (3, 2, 16384), dtype=torch.uint8)  # one pixel wider than the limit of WebP
    assert torch.equal(decode_image(encode_image(long)), long)
    wide = torch.randint(0, 256, (3, 2, 65501), dtype=torch.uint8)  # one pixel wider than the limit of JPEG
    assert torch.equal(decode_image(encode_jpeg(wide)), wide)
    jpeg = decode_image(encode_jpeg(image))
    assert jpeg.shape == image.shape and (jpeg.float() - image.float()).square().mean() < 20
    assert decode_image(encode_jpeg(wide[..., :65500])).shape == (3, 2, 65500)
    assert image_size(content(PHOTO)) == (64, 80) and image_size(b"nothing") == (0, 0)
