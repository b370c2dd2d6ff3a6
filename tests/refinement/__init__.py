"""Tests of the refinement of maps."""
