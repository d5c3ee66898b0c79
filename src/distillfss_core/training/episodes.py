"""Choose query and support crops of an episode, by indices alone; no query is in its own support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distillfss_core.types import Array


@dataclass(frozen=True)
class Episode:
    """Indices of stored crops."""

    query: tuple[int, ...]
    support: tuple[int, ...]


def draw_episode(
    slices: Array,
    boxes: Sequence[tuple[int, int, int, int]],
    rng: np.random.Generator,
    *,
    queries: int,
    shots: int,
    walk: int,
) -> Episode:
    """Draw the query and support crops of one step, with queries from other slices than the support.

    With several slices, the queries come from slice number ``walk`` (taken in turn) and at most half of the slices, the
    support from the others. With one slice, the support consists of crops that do not overlap the queries or, where all
    overlap, of those that overlap least.

    Parameters
    ----------
    slices : int array
        Slice of every stored crop.
    boxes : sequence of (y0, x0, y1, x1)
        Where every crop was cut.
    queries, shots : int
        Largest numbers of query and support crops.
    """
    present = np.unique(slices)
    if len(present) > 1:
        queried = {present[walk % len(present)]}
        others = rng.permutation([s for s in present if s not in queried])
        queried |= set(others[: rng.integers(0, max(1, len(present) // 2))])
        asking = np.flatnonzero(np.isin(slices, list(queried)))
        answering = np.flatnonzero(~np.isin(slices, list(queried)))
        query = _draw(asking, queries, rng)
    else:
        query = _draw(np.arange(len(slices)), min(queries, max(1, len(slices) // 2)), rng)
        rest = np.setdiff1d(np.arange(len(slices)), query)
        worst = np.array([max(_overlap(boxes[i], boxes[q]) for q in query) for i in rest])
        answering = rest[worst <= max(0.0, float(np.partition(worst, min(shots, len(worst)) - 1)[:shots].max()))]
    return Episode(tuple(map(int, query)), tuple(map(int, _draw(answering, shots, rng))))


def _draw(pool: Array, count: int, rng: np.random.Generator) -> Array:
    return rng.choice(pool, size=min(count, len(pool)), replace=False)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Shared area over the smaller area."""
    h = min(a[2], b[2]) - max(a[0], b[0])
    w = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(h, 0) * max(w, 0) / smaller
