"""Formatting of tables, byte counts and durations as text."""

import math
from collections.abc import Sequence


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that is also readable as plain text; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in ruled)


def bytes_text(count: float) -> str:
    """Return a number of bytes with a decimal unit (powers of 1000), such as `127 GB`."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def hours_text(hours: float) -> str:
    """Return a duration in seconds, minutes, hours or days, depending on its length."""
    seconds = 3600 * hours
    units = ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h"), (math.inf, 86400, "days"))
    size, unit = next((size, unit) for below, size, unit in units if seconds < below)
    count = seconds / size
    return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
