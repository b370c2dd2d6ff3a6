"""Segmentation of images by class names."""
