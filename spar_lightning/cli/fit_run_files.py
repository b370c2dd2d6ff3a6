"""Files of a run of `spar fit`: how a run folder and its files are recognized, and how they are deleted.

A folder is the one of a run if its config.yaml contains the settings of a run. Files in it are recognized by
their names; settings of later starts, and checkpoints with names that the user chose, by their content.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import yaml

from spar_lightning.cli.lightning_cli import read_checkpoint
from spar_lightning.errors import UserError

log = logging.getLogger("spar_lightning")

CHECKPOINTS: Final = ("hpc_ckpt_*.ckpt", "checkpoints/*.ckpt")
NAMES: Final = (
    *("metrics.jsonl", "train.log", "results.json", "events.out.tfevents.*", "plots/predictions.png"),
    *("plots/curves.png", "checkpoints/*.ckpt.unfinished"),
    *(f"checkpoints/{name}.ckpt" for name in ("last", "epoch", "best")),
)
FOLDERS: Final = ("checkpoints", "plots")
SHARED: Final = ("scans", "claims", "tmp", ".lease")  # working folders, whose content is also valid for a new run
SETTINGS: Final = {"model", "data", "trainer", "mean_iou", "pictures", "run_dir"}  # keys that config.yaml always has
START: Final = {"resume", "overwrite"}  # options of a single start, which config.yaml never has
NAMED: Final = 5  # largest number of kept files that the warning names


def is_settings(path: Path) -> bool:
    """Return whether a file contains the settings of a run, as `spar fit` saves them since version 0.1."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, FileNotFoundError, IsADirectoryError):
        return False
    return isinstance(content, dict) and content.keys() >= SETTINGS and not content.keys() & START


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is a checkpoint of `spar fit`."""
    try:
        read_checkpoint(path)
    except UserError:
        return False
    return True


def delete_run(root: Path) -> None:
    """Delete the files of a run except config.yaml, and warn about all other files, which are kept."""
    chosen: dict[str, Callable[[Path], bool]] = {
        **dict.fromkeys(CHECKPOINTS, is_checkpoint),
        "config-resume-*.yaml": is_settings,
        **dict.fromkeys(NAMES, lambda path: path.is_file() or path.is_symlink()),
    }
    for path in {path for pattern, is_ours in chosen.items() for path in root.glob(pattern) if is_ours(path)}:
        path.unlink()
        if path.match(CHECKPOINTS[0]):
            log.warning("%s is deleted with the old run.", path)
    found = {path for pattern in ("*", *(f"{name}/*" for name in FOLDERS)) for path in root.glob(pattern)}
    known = {root / name for name in ("config.yaml", *FOLDERS, *SHARED)}
    if kept := sorted(str(path.relative_to(root)) for path in found - known):
        more = f" and {len(kept) - NAMED} more" if len(kept) > NAMED else ""
        log.warning("run_dir: spar fit has not written %s%s in %s. Kept.", ", ".join(kept[:NAMED]), more, root)
