"""Probes: how much the patch features of a frozen backbone know about labels (Tables 4, 7 and 8 of the paper)."""
