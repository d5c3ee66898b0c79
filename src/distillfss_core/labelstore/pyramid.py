"""Coarser levels of labels."""

from __future__ import annotations

import numpy as np

from distillfss_core.labelstore.layout import Index
from distillfss_core.types import Array


def coarsen_labels(labels: Array, step: Index, *, majority: bool = True) -> Array:
    """Every ``step`` voxels (z, y, x) become one: the label that most of them have (the larger of two that are even),
    or that of the first voxel. The far ends are filled by their last voxel."""
    if not majority:
        return labels[:: step[0], :: step[1], :: step[2]]
    pad = [(0, -n % s) for n, s in zip(labels.shape, step, strict=True)]
    if any(p for _, p in pad):
        labels = np.pad(labels, pad, mode="edge")
    parts = [
        labels[tuple(slice(o, None, s) for o, s in zip(offset, step, strict=True))] for offset in np.ndindex(*step)
    ]
    if labels.max(initial=0) <= 1:  # a single class: ten times as fast
        return (2 * sum(parts[1:], parts[0].copy()) >= len(parts)).astype(labels.dtype)
    best, votes = np.zeros_like(parts[0]), np.zeros(parts[0].shape, np.uint8)
    for value in np.unique(labels):
        count = np.zeros_like(votes)
        for part in parts:
            count += part == value
        wins = count >= np.maximum(votes, 1)
        best[wins], votes[wins] = value, count[wins]
    return best
