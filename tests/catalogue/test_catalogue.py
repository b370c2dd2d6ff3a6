"""A sample of the catalogue of files (scripts/file_catalogue), random arrays and files, and verdicts of cases."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scripts.file_catalogue import GROUPS
from scripts.file_catalogue.case import GOOD, Case, Ran, Same, SkippedError, WrongError, anything, equal, run
from scripts.file_catalogue.images import upright
from scripts.file_catalogue.picture import saved, scene
from scripts.file_catalogue.pictures import WRITERS
from spar_lightning.errors import UserError
from spar_lightning.image.codec import decode_image
from spar_lightning.image.inputs import as_pixels

# Every Nth case of a group; commands take longer than calls.
STEPS = {
    **{"images": 40, "arrays": 10, "archives": 25, "folders": 25, "labels": 12, "benchmarks": 12},
    **{"weights": 40, "classes": 8, "paths": 40},
}


@pytest.mark.parametrize("group", list(GROUPS))
def test_sample(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPAR_CACHE", str(tmp_path / "text"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    bad = []
    for number, case in enumerate(islice(GROUPS[group](0), 3, None, STEPS[group])):
        folder = tmp_path / group / str(number)
        folder.mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        finding = run(case, folder)
        if finding.verdict not in GOOD:
            bad.append(finding)
    assert not bad


def test_names_are_unique() -> None:
    for group in ("arrays", "labels", "classes", "paths"):
        names = [case.name for case in GROUPS[group](0)]
        assert len(names) == len(set(names))


def _raises(error: BaseException) -> Callable[[Path], Any]:
    def act(folder: Path) -> Any:
        raise error

    return act


def verdicts() -> Iterator[tuple[str, Case]]:
    """Yield a case for each verdict."""

    def case(act: Callable[[Path], Any], right: Any = None, error: Any = None, said: tuple[str, ...] = ()) -> Case:
        return Case("group", "name", act, right, error, said)

    log = logging.getLogger("spar_lightning")
    listed = Ran(1, "", "1 without a result:\n  a.png cannot be read\n")
    yield "result", case(lambda folder: 3, equal(3))
    yield "result", case(lambda folder: log.warning("a.gif: 2 frames"), anything, said=("a.gif",))
    yield "clear error", case(_raises(UserError("a.png is empty.")), error=("a.png",))
    yield "clear error", case(lambda folder: listed, error=("a.png",))
    yield "traceback", case(_raises(KeyError("x")), anything, ())
    yield "traceback", case(lambda folder: Ran(1, "", "Traceback (most recent call last):\n.."), anything, ())
    yield "wrong result", case(lambda folder: 4, equal(3))
    yield "wrong result", case(lambda folder: 4, error=("a.png",))
    yield "wrong result", case(_raises(WrongError("x")), anything)
    yield "silent skip", case(_raises(SkippedError("x")), anything)
    yield "silent skip", case(lambda folder: None, anything, said=("a.gif",))
    yield "unclear error", case(_raises(UserError("it is empty.")), error=("a.png",))
    yield "unclear error", case(_raises(UserError("a.png\nis empty.")), error=("a.png",))
    yield "unclear error", case(lambda folder: Ran(139, "", "a.png"), error=("a.png",))
    yield "rejected", case(_raises(UserError("a.png is empty.")), anything)


@pytest.mark.parametrize(("verdict", "case"), list(verdicts()))
def test_verdicts(verdict: str, case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path).verdict == verdict


@given(st.sampled_from(["u1", "<u2", ">u2", "<f2", "<f4", ">f4", "<f8", ">f8"]), st.integers(1, 9), st.integers(1, 9),
       st.sampled_from([None, 1, 3, 4]), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_random_arrays(
    dtype: str, height: int, width: int, channels: int | None, flipped: bool, fortran: bool, seed: int
) -> None:
    shape = (height, width) if channels is None else (height, width, channels)
    values = np.random.default_rng(seed).integers(0, 256, shape)
    scale = {"u1": 1, "u2": 257}.get(dtype[-2:], 1 / 255)
    array = (values * scale).astype(dtype)
    array = np.asfortranarray(array) if fortran else array
    array = array[::-1].copy()[::-1] if flipped else array
    shown = values.reshape(height, width, -1)[..., :3]
    expected = np.broadcast_to(shown, (height, width, 3)).astype(np.uint8)
    Same(expected, most=int(dtype.endswith(("u2", "f2"))))(as_pixels(array))


@given(st.sampled_from(sorted(WRITERS)), st.integers(2, 40), st.integers(2, 40), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_random_lossless_files(kind: str, height: int, width: int, seed: int) -> None:
    picture = WRITERS[kind][1](scene(height, width, seed))
    if picture.pixels is not None and not picture.mean and "16 bit MinIsWhite" not in kind:
        Same(picture.pixels, picture.most)(decode_image(picture.content))


@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_random_orientations(orientation: int, height: int, width: int) -> None:
    image, exif = scene(height, width), Image.Exif()
    exif[0x112] = orientation
    content = saved(Image.fromarray(image), "png", exif=exif)
    Same(upright(image, orientation))(decode_image(content, upright=True))
    Same(image)(decode_image(content))  # training ignores the orientation, as the published code does


DAMAGED = ["png gray 16 bit", "bmp 24 bit", "gif", "webp lossless", "qoi", "tga RLE"]


@given(st.sampled_from(DAMAGED), st.binary(max_size=60), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_random_damage_is_a_user_error(kind: str, noise: bytes, place: float) -> None:
    content = WRITERS[kind][1](scene(20, 20)).content
    start = int(place * len(content))
    try:
        decode_image(content[:start] + noise + content[start + len(noise) :])
    except UserError as error:
        assert str(error)
