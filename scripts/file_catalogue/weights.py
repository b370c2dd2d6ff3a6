"""Weight files: formats, wrappers, precisions, damage, and the header of an export."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors

import spar_lightning
from scripts.file_catalogue.case import Case, WrongError, spar
from scripts.file_catalogue.images import predict
from scripts.file_catalogue.picture import scene, write
from scripts.file_catalogue.pictures import WRITERS
from scripts.file_catalogue.weight_files import HEADER, TINY, Tensors, clip, prefixed, tiny, torch_bytes
from spar_lightning.backbones import OpenCLIP, Tiny


def _same(expected: Tensors, most: float = 0.0) -> Callable[[Tensors], None]:
    def check(found: Tensors) -> None:
        for name, tensor in expected.items():
            if name not in found or found[name].shape != tensor.shape:
                raise WrongError(f"{name} is missing or has another shape")
            if (off := (found[name].double() - tensor.double()).abs().max().item()) > most:
                raise WrongError(f"{name} differs by {off:.3g}")

    return check


def _tiny(name: str, content: bytes, folder: Path) -> Tensors:
    """Load a file as weights of Tiny and return the vision weights of the network."""
    (folder / name).write_bytes(content)
    (folder / "tiny.yaml").write_text(TINY)
    segmenter = spar_lightning.load(folder / name, config=folder / "tiny.yaml", device="cpu")
    return dict(segmenter.backbone.vision_state_dict())


def _clip(name: str, content: bytes, folder: Path) -> Tensors:
    clip()
    (folder / name).write_bytes(content)
    return dict(OpenCLIP("ViT-Ti-16-test", pretrained=str(folder / name)).vision_state_dict())


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of this group."""
    yield from _wrappers()
    yield from _dictionaries()
    yield from _precisions()
    yield from _mismatches()
    yield from _damage(seed)
    yield from _headers()
    yield from _sources()


def _case(
    title: str, name: str, content: bytes, expected: Tensors | None, either: bool = False, words: tuple[str, ...] = ()
) -> Case:
    right = None if expected is None else _same(expected)
    error = (name, *words) if either or expected is None else None
    return Case("weights", title, partial(_tiny, name, content), right, error)


WRAPPERS = (
    *("", "model.", "module.", "student.", "segmentor.net.model.", "_orig_mod.", "module._orig_mod."),
    *("_orig_mod.module.", "model.module.", "student._orig_mod.", "model._orig_mod.", "module.module."),
)


def _wrappers() -> Iterator[Case]:
    vision = {name: tensor for name, tensor in clip().items() if name.startswith("visual.")}
    bare = {name.removeprefix("visual."): tensor for name, tensor in vision.items()}
    for prefix in WRAPPERS:
        for suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
            for kind, given in (("Tiny", tiny()), ("CLIP, both towers", clip()), ("CLIP, vision only", bare)):
                named = prefixed(prefix, given)
                content = (
                    save_tensors(named)
                    if suffix == ".safetensors"
                    else torch_bytes({"state_dict": named, "epoch": 3} if suffix == ".ckpt" else named)
                )
                name, title = f"weights{suffix}", f"{kind}, {prefix or 'no prefix'}, {suffix}"
                if kind == "Tiny":
                    yield _case(title, name, content, tiny())
                else:
                    yield Case("weights", title, partial(_clip, name, content), partial(_of_clip, vision))
    for prefix in ("backbone.", "encoder.", "net.", "trunk.", "visual.", "vision_model.", "model.model.model."):
        content = torch_bytes(prefixed(prefix, tiny()))
        yield _case(f"Tiny, prefix {prefix}", "weights.pt", content, tiny(), either=True)


def _of_clip(expected: Tensors, found: Tensors) -> None:
    """Check the vision weights of a CLIP, under the names with or without `visual.`."""
    if not any(name.startswith("visual.") for name in found):
        found = {f"visual.{name}": tensor for name, tensor in found.items()}
    _same(expected)(found)


