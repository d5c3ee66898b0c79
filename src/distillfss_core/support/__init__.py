"""Annotated slices: their validation, and the choice of planes to annotate."""
