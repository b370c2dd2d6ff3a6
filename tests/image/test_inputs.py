"""Tests of the conversion of user input to image tensors."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spar_lightning.errors import UserError
from spar_lightning.image.codec import ImageError
from spar_lightning.image.inputs import ImageLike, as_pixels
from spar_lightning.image.resize import at_most

ARRAY = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(ARRAY).permute(2, 0, 1)


def test_all_kinds_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(ARRAY).save(path)
    alpha = np.concatenate([ARRAY, np.zeros((5, 7, 1), np.uint8)], axis=-1)
    kinds: list[ImageLike] = [ARRAY, ARRAY[:, ::-1][:, ::-1], alpha, ARRAY / 255, (ARRAY / 255).astype(np.float32),
             ARRAY.astype(np.uint16) * 257, Image.fromarray(ARRAY), str(path), path, EXPECTED,
             EXPECTED.float() / 255, EXPECTED.double() / 255, (ARRAY / 255).astype(">f4"),
             (ARRAY / 255).astype(np.longdouble), ARRAY.astype(">u2") * 257,
             np.ma.masked_array(ARRAY, mask=ARRAY > 9)]  # fmt: skip
    for image in kinds:
        found = as_pixels(image)
        assert found.dtype == torch.uint8 and torch.equal(found, EXPECTED)
        assert torch.equal(as_pixels(image, max_side=4), at_most(EXPECTED, 4))


def test_grey_arrays_have_three_equal_channels() -> None:
    for grey in (ARRAY[..., 0], ARRAY[..., :1]):
        assert torch.equal(as_pixels(grey), EXPECTED[:1].expand(3, -1, -1))


def test_files_and_pictures_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # top of the image is on the right side
    path = tmp_path / "x.png"
    Image.fromarray(ARRAY).save(path, exif=exif)
    turned = torch.from_numpy(np.rot90(ARRAY, -1).copy()).permute(2, 0, 1)
    assert torch.equal(as_pixels(path), turned)
    with Image.open(path) as picture:
        assert torch.equal(as_pixels(picture), turned)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (ARRAY.astype(np.int64), "int64"),
        (ARRAY.astype(float), "0 to 248"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (ARRAY[None], r"\(1, 5, 7, 3\)"),
        (EXPECTED.permute(1, 2, 0), r"tensors must have shape \(3, H, W\), but got \(5, 7, 3\)"),
        (EXPECTED.long(), r"torch\.int64"),
        (np.zeros((0, 4, 3), np.uint8), r"but got \(0, 4, 3\)"),
        (EXPECTED.to_sparse(), "to_dense"),
        (ARRAY.astype(object), "object"),
        (Image.new("La", (4, 4)), "mode La"),
        (Image.new("RGB", (0, 4)), "no pixels"),
        ("x" * 5000, "No such image file"),
        (3, r"\bint\b"),
        ("nowhere.png", "No such image file: nowhere.png"),
    ],
)
def test_what_is_none_is_refused(image: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        as_pixels(image)  # type: ignore[arg-type]


def test_files_that_are_no_image_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_text("hello")
    with pytest.raises(ImageError, match=r"x\.jpg"):
        as_pixels(path)


def test_a_damaged_picture_that_pillow_has_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(ARRAY).save(path)
    path.write_bytes(path.read_bytes()[:-60])
    with Image.open(path) as picture, pytest.raises(ImageError, match="RGB"):
        as_pixels(picture)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match=r"x\.jpg"):
        as_pixels(tmp_path / "x.jpg")
