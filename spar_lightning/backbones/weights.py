"""Reading of weight files (safetensors, torch files, Lightning checkpoints) as flat dictionaries of tensors.

Pickled code is never executed (weights_only). Known wrappers are recognized by their keys and removed:
`state_dict` around the tensors, `segmentor.net.model.` and `model.` in the paper's released students,
`student.` in checkpoints of `spar fit`, `module.` of DataParallel.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from spar_lightning.errors import UserError

WRAPPERS = ("segmentor.net.", "model.", "student.", "module.")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class WeightsError(UserError):
    """Error for a weight file that cannot be read or does not match the model."""


_skipped: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build backbones without their pretrained vision weights, because other weights are loaded afterwards.

    A backbone calls `skipped` before it reads or downloads a file. A backbone that does not call it loads
    weights that are then replaced.
    """
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def skipped() -> bool:
    """Return whether a backbone that is being built may skip its pretrained vision weights."""
    return _skipped.get()


def read(source: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read the tensors of a weight file and remove wrappers from their names.

    Args:
        source: Path of a file or folder.
        names: File names to try if `source` is a folder, in this order.

    Raises:
        WeightsError: The file does not exist or cannot be read as weights.
    """
    path = find(source, names)
    if _is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript archive, which contains code. If you trust it, load it with torch.jit.load, save "
            "its state_dict() with safetensors, and pass that file."
        )
    try:
        if path.suffix == ".safetensors":
            return unwrap(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format raises different exceptions
        raise WeightsError(
            f"{path} cannot be read as weights ({type(error).__name__}). Allowed: safetensors files and torch files "
            "that contain only tensors, because pickled code is not executed."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise WeightsError(
            f"{path} does not contain named tensors. Pass a state dict or a checkpoint with a state dict."
        )
    return unwrap(tensors)


def find(source: str, names: Sequence[str] = ()) -> Path:
    """Return the path of a weight file: `source` itself, or the first of `names` that exists in a folder.

    Raises:
        WeightsError: The file does not exist.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise WeightsError(f"{source} contains none of {', '.join(names)}. Pass the path of a weight file.")
        path = found[0]
    if not path.is_file():
        raise WeightsError(f"File not found: {source}. Pass a weight file ({', '.join(SUFFIXES)}).")
    return path


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the name prefixes of wrapper modules; tensors outside the wrapped model are dropped."""
    plain = dict(tensors)
    while wrapper := next((w for w in WRAPPERS if any(name.startswith(w) for name in plain)), None):
        plain = {name.removeprefix(wrapper): t for name, t in plain.items() if name.startswith(wrapper)}
    return plain


def difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor that is missing on one side or has another shape; return None if all match."""
    for name in [*ours, *theirs]:
        there, here = (str(tuple(side[name].shape)) if name in side else "missing" for side in (theirs, ours))
        if there != here:
            return f"{name} is {there} in the given weights, but {here} in the model"
    return None


def check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, model: str) -> None:
    """Raise WeightsError with the name of the first tensor that is missing or has another shape."""
    if found := difference(tensors, expected):
        raise WeightsError(f"{source} does not match {model}: {found}. Pass weights of this model.")
