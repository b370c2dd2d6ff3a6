"""Errors that a user can fix, as one message: our own, those of Lightning and jsonargparse, and those of the system.

All other errors keep their traceback, because they are bugs.
"""

import errno
import os
import re
from itertools import pairwise
from pathlib import Path, PurePath
from types import TracebackType

from spar_lightning.errors import UserError, user_error

# System errors that a user can fix by freeing space, or by choosing another location.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_WRITING = (*FULL, errno.EROFS, errno.EEXIST)
OF_PERMISSION = (errno.EACCES, errno.EPERM)
OF_PLACES = (
    *(*OF_WRITING, *OF_PERMISSION, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO),
    errno.ESTALE,
)

# Options of the Trainer that Lightning's messages name.
KEYS = (
    *("accumulate_grad_batches", "benchmark", "check_val_every_n_epoch", "deterministic", "fast_dev_run"),
    *("gradient_clip_algorithm", "gradient_clip_val", "limit_train_batches", "limit_val_batches", "log_every_n_steps"),
    *("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps", "num_nodes", "num_sanity_val_steps"),
    *("overfit_batches", "precision", "profiler", "reload_dataloaders_every_n_epochs", "strategy", "sync_batchnorm"),
    *("val_check_interval", "accelerator", "callbacks", "devices", "logger", "plugins"),
)

# Words of messages that do not name their option.
WORDS = {"backend found": "accelerator", "DeepSpeed": "strategy", "valid duration": "max_time", "ntasks": "devices"}

# Types that jsonargparse names in its messages, with the option that takes them.
OF_CLASS = {"callbacks.callback.Callback": "trainer.callbacks: ", "loggers.logger.Logger": "trainer.logger: "}

LOADER = re.compile(r"DataLoader worker .*?(?:signal: (\w+)|unexpected)")  # messages of torch.utils.data


def explained(error: BaseException) -> str | None:
    """Return the message for an error that a user can fix, on one line unless it is a list, or None for a bug."""
    if cause := user_error(error):
        return _sentence(cause)
    if isinstance(error, ValueError) and (sentence := _of_union(error)):
        return sentence
    text = " ".join(str(error).split())
    if isinstance(error, ImportError | RuntimeError) and "torchvision" in text:
        return f"torchvision does not work ({text}). Run spar doctor to see the fix."
    if isinstance(error, RuntimeError) and (killed := LOADER.search(text)):
        return (
            f"A loader process was ended by the system ({killed[1] or 'no signal'}), usually because memory ran out. "
            "Lower data.num_workers, data.batch_size or data.pack_tokens. To continue a run: --resume auto."
        )
    if found := _of_place(error):
        return found
    if isinstance(error, ValueError) and "embedded null" in text:
        return "A path contains a null character. Remove it from the setting."
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        given = error.object[error.start : error.end]
        return f"{given!r} does not exist in the encoding {error.encoding} of this system. Set PYTHONUTF8=1."
    return _of_lightning(error, text)


def out_of_memory(error: Exception) -> bool:
    """Return True if a device ran out of memory; on CPU, torch raises a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory")
    of_device = type(error).__name__ == "OutOfMemoryError"  # of torch, which is not imported for `spar --help`
    return isinstance(error, MemoryError) or of_device or any(word in str(error) for word in words)


def _of_place(error: BaseException | None) -> str | None:
    """Return the message of a system error, or of the one that a library has raised another error from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    if error is None:
        return None
    where = f"{error.filename or 'a file or the output'}: {error.strerror}"
    # A missing folder is a wrong path. A missing file can be a bug: files are checked where they are options.
    if error.errno == errno.ENOENT and error.filename and not Path(error.filename).parent.exists():
        return f"cannot use {where}. Its folder does not exist. Create it, or pass another path."
    if error.errno not in OF_PLACES:
        return None
    if error.errno in FULL:
        return f"cannot write {where}. Free some space, or pass another run_dir, data.root, data.cache or --out."
    done = "write" if error.errno in OF_WRITING else "use"
    if error.errno in OF_PERMISSION and error.filename and os.path.exists(error.filename):
        done = "write" if os.access(error.filename, os.R_OK) else "read"
    return f"cannot {done} {where}. Check the path and its permissions, or pass another path."


def _sentence(error: UserError) -> str:
    """Return the message of an error, without the traceback that a loader process adds."""
    text = str(error)
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip() if "Original Traceback" in text else text


def _of_union(error: ValueError) -> str | None:
    """Return the error that a class raised, with its option, if jsonargparse lists it among errors of other types."""
    union = "Does not validate against any of the Union subtypes"
    text = str(error)
    if union not in text:
        return None
    listed = re.split(r"\n\s*- ", re.split(r"\nGiven value type", text)[0])[1:]
    said = next((item for item in listed if not item.startswith(("Expected a", "Not a valid", union))), None)
    if said is None:
        return None
    said = " ".join(re.sub(r"^Problem with given class_path '([\w.]+)':", r"\1:", said).split())
    key = next((key for cls, key in OF_CLASS.items() if cls in text), "")
    return f"{key}{said}" + ("" if said.endswith(".") else ".")


def _of_lightning(error: BaseException, text: str) -> str | None:
    """Return what Lightning objects to, with the option that it concerns, if Lightning raised the error on purpose."""
    raised = (ValueError, RuntimeError, TypeError, NotImplementedError, ImportError)
    kind = type(error).__name__
    if kind != "MisconfigurationException" and not (isinstance(error, raised) and _raised_in_lightning(error)):
        return None
    if not text:
        return None
    found = re.search(rf"\b({'|'.join(KEYS)})\b", text)
    key = found[1] if found else next((key for word, key in WORDS.items() if word in text), None)
    said = re.sub(r"<[\w.]+\.(\w+) object at 0x\w+>", r"\1", text)
    return f"trainer{'.' + key if key else ''}: {said}" + ("" if said.endswith((".", "!")) else ".")


def _raised_in_lightning(error: BaseException) -> bool:
    """Return whether the innermost frame of the traceback is one of Lightning's."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    parts = PurePath(trace.tb_frame.f_code.co_filename).parts
    return any(pair in (("lightning", "pytorch"), ("lightning", "fabric")) for pair in pairwise(parts))
