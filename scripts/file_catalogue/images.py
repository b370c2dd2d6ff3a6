"""Image files: formats, sizes, EXIF orientations and damage, read by `as_pixels` and `spar predict`."""

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.file_catalogue.case import Case, Ran, Same, SkippedError, WrongError, anything, spar
from scripts.file_catalogue.picture import RGB, Picture, saved, scene, write
from scripts.file_catalogue.pictures import WRITERS
from scripts.file_catalogue.png import PNG
from spar_lightning.image.inputs import as_pixels

SIZE = (31, 47)
SIZES = ((1, 1), (1, 9), (9, 1), (15, 17), (64, 64), (97, 131))
EXIF_FORMATS = {".jpg": "jpeg", ".png": "png", ".tif": "tiff", ".webp": "webp", ".avif": "avif"}
CUT = (
    *("png color type 2, 8 bit", "png palette 8 bit", "png gray 16 bit", "jpeg", "jpeg progressive", "webp lossless"),
    *("webp lossy", "gif", "bmp 24 bit", "bmp 8 bit palette", "tiff RGB none", "tiff RGB tiff_lzw", "tiff tiled"),
    *("jpeg 2000 lossless", "avif", "ppm maxval 255", "pgm maxval 65535", "ppm text", "tga", "tga RLE", "pcx", "sgi"),
    *(
        "qoi",
        "dds",
        "ico",
        "psd",
        "sun",
        "im",
        "msp",
        "apng",
        "gif animated",
        "webp animated",
        "tiff multi-page",
        "mpo",
    ),
)
PLACES = (4, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, -12, -1)  # bytes that are left: a number, a fraction, or all but some
CLASSES = "red dot; blue dot; black dot; plain, grain"


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    yield from _formats()
    yield from _orientations()
    yield from _truncated()
    yield from _flipped(seed)
    yield from _misnamed()
    yield from _not_files()


def _read(name: str, picture: Picture, folder: Path) -> object:
    return as_pixels(write(folder, name, picture))


def predict(folder: Path, *images: object, options: tuple[object, ...] = ()) -> Ran:
    """Run `spar predict` with Tiny on images; results are in folder/out."""
    config = folder / "tiny.yaml"
    config.write_text("model: {backbone: spar_lightning.backbones.Tiny, templates: ['{}'], stride: 32}\n")
    given = options if "--classes" in options else ("--classes", CLASSES, *options)
    out = () if "--out" in options else ("--out", folder / "out")
    return spar("predict", *images, "--weights", "tiny", "--config", config, *out, *given)


def labels(folder: Path, name: str) -> RGB:
    """Return a segmentation map that `predict` wrote."""
    path = folder / "out" / "labels" / f"{name}.png"
    if not path.is_file():
        raise SkippedError(f"no segmentation map {name}.png")
    return np.array(Image.open(path))


def _predicted(name: str, picture: Picture, folder: Path) -> Ran:
    """Segment a file and the same pixels as PNG, and compare."""
    images = folder / "images"
    images.mkdir()
    write(images, name, picture)
    shown = scene(*SIZE) if picture.pixels is None else picture.pixels
    (images / "reference.png").write_bytes(saved(Image.fromarray(shown), "png"))
    ran = predict(folder, images / name, images / "reference.png")
    reference = labels(folder, "reference")
    if ran.code == 0:
        found = labels(folder, Path(name).stem)
        if found.shape != reference.shape:
            raise WrongError(f"segmentation map {found.shape}, expected {reference.shape}")
        if picture.most == 0 and not np.array_equal(found, reference):
            raise WrongError(f"{np.mean(found != reference):.1%} of the segmentation map differ from that of the PNG")
    return ran


def _formats() -> Iterator[Case]:
    for kind, (suffix, writer) in WRITERS.items():
        for height, width in (SIZE, *SIZES):
            try:
                picture = writer(scene(height, width))
            except Exception:  # a size that the format or its encoder does not support
                continue
            if kind == "sun" and height * width == 1:  # four bytes are too few for Pillow
                continue
            name = f"picture_{height}{suffix}"
            right = None if picture.pixels is None else Same(picture.pixels, picture.most, picture.mean)
            error = (name,) if picture.pixels is None else None
            yield Case("images", f"{kind}, {height} x {width}", partial(_read, name, picture), right, error)
            if (height, width) == SIZE:
                said = (name,) if picture.lost else ()
                right_map = None if picture.pixels is None else anything
                act = partial(_predicted, name, picture)
                yield Case("images", f"{kind}, predict", act, right_map, error, said)


