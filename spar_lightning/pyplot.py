"""Matplotlib without a screen, imported when a picture is drawn."""

from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
