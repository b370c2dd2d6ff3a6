"""Weight files as flat dictionaries: safetensors, torch files and Lightning checkpoints, whoever wrote them.

Nothing pickled is ever run (weights_only). Known wrappers are recognised by their keys and taken
off: `state_dict` around the tensors, `segmentor.net.model.` and `model.` in the paper's released
students, `student.` in our own checkpoints, `module.` of DataParallel.
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
    """A weight file cannot be read, or does not fit the model."""


_skipped: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build backbones without their pretrained vision weights: others are loaded next.

    A family asks `skipped` before it reads or downloads a file; one that does not loads its weights in vain.
    """
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def skipped() -> bool:
    """Return whether a backbone that is built now can leave out its vision weights."""
    return _skipped.get()


def read(source: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a file, or of the first of `names` that a folder holds, without wrappers.

    Raises:
        WeightsError: No such file, or nothing in it that can be read as weights.
    """
    path = find(source, names)
    if _is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript archive, which holds code. Load it with torch.jit.load where you trust it, save "
            "its state_dict() with safetensors, and give that file."
        )
    try:
        if path.suffix == ".safetensors":
            return unwrap(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format fails in its own way
        raise WeightsError(
            f"{path} cannot be read as weights ({type(error).__name__}). Allowed are safetensors, and torch files "
            "that hold tensors alone: nothing pickled is run."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name. Give a state dict or a checkpoint that has one.")
    return unwrap(tensors)


def find(source: str, names: Sequence[str] = ()) -> Path:
    """The file itself, or the first of `names` in a folder.

    Raises:
        WeightsError: There is none.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise WeightsError(f"{source} holds none of {', '.join(names)}. Give the weight file itself.")
        path = found[0]
    if not path.is_file():
        raise WeightsError(f"There is no file {source}. Give a weight file ({', '.join(SUFFIXES)}).")
    return path


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what wrapping modules put before the names; what lies beside the wrapped model is left out."""
    plain = dict(tensors)
    while wrapper := next((w for w in WRAPPERS if any(name.startswith(w) for name in plain)), None):
        plain = {name.removeprefix(wrapper): t for name, t in plain.items() if name.startswith(wrapper)}
    return plain


def difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is missing on a side or has another shape, in words; None where all fit."""
    for name in [*ours, *theirs]:
        there, here = (str(tuple(side[name].shape)) if name in side else "missing" for side in (theirs, ours))
        if there != here:
            return f"{name} is {there} there and {here} here"
    return None


def check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, model: str) -> None:
    """Raise WeightsError that names the first tensor which does not fit."""
    if found := difference(tensors, expected):
        raise WeightsError(f"{source} does not fit {model}: {found}. Give the weights of this model.")
