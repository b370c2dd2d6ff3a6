"""Errors that a user can fix. `spar` prints the message without a traceback and exits with code 2.

A message says what was given, what is allowed and how to fix it. This module imports only the standard library.
"""

import difflib
from collections.abc import Iterable
from numbers import Integral


class UserError(ValueError):
    """Base class of all errors caused by user input."""


def user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError that `error` is or was raised from, or None.

    jsonargparse wraps the errors that a constructor raises.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def check_at_least(minimum: int, **values: int | None) -> None:
    """Raise UserError if any value is not a whole number or below `minimum`; None is ignored."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise UserError(f"{name} must be a whole number, but got {value!r}.")
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum}, but got {value}.")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return the sentence "Did you mean ...? " with up to three similar names, or an empty string."""
    names = {name.lower(): name for name in allowed}
    close = [names[match] for match in difflib.get_close_matches(given.lower(), list(names), n=3)]
    return f"Did you mean {' or '.join(close)}? " if close else ""
