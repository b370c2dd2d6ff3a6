"""Weights for a student, from wherever they lie: a run, a checkpoint of fit, a file of the backbone's library."""

from pathlib import Path
from typing import Final

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.weights import WeightsError, difference, read
from spar_lightning.errors import UserError

STUDENT: Final = "student.safetensors"  # in a folder that `spar export --to safetensors` wrote


def load_weights(backbone: Backbone, source: str) -> Path:
    """Put weights into a network: of a run, a checkpoint of fit, an export, or a file of the backbone's library.

    Returns the file that was read.

    Raises:
        UserError: There are none, or they do not fit.
    """
    path = Path(source)
    if path.is_dir() and (path / "checkpoints").is_dir():
        candidates = [path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise UserError(f"--weights {source}: the run has no checkpoint yet. Give another run or a weight file.")
        path = found
    elif (path / STUDENT).is_file():
        path = path / STUDENT
    elif path.is_dir():
        raise UserError(f"--weights {source}: the folder is no run of spar fit (no checkpoints/). Give a weight file.")
    try:
        tensors = read(str(path))
        if difference(tensors, backbone.state_dict()) is None:  # of fit, in the backbone's own names
            backbone.load_state_dict(tensors)
        else:
            backbone.load_vision_state_dict(tensors)
    except WeightsError as error:
        raise UserError(f"--weights {source}: {error}") from error
    except RuntimeError as error:  # torch's, of a plugin that checks nothing itself
        reason = str(error).splitlines()[0]
        raise UserError(f"--weights {source} does not fit {type(backbone).__name__}: {reason}") from error
    return path
