"""Cache of the teacher's features on disk."""
