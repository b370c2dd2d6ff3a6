"""Errors that a user can mend: the command prints their sentence, without a traceback, and exits 2.

A sentence says what was given, what is allowed, and what mends it. Standard library only.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Base of every error whose cause lies in what the user gave."""


def user_error(error: BaseException | None) -> UserError | None:
    """The error, or what it was raised from: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def check_at_least(minimum: int, **values: int | None) -> None:
    """Raise UserError for every number below the minimum; None is no number."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum}, but got {value}.")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A sentence that names up to three likely meanings of `given`, or nothing."""
    names = {name.lower(): name for name in allowed}
    close = [names[match] for match in difflib.get_close_matches(given.lower(), list(names), n=3)]
    return f"Did you mean {' or '.join(close)}? " if close else ""
