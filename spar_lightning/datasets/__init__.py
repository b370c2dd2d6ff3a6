"""Training images: tar files and folders, augmentation, rendered scenes."""