def _dictionaries() -> Iterator[Case]:
    plain = dict(tiny())
    other = {name: tensor + 1 for name, tensor in plain.items()}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    nested: dict[str, Any] = {
        "state_dict": {"state_dict": plain},
        "model": {"model": plain},
        "model_state_dict": {"model_state_dict": plain, "optimizer_state_dict": optimizer},
        "model and optimizer": {"model": plain, "optimizer": optimizer, "epoch": 3, "args": None},
        "state_dict with model. names": {"state_dict": prefixed("model.", plain)},
        "model with module. names": {"model": prefixed("module.", plain)},
        "model with _orig_mod. names": {"model": prefixed("_orig_mod.", plain), "iter_num": 7},
        "model next to EMA": {"model": plain, "model_ema": other},
        "state_dict next to EMA": {"state_dict": plain, "state_dict_ema": other},
        "student and teacher names": {"state_dict": prefixed("student.", plain) | prefixed("teacher.", other)},
        "loss weights next to the model": {"state_dict": prefixed("model.", plain) | {"loss.weight": torch.ones(3)}},
        "with numbers": {**plain, "epoch": torch.tensor(3)},
    }
    for title, content in nested.items():
        either = "EMA" in title or "numbers" in title
        yield _case(f"nested: {title}", "weights.pt", torch_bytes(content), plain, either)
    for key in ("net", "params", "ema", "weights", "backbone", "checkpoint"):
        yield _case(f"nested: {key}", "weights.pt", torch_bytes({key: plain}), plain, either=True)
    both = {"student": plain, "teacher": other}
    yield _case("nested: student and teacher", "weights.pt", torch_bytes(both), plain, either=True)
    yield _case("nested: twice", "weights.pt", torch_bytes({"checkpoint": {"model": plain}}), plain, either=True)
    yield _case("nested: list", "weights.pt", torch_bytes([plain]), plain, either=True)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in plain.items()}
    yield _case("parameters instead of tensors", "weights.pt", torch_bytes(parameters), plain)
    legacy = torch_bytes(plain, _use_new_zipfile_serialization=False)
    yield _case("torch file without zip", "weights.pt", legacy, plain)
    views = {name: torch.stack([tensor, tensor])[1] for name, tensor in plain.items()}
    yield _case("views of a storage", "weights.pt", torch_bytes(views), plain)


def _precisions() -> Iterator[Case]:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {name: tensor.to(dtype) for name, tensor in tiny().items()}
        expected = {name: tensor.float() for name, tensor in cast.items()}
        yield _case(f"{dtype}, safetensors", "weights.safetensors", save_tensors(cast), expected)
        yield _case(f"{dtype}, torch file", "weights.pt", torch_bytes(cast), expected)
    mixed = {n: t.half() if i % 2 else t for i, (n, t) in enumerate(tiny().items())}
    yield _case("mixed precision", "weights.pt", torch_bytes(mixed), {n: t.float() for n, t in mixed.items()})
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.int64, torch.complex64, torch.bool):
        cast = {name: tensor.to(dtype) for name, tensor in tiny().items()}
        shown = {name: tensor.float() for name, tensor in cast.items()} if "8_e4" in str(dtype) else None
        yield _case(f"{dtype}", "weights.pt", torch_bytes(cast), shown, either=True)
    sparse = {n: t.to_sparse() if t.ndim == 2 else t for n, t in tiny().items()}
    yield _case("sparse tensors", "weights.pt", torch_bytes(sparse), tiny(), either=True)
    meta = {n: t.to("meta") for n, t in tiny().items()}
    yield _case("meta tensors", "weights.pt", torch_bytes(meta), None)
    for value in (float("nan"), float("inf")):
        broken = dict(tiny())
        first = next(iter(broken))
        broken[first] = torch.full_like(broken[first], value)
        yield _case(f"weights of {value}", "weights.pt", torch_bytes(broken), None)