def upright(image: RGB, orientation: int) -> RGB:
    """Return an image as a viewer shows it that applies the EXIF orientation."""
    turns: dict[int, Callable[[RGB], RGB]] = {
        2: np.fliplr,
        3: partial(np.rot90, k=2),
        4: np.flipud,
        5: lambda pixels: pixels.transpose(1, 0, 2),
        6: partial(np.rot90, k=-1),
        7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    return np.ascontiguousarray(turns.get(orientation, np.array)(image))


def with_orientation(image: RGB, kind: str, orientation: int) -> bytes:
    """Return an image file with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x112] = orientation
    options: dict[str, dict[str, Any]] = {
        "jpeg": {"quality": 95, "subsampling": 0},
        "webp": {"lossless": True},
        "avif": {"quality": 95},
    }
    return saved(Image.fromarray(image), kind, exif=exif, **options.get(kind, {}))


def _orientations() -> Iterator[Case]:
    image = scene(*SIZE)
    for suffix, kind in EXIF_FORMATS.items():
        for orientation in range(10):
            content = with_orientation(image, kind, orientation)
            lossy = kind in ("jpeg", "avif")
            picture = Picture(content, upright(image, orientation), 90 if lossy else 0, 6 if lossy else 0)
            assert picture.pixels is not None
            right = Same(picture.pixels, picture.most, picture.mean)
            name = f"turned{suffix}"
            yield Case("images", f"{kind}, orientation {orientation}", partial(_read, name, picture), right)
            if kind in ("jpeg", "webp") and orientation in (3, 6, 7):
                act = partial(_predicted, name, picture)
                yield Case("images", f"{kind}, orientation {orientation}, predict", act, anything)


def _truncated() -> Iterator[Case]:
    for kind in CUT:
        suffix, writer = WRITERS[kind]
        picture = writer(scene(*SIZE))
        assert picture.pixels is not None
        for place in PLACES:
            size = len(picture.content)
            left = round(place * size) if isinstance(place, float) else place % size
            cut = Picture(picture.content[:left], picture.pixels)
            # If what is missing is not part of the pixels, they may be shown; otherwise only an error is right.
            right = Same(picture.pixels, picture.most, picture.mean)
            name = f"cut{suffix}"
            yield Case("images", f"{kind}, cut to {left} of {size}", partial(_read, name, cut), right, (name,))
        half = Picture(picture.content[: len(picture.content) // 2], picture.pixels, picture.most)
        yield Case("images", f"{kind}, cut, predict", partial(_predicted, f"cut{suffix}", half), anything, ("cut",))


def _flipped(seed: int) -> Iterator[Case]:
    """Yield files with damaged bytes: only PNG has a checksum of the pixels; others must not end in a traceback."""
    rng = np.random.default_rng(seed)
    for kind in CUT:
        suffix, writer = WRITERS[kind]
        picture = writer(scene(*SIZE))
        assert picture.pixels is not None
        for number in range(12):
            content = bytearray(picture.content)
            for place in rng.integers(0, len(content), 1 + number // 4):
                content[place] ^= int(rng.integers(1, 256))
            checked = kind.startswith("png") and bytes(content[:33]) == picture.content[:33]
            right = Same(picture.pixels, picture.most) if checked and "palette" not in kind else anything
            name = f"flipped{suffix}"
            flipped = Picture(bytes(content), picture.pixels)
            yield Case("images", f"{kind}, flipped bytes {number}", partial(_read, name, flipped), right, (name,))


def _misnamed() -> Iterator[Case]:
    plain = WRITERS["png color type 2, 8 bit"][1](scene(*SIZE))
    assert plain.pixels is not None
    for name in ("png_as.jpg", "png_as.tif", "png_as.bmp", "upper.PNG", "mixed.PnG", "png_as.webp", "png_as.jpeg"):
        yield Case("images", f"PNG named {name}", partial(_read, name, plain), Same(plain.pixels))
        yield Case("images", f"PNG named {name}, predict", partial(_predicted, name, plain), anything)
    for name in ("no_suffix", "png_as.txt", "a.b.c", "png_as.dat"):
        yield Case("images", f"PNG named {name}", partial(_read, name, plain), Same(plain.pixels))
    for name, content in NOT_IMAGES.items():
        bad = Picture(content, None)
        yield Case("images", f"no image: {name}", partial(_read, name, bad), None, (name,))
        yield Case("images", f"no image: {name}, predict", partial(_predicted, name, bad), None, (name,))


def _zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", saved(Image.fromarray(scene(*SIZE)), "png"))
    return buffer.getvalue()


NOT_IMAGES = {
    "empty.jpg": b"",
    "empty.png": b"",
    "text.jpg": b"hello\n",
    "page.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    "archive.jpg": _zipped(),
    "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "document.png": b"%PDF-1.4\n%%EOF\n",
    "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + b"\0" * 64,
    "raw.tif": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
    "zeros.jpg": b"\0" * 4096,
    "magic.png": PNG,
    "start.jpg": b"\xff\xd8\xff\xe0",
    "appledouble.jpg": b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + b"\0" * 200,
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "hdf5.png": b"\x89HDF\r\n\x1a\n" + b"\0" * 64,
    "movie.jpg": b"\0\0\x01\xba" + b"\0" * 64,
    "pickle.png": b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94.",
    "huge.png": PNG + bytes.fromhex("0000000d49484452 7fffffff 7fffffff 08 02 000000".replace(" ", "")) + b"\0" * 40,
    "numbers.npy": b"\x93NUMPY\x01\0v\0" + b" " * 118,
}


def _not_files() -> Iterator[Case]:
    def path_error(make: Callable[[Path], object], folder: Path) -> object:
        path = folder / "odd.jpg"
        make(path)
        return as_pixels(path)

    def folder_error(make: Callable[[Path], object], folder: Path) -> Ran:
        images = folder / "images"
        images.mkdir()
        (images / "reference.png").write_bytes(saved(Image.fromarray(scene(*SIZE)), "png"))
        make(images / "odd.jpg")
        ran = predict(folder, images)
        labels(folder, "reference")
        return ran

    kinds: dict[str, Callable[[Path], object]] = {
        "folder": Path.mkdir,
        "FIFO": os.mkfifo,
        "dangling link": lambda path: path.symlink_to("nowhere.png"),
        "link to itself": lambda path: path.symlink_to(path),
        "missing file": lambda path: None,
    }
    for kind, make in kinds.items():
        yield Case("images", f"{kind} named odd.jpg", partial(path_error, make), None, ("odd.jpg",))
        passed = anything if kind in ("folder", "missing file") else None
        error = None if passed else ("odd.jpg",)
        yield Case("images", f"{kind} named odd.jpg in a folder, predict", partial(folder_error, make), passed, error)
