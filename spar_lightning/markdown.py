"""Tables that read well on a screen and as Markdown."""

from collections.abc import Sequence


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as it is; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in ruled)
