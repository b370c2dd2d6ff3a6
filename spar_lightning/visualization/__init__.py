"""Visualization of segmentation maps, features and metrics, without running a network."""
