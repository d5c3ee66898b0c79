"""Accuracy and cost beside published figures and other tools; needs the extra "bench"."""