def _mismatches() -> Iterator[Case]:
    plain = dict(tiny())
    first = next(iter(plain))
    lacking = {name: tensor for name, tensor in plain.items() if name != first}
    yield _case("a tensor is missing", "weights.pt", torch_bytes(lacking), None, words=(first,))
    yield _case(
        "an extra tensor", "weights.pt", torch_bytes({**plain, "head.weight": torch.ones(3)}), None, words=("head",)
    )
    reshaped = {**plain, first: torch.zeros(*plain[first].shape, 2)}
    yield _case("a tensor of another shape", "weights.pt", torch_bytes(reshaped), None, words=(first,))
    yield _case("weights of another network", "weights.pt", torch_bytes(dict(clip())), None)
    yield _case("empty dictionary", "weights.pt", torch_bytes({}), None)
    yield _case("one tensor", "weights.pt", torch_bytes(torch.ones(3)), None)
    yield _case("number", "weights.pt", torch_bytes(3), None)
    yield _case("empty safetensors", "weights.safetensors", save_tensors({}), None)
    yield _case("numbers as names", "weights.pt", torch_bytes({1: torch.ones(3)}), None)
    numpy = {name: tensor.numpy() for name, tensor in plain.items()}
    yield _case("numpy arrays", "weights.pt", torch_bytes(numpy), plain, either=True)
    yield _case("pickled network", "weights.pt", torch_bytes(Tiny()), None)
    with warnings.catch_warnings(action="ignore"):  # deprecated, but such files exist
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 3), torch.ones(1, 3)), buffer)
    yield _case("TorchScript", "weights.pt", buffer.getvalue(), None, words=("TorchScript",))
    yield _case("plain pickle", "weights.pt", pickle.dumps({"a": 1}), None)
    yield _case("optimizer only", "weights.ckpt", torch_bytes({"optimizer": {"state": {}}, "epoch": 1}), None)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "x")
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: tensor.numpy() for name, tensor in tiny().items()})
    return buffer.getvalue()


