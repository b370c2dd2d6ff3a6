"""Pictures of label maps and of features; none of them needs a network."""
