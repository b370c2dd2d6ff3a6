"""Loading of weights from a run, a checkpoint of `spar fit`, an export or a weight file of the upstream library."""

import logging
from pathlib import Path
from typing import Final

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.weights import WeightsError, difference, read
from spar_lightning.errors import UserError
from spar_lightning.files import hub

STUDENT: Final = "student.safetensors"  # in the folder written by `spar export --to safetensors`
log = logging.getLogger("spar_lightning")


def load_weights(backbone: Backbone, source: str) -> Path:
    """Load weights into a backbone.

    Args:
        backbone: Backbone, changed in place.
        source: Path of a run folder (best.ckpt, otherwise last.ckpt), a checkpoint of `spar fit`, an export, or
            a weight file of the upstream library; or hf-hub:org/name, an export on the Hugging Face Hub.

    Returns:
        Path of the file that was read.

    Raises:
        UserError: The weights do not exist or do not match the backbone.
    """
    path = local(source)
    if path.is_dir() and (path / "checkpoints").is_dir():
        candidates = [path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise UserError(f"--weights {source}: this run has no checkpoint yet. Pass another run or a weight file.")
        path = found
    elif (path / STUDENT).is_file():
        path = path / STUDENT
    elif path.is_dir():
        raise UserError(
            f"--weights {source}: this folder is neither a run of spar fit (no checkpoints/) nor an export (no "
            "student.safetensors). Pass the path of a weight file."
        )
    try:
        tensors = read(str(path), expected=backbone.state_dict().keys() | backbone.vision_state_dict().keys())
        if difference(tensors, backbone.state_dict()) is None:  # names as in the backbone
            backbone.load_state_dict(tensors)
        else:
            backbone.load_vision_state_dict(tensors)
    except WeightsError as error:
        raise UserError(f"--weights {source}: {error}") from error
    except RuntimeError as error:  # raised by torch if a plugin does not check the weights
        reason = str(error).splitlines()[0]
        raise UserError(f"--weights {source} does not match {type(backbone).__name__}: {reason}") from error
    return path


def local(source: str) -> Path:
    """Return the path of weights, downloaded if `source` is hf-hub:org/name or hf-hub:org/name@revision.

    Raises:
        HubError: The repository cannot be read.
        UserError: It is not an export of this package.
    """
    if not source.startswith(hub.PREFIX):
        return Path(source)
    name = source.removeprefix(hub.PREFIX)
    folder = hub.download(name, (STUDENT,))
    if not (folder / STUDENT).is_file():
        raise UserError(
            f"{name} on the Hugging Face Hub has no {STUDENT}. Pass a repository that was written by `spar export --to "
            "safetensors --push`."
        )
    return folder


def warn_if_random(backbone: Backbone) -> None:
    """Log a warning if a backbone that is used for inference was built with random weights."""
    if how := backbone.random_weights():
        log.warning(f"{backbone.family} has random weights, so its features mean nothing. {how}")