def _damage(seed: int) -> Iterator[Case]:
    safe, torch_file = save_tensors(dict(tiny())), torch_bytes(dict(tiny()))
    others = {
        "0 bytes": b"",
        "text": b"hello\n",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
        "zip": _zip(),
        "npz": _npz(),
        "GGUF": b"GGUF" + bytes(200),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(200),
        "PNG": WRITERS["png gray 8 bit"][1](scene(9, 9)).content,
        "zeros": bytes(5000),
        "random": np.random.default_rng(seed).bytes(5000),
    }
    for suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        for title, content in others.items():
            yield _case(f"{title} named {suffix}", f"weights{suffix}", content, None)
        whole = safe if suffix == ".safetensors" else torch_file
        for part in (4, 8, 40, 0.02, 0.5, 0.99, -1):
            left = round(part * len(whole)) if isinstance(part, float) else part % len(whole)
            yield _case(f"{suffix} cut to {left} of {len(whole)}", f"weights{suffix}", whole[:left], None)
    yield _case("safetensors named .pt", "weights.pt", safe, tiny(), either=True)
    yield _case("safetensors named .bin", "weights.bin", safe, tiny(), either=True)
    yield _case("torch file named .safetensors", "weights.safetensors", torch_file, tiny(), either=True)
    yield _case("safetensors named .SAFETENSORS", "weights.SAFETENSORS", safe, tiny(), either=True)
    for name in (
        "weights",
        "weights.weights",
        "weights.model",
        "weights.pt.tmp",
        "my weights.pt",
        "gewichte-ü.pt",
        "a,b.pt",
    ):
        yield _case(f"torch file named {name}", name, torch_file, tiny(), either=True)
    size = struct.unpack("<Q", safe[:8])[0]
    header, data = json.loads(safe[8 : 8 + size]), safe[8 + size :]
    first = next(name for name in header if name != "__metadata__")

    def with_header(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data

    def changed(**entry: object) -> bytes:
        return with_header(json.dumps({**header, first: {**header[first], **entry}}).encode())

    headers = {
        "of length 0": struct.pack("<Q", 0) + data,
        "of a huge length": struct.pack("<Q", 1 << 60) + safe[8:],
        "that is not JSON": with_header(b"{" * 50),
        "that is a list": with_header(b"[]"),
        "that is null": with_header(b"null"),
        "that is empty": with_header(b"{}"),
        "that is not UTF-8": with_header(b'{"\xff": 1}'),
        "with an unknown dtype": changed(dtype="F7"),
        "with another shape": changed(shape=[1, 2, 3]),
        "with a negative shape": changed(shape=[-1]),
        "with wrong offsets": changed(data_offsets=[0, 1]),
        "with offsets beyond the end": changed(data_offsets=[0, 1 << 40]),
        "with offsets in reverse": changed(data_offsets=[8, 0]),
        "without offsets": with_header(json.dumps({**header, first: {"dtype": "F32"}}).encode()),
        "with numbers as metadata": with_header(json.dumps({**header, "__metadata__": {"a": 1}}).encode()),
    }
    for title, content in headers.items():
        yield _case(f"safetensors header {title}", "weights.safetensors", content, None)
    rng = np.random.default_rng(seed)
    for number in range(40):
        flipped = bytearray(safe)
        flipped[8 + int(rng.integers(0, size))] ^= int(rng.integers(1, 256))
        yield _case(
            f"flipped byte {number} of a safetensors header", "weights.safetensors", bytes(flipped), tiny(), True
        )
        flipped = bytearray(torch_file)
        flipped[-int(rng.integers(1, 4000))] ^= int(rng.integers(1, 256))
        yield _case(f"flipped byte {number} at the end of a torch file", "weights.pt", bytes(flipped), tiny(), True)


def _exported(header: str | None, folder: Path) -> Tensors:
    metadata = None if header is None else {"spar_lightning": header}
    (folder / "student.safetensors").write_bytes(save_tensors(dict(tiny()), metadata))
    (folder / "evil.py").write_text(f"open({str(folder / 'touched')!r}, 'w')\n")
    os.chdir(folder)
    try:
        found = spar_lightning.load(folder / "student.safetensors", device="cpu").backbone.vision_state_dict()
    finally:
        if (folder / "touched").exists():
            raise WrongError("the header made the product import a module of the working folder")
    return dict(found)


def _headers() -> Iterator[Case]:
    good = json.dumps(HEADER)
    yield Case("weights", "header of an export", partial(_exported, good), _same(tiny()))
    class_path = json.dumps({"backbone": {"class_path": "spar_lightning.backbones.Tiny", "init_args": {}}})
    yield Case("weights", "header with a class path", partial(_exported, class_path), _same(tiny()))
    bad: dict[str, Any] = {
        "list": [],
        "null": None,
        "number": 3,
        "text": "Tiny",
        "no backbone": {"templates": ["{}"]},
        "backbone null": {"backbone": None},
        "backbone number": {"backbone": 3},
        "backbone list": {"backbone": ["Tiny"]},
        "unknown backbone": {"backbone": "Nothing"},
        "module of the folder": {"backbone": "evil.Evil"},
        "class path of the folder": {"backbone": {"class_path": "evil.Evil", "init_args": {}}},
        "os.system": {"backbone": {"class_path": "os.system", "init_args": {"command": "true"}}},
        "subprocess.Popen": {"backbone": "subprocess.Popen"},
        "wrong arguments": {"backbone": {"class_path": "spar_lightning.backbones.Tiny", "init_args": {"depth": "x"}}},
        "unknown argument": {"backbone": {"class_path": "spar_lightning.backbones.Tiny", "init_args": {"zzz": 1}}},
        "init_args list": {"backbone": {"class_path": "spar_lightning.backbones.Tiny", "init_args": [1]}},
        "templates number": {**HEADER, "templates": 3},
        "templates without {}": {**HEADER, "templates": ["a photo"]},
        "stride 0": {**HEADER, "stride": 0},
        "stride text": {**HEADER, "stride": "x"},
        "refine of the folder": {**HEADER, "refine": {"class_path": "evil.Evil"}},
        "upsampler of a path": {**HEADER, "upsampler": "/none.pt"},
    }
    for title, content in bad.items():
        act = partial(_exported, json.dumps(content))
        words = () if title.startswith(("templates", "stride", "upsampler")) else ("student.safetensors",)
        yield Case("weights", f"header: {title}", act, None, words)
    yield Case("weights", "header: no JSON", partial(_exported, "{"), None, ("student.safetensors",))
    yield Case("weights", "header: missing", partial(_exported, None), None, ("student.safetensors",))


def _sources() -> Iterator[Case]:
    def load(make: Callable[[Path], Path | str], folder: Path) -> object:
        (folder / "tiny.yaml").write_text(TINY)
        return spar_lightning.load(make(folder), config=folder / "tiny.yaml", device="cpu")

    def folder_of(files: Mapping[str, bytes], folder: Path) -> Path:
        place = folder / "source"
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        place.mkdir(exist_ok=True)
        return place

    whole = save_tensors(dict(tiny()))
    parts = {"model-00001-of-00002.safetensors": whole, "model.safetensors.index.json": b"{}"}
    for title, source, word in (
        ("empty folder", partial(folder_of, {}), "source"),
        ("folder of images", partial(folder_of, {"a.png": b"x"}), "source"),
        ("run without checkpoints", partial(folder_of, {"checkpoints/note.txt": b"x"}), "source"),
        ("run with an empty checkpoint", partial(folder_of, {"checkpoints/last.ckpt": b""}), "last.ckpt"),
        ("sharded model", partial(folder_of, parts), "source"),
        ("missing file", lambda folder: folder / "none.pt", "none.pt"),
        ("missing folder", lambda folder: folder / "none" / "run", "none/run"),
        ("unknown name", lambda folder: "siglipp", "siglipp"),
        ("empty text", lambda folder: "", ""),
        ("text with a newline", lambda folder: "a\nb", "a"),
        ("dangling link", lambda folder: _link(folder / "weights.pt", "none.pt"), "weights.pt"),
        ("link to itself", lambda folder: _link(folder / "weights.pt", "weights.pt"), "weights.pt"),
        ("name of 300 characters", lambda folder: folder / ("n" * 300 + ".pt"), "n" * 300),
        ("NUL character", lambda folder: "a\0b", "a"),
    ):
        yield Case("weights", f"source: {title}", partial(load, source), None, (word,))
    run = partial(folder_of, {"checkpoints/last.ckpt": torch_bytes({"state_dict": prefixed("student.", tiny())})})
    loaded = lambda result: _same(tiny())(result.backbone.vision_state_dict())  # noqa: E731
    yield Case("weights", "source: run folder", partial(load, run), loaded)
    export = partial(folder_of, {"student.safetensors": whole})
    yield Case("weights", "source: export folder", partial(load, export), loaded)

    def command(content: bytes, folder: Path) -> object:
        image = write(folder, "a.png", WRITERS["png gray 8 bit"][1](scene(31, 47)))
        (folder / "weights.pt").write_bytes(content)
        return predict(folder, image, options=("--weights", folder / "weights.pt"))

    for title, content in {"0 bytes": b"", "text": b"hello", "cut": whole[:500], "list": torch_bytes([1])}.items():
        yield Case("weights", f"predict --weights, {title}", partial(command, content), None, ("weights.pt",))
    for name in ("Tinyy", "", "tiny.pt", "."):

        def named(folder: Path, name: str = name) -> object:
            image = write(folder, "a.png", WRITERS["png gray 8 bit"][1](scene(31, 47)))
            return spar("predict", image, "--weights", name, "--classes", "red dot; blue dot", "--out", folder / "out")

        yield Case("weights", f"predict --weights {name!r}", named, None, (name,))


def _link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path
