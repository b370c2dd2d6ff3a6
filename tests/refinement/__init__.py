"""Tests of the refinements."""
