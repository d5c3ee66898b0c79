"""Annotated slices: checked, and which planes to annotate."""
