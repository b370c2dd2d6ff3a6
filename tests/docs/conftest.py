"""Fixtures of the evaluation, for the pages about it."""

from tests.cli.conftest import clip, trees

__all__ = ["clip", "trees"]
