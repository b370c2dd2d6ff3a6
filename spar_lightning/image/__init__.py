"""Image processing before the network: decoding, user input, resizing."""
