"""Files on any file system: written whole or not at all, hashed, and shared between processes."""
