"""File utilities: atomic writes, content hashes, and a work queue shared by processes."""
