"""Training images: tar files and folders, augmentation, synthetic images."""
