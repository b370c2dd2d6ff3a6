"""Vision transformers at any resolution, for open-vocabulary segmentation (SPAR, arXiv 2604.02252)."""

__version__ = "0.1.0"
