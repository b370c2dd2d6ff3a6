"""Case of the catalogue: files and a call of the product, the right result, and the errors that are honest.

The right result comes from what the files contain (numpy, tarfile, the writer of the format), never from the product.
"""

import io
import logging
import os
import shlex
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from spar_lightning.cli import main
from spar_lightning.errors import UserError

Verdict = Literal[
    "result", "clear error", "traceback", "wrong result", "silent skip", "unclear error", "rejected", "hang"
]
GOOD: Final = ("result", "clear error")
SECONDS: Final = 60  # a case that takes longer hangs
LONGEST: Final = 1200  # characters of an error message


class Hang(BaseException):
    """Error of a case that takes too long; no handler of the package catches it."""


class WrongError(Exception):
    """Error for a result that differs from what the files contain."""


class SkippedError(WrongError):
    """Error for a result that lacks a part of the input, or content that was lost, without a message."""


@dataclass(frozen=True)
class Ran:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the error message: the line with `error:`, or the items listed at the end, and all that follows."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        starts = [i for i, line in enumerate(lines) if ": error: " in line or line.endswith(" without a result:")]
        return "\n".join(lines[starts[0] :]) if starts else "\n".join(lines)


@dataclass(frozen=True)
class Case:
    """One entry of the catalogue.

    Attributes:
        group: Group of the catalogue.
        name: Name of the case, unique in its group.
        act: Function that makes the files in an empty folder and calls the product.
        right: Function that raises WrongError if the result is not that of the files; None if only an error is right.
        error: Words that an error message must contain; None if an error is wrong.
        said: Words that a warning or the output must contain next to a result.
    """

    group: str
    name: str
    act: Callable[[Path], Any]
    right: Callable[[Any], None] | None = None
    error: tuple[str, ...] | None = None
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Outcome of a case."""

    group: str
    name: str
    verdict: Verdict
    detail: str = ""


class Said(logging.Handler):
    """Log handler that keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.lines.append(record.getMessage())


def spar(*args: object) -> Ran:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([os.fspath(arg) if isinstance(arg, Path) else str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Ran(code, out.getvalue(), err.getvalue())


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise Hang in a block that takes too long."""

    def ring(number: int, frame: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(case: Case, folder: Path) -> Finding:
    """Run a case in an empty folder and judge it."""
    found, said, log = partial(Finding, case.group, case.name), Said(), logging.getLogger("spar_lightning")
    log.addHandler(said)
    try:
        with limit(SECONDS):
            result = case.act(folder)
    except UserError as error:
        return found(*_judge_error(case, str(error)))
    except SkippedError as error:
        return found("silent skip", str(error))
    except WrongError as error:
        return found("wrong result", str(error))
    except Hang as error:
        return found("hang", str(error))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return found("traceback", f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")
    finally:
        log.removeHandler(said)
    output = "\n".join(said.lines)
    if isinstance(result, Ran):
        if "Traceback (most recent call last)" in result.err:
            return found("traceback", result.err[-600:])
        if result.code:
            if result.code not in (1, 2):
                return found("unclear error", f"exit code {result.code}: {result.error()}")
            return found(*_judge_error(case, result.error()))
        output += result.out + result.err
    if case.right is None:
        return found("wrong result", f"taken without an error; {output.strip()[-300:]}")
    try:
        case.right(result)
    except SkippedError as error:
        return found("silent skip", str(error))
    except WrongError as error:
        return found("wrong result", str(error))
    if lost := [word for word in case.said if not mentions(output, word)]:
        return found("silent skip", f"no message names {', '.join(lost)}; said: {output.strip()[-300:]!r}")
    return found("result")


def _judge_error(case: Case, text: str) -> tuple[Verdict, str]:
    lines = text.splitlines()
    if len(lines) == 2 and lines[0].endswith(" without a result:"):
        lines = lines[1:]
    if len(lines) != 1 or len(text) > LONGEST:
        return "unclear error", f"{len(lines)} lines, {len(text)} characters: {text[:500]!r}"
    if case.error is None:
        return "rejected", text
    if lost := [word for word in case.error if not mentions(text, word)]:
        return "unclear error", f"does not name {', '.join(map(repr, lost))}: {text}"
    return "clear error", text


def mentions(text: str, word: str) -> bool:
    """Return whether a text contains a word, as it is or with the usual escapes, in any case."""
    raw = os.fsencode(word)
    spellings = (word, repr(word)[1:-1], raw.decode("utf-8", "backslashreplace"), repr(raw)[2:-1], shlex.quote(word))
    return any(spelling.lower() in text.lower() for spelling in spellings)


@dataclass(frozen=True)
class Same:
    """Check that pixels (3, H, W) are those of an array (H, W, 3), up to a tolerance per value."""

    expected: NDArray[np.uint8]
    most: int = 0
    mean: float = field(default=0.0)

    def __call__(self, pixels: torch.Tensor) -> None:
        """Raise WrongError if the pixels differ."""
        found = pixels.permute(1, 2, 0).numpy().astype(int)
        if found.shape != self.expected.shape:
            raise WrongError(f"shape {found.shape}, expected {self.expected.shape}")
        off = np.abs(found - self.expected.astype(int))
        if off.max() > self.most or (self.mean and off.mean() > self.mean):
            raise WrongError(f"values differ by up to {off.max()}, {off.mean():.2f} on average")


def equal(expected: object) -> Callable[[Any], None]:
    """Return a check that a result equals `expected`."""

    def check(result: Any) -> None:
        if result != expected:
            raise WrongError(f"got {_short(result)}, expected {_short(expected)}")

    return check


def items(expected: Mapping[str, bytes]) -> Callable[[Any], None]:
    """Return a check that a mapping has these items; missing ones count as skipped."""

    def check(result: Mapping[str, bytes]) -> None:
        if lost := sorted(expected.keys() - result.keys()):
            raise SkippedError(f"{len(lost)} of {len(expected)} images are missing: {lost[:3]!r}")
        if extra := sorted(result.keys() - expected.keys()):
            raise WrongError(f"{len(extra)} images too many: {extra[:3]!r}")
        if other := [key for key in expected if result[key] != expected[key]]:
            raise WrongError(f"other bytes: {other[:3]!r}")

    return check


def anything(result: object) -> None:
    """Accept any result: the case only asks for no traceback."""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}.."
