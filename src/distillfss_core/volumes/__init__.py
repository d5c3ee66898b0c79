"""Stacks of any size, opened and read piece by piece."""
