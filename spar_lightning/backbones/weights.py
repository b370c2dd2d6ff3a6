"""Reading of weight files (safetensors, torch files, Lightning checkpoints) as flat dictionaries of tensors.

Pickled code is never executed (weights_only). Known wrappers are removed, in any order and number: the entries of
checkpoints in `CONTAINERS`, the name prefixes in `WRAPPERS` of DataParallel, `spar fit`, other trainers and the paper's
released students, and `_orig_mod.` of torch.compile. LoRA updates are merged.
"""

import difflib
import logging
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spar_lightning.backbones.low_rank import merged
from spar_lightning.errors import UserError

# Entries of a checkpoint that contain the weights; the first one that exists is read. Averaged weights come later.
CONTAINERS = (
    *("state_dict", "model_state_dict", "model", "net", "params", "module"),
    *("model_ema", "state_dict_ema", "params_ema", "ema", "student", "teacher"),
)
WRAPPERS = ("segmentor.net.", "module.", "model.", "student.")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
log = logging.getLogger("spar_lightning")


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


def read(source: str, names: Sequence[str] = (), expected: Collection[str] = ()) -> dict[str, Tensor]:
    """Read the tensors of a weight file and remove wrappers from their names.

    Args:
        source: Path of a file or folder.
        names: File names to try if `source` is a folder, in this order.
        expected: Names of the tensors of the model. A prefix that belongs to them, such as `model.`, is not removed.

    Raises:
        WeightsError: The file does not exist, cannot be read as weights, or contains a student and a teacher.
    """
    path = find(source, names)
    try:
        if _is_torchscript(path):
            raise WeightsError(
                f"{path} is a TorchScript archive, which contains code. If you trust it, load it with torch.jit.load, "
                "save its state_dict() with safetensors, and pass that file."
            )
        suffix = path.suffix.lower()
        content = load_file(path) if suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # each format raises different exceptions
        raise WeightsError(
            f"{path} cannot be read as weights ({type(error).__name__}). Allowed: safetensors files and torch files "
            "that contain only tensors, because pickled code is not executed."
        ) from error
    content = _contained(content, path)
    tensors = (
        {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise WeightsError(
            f"{path} does not contain named tensors. Pass a state dict, or a checkpoint with a state dict under one of "
            f"the keys {', '.join(CONTAINERS)}."
        )
    return merged(_unwrapped(tensors, frozenset(expected), path))


def _contained(content: Any, path: Path) -> Any:
    """Return the innermost entry of a checkpoint that contains the weights."""
    found = [key for key in CONTAINERS if isinstance(content, Mapping) and _has_tensors(content.get(key))]
    if not found:
        return content
    if found == ["student", "teacher"]:
        raise WeightsError(f"{path} contains two networks: student, teacher. Save the weights of one in a file.")
    _tell_choice(found[0], found[1:], path)
    return _contained(content[found[0]], path)


def _has_tensors(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(isinstance(v, Tensor) or _has_tensors(v) for v in entry.values())


def _unwrapped(tensors: dict[str, Tensor], expected: Collection[str], path: Path) -> dict[str, Tensor]:
    """Remove the name prefixes of wrapper modules; tensors outside the wrapped model are dropped."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    levels = list(_levels(tensors, ""))
    most = max(len(inside.keys() & expected) for inside, _ in levels)
    # If no name is expected or found, all prefixes are removed.
    inside, prefix = next(level for level in levels if len(level[0].keys() & expected) == most) if most else levels[-1]
    if prefix:
        siblings = {name.partition(".")[0] for name in tensors if name.partition(".")[2] in inside}
        _tell_choice(prefix, sorted(siblings - set(prefix.split("."))), path)
    return inside


def _levels(tensors: dict[str, Tensor], prefix: str) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Yield the tensors and the prefix removed so far, before and after the removal of each wrapper."""
    yield tensors, prefix
    if wrapper := next((w for w in WRAPPERS if any(name.startswith(w) for name in tensors)), None):
        inside = {name.removeprefix(wrapper): t for name, t in tensors.items() if name.startswith(wrapper)}
        yield from _levels(inside, prefix + wrapper)


def _tell_choice(chosen: str, others: Sequence[str], path: Path) -> None:
    if others:
        log.warning("%s contains several networks. Loaded: %s. Not loaded: %s.", path, chosen, ", ".join(others))


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


def difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor of `theirs` that does not fit `ours`; return None if all of them fit.

    A tensor does not fit if it is missing on one side, is sparse, not finite or integer, or has another shape.
    """
    for name in [*ours, *theirs]:
        there, here = (str(tuple(side[name].shape)) if name in side else "missing" for side in (theirs, ours))
        if there != here:
            if name not in theirs and (other := difflib.get_close_matches(name, sorted(theirs), 1, cutoff=0)):
                there = f"missing (the most similar name is {other[0]})"
            return f"{name} is {there} in the given weights, but {here} in the model"
        if theirs[name].layout != ours[name].layout:
            return f"{name} has the layout {theirs[name].layout} in the given weights. Call to_dense() before saving"
        if theirs[name].is_floating_point() != ours[name].is_floating_point():
            return f"{name} is {theirs[name].dtype} in the given weights, but {ours[name].dtype} in the model"
        if theirs[name].is_floating_point() and not theirs[name].float().isfinite().all():
            return f"{name} contains NaN or infinity in the given weights"
    return None


def check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, model: str) -> None:
    """Raise WeightsError with the name of the first tensor that is missing or has another shape."""
    if found := difference(tensors, expected):
        raise WeightsError(f"{source} does not match {model}: {found}. Pass weights of this model.")
