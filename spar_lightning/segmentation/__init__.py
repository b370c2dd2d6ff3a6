"""Image and class names to a segmentation map."""
