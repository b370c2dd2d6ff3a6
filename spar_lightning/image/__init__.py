"""Pixels before any network: decoding, user input, sizes."""
