"""Output of a command: standard output, standard error, and a new file that an option names.

Any file name can be printed. A closed pipe (`spar cache info CACHE | head -1`) ends the command quietly with exit code
141, as a shell reports for other programs.
"""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, TextIO

from spar_lightning.errors import UserError

CLOSED: Final = 141  # 128 + SIGPIPE


def accept_all_names() -> None:
    """Let both streams print characters outside their encoding, and names that are not UTF-8, as escapes."""
    for stream in _streams():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write pending output, so that an error appears here and not when the interpreter exits.

    Raises:
        BrokenPipeError: The reader of a stream has ended.
        OSError: The output cannot be written; it is discarded from now on.
    """
    for stream in _streams():
        try:
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard(stream)
            raise OSError(error.errno, error.strerror, stream.name) from error


def is_closed() -> bool:
    """Return whether the reader of a stream has ended."""
    return any(_has_no_reader(stream) for stream in _streams())


def discard() -> None:
    """Discard all further output to a stream whose reader has ended, also what is pending."""
    for stream in _streams():
        if _has_no_reader(stream):
            _discard(stream)


def check_new_file(option: str, path: Path) -> None:
    """Raise UserError if a file that a command is to write exists already, or if its folder does not exist.

    Args:
        option: Option that names the file.
        path: Path of the file.
    """
    if os.path.lexists(path):
        raise UserError(f"{option} {path}: the file already exists. Pass another name.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: the folder does not exist. Create it, or pass another path.")


def _streams() -> Iterator[TextIO]:
    """Yield the streams that are open; Python has None for a stream that the shell has closed."""
    yield from (stream for stream in (sys.stdout, sys.stderr) if stream is not None)


def _has_no_reader(stream: TextIO) -> bool:
    with suppress(OSError, ValueError):  # not a file, as in tests
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _discard(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
