"""Choice of planes to annotate: evenly spread, or as different from one another as possible."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import SupportSetError
from distillfss_core.types import Array, TrainStep, as_run, finish
from distillfss_core.volumes.volume import Volume

F32 = npt.NDArray[np.float32]

LOOKED_AT = 64
"""Planes that are read at most to find out which differ."""

_WINDOW = 2048  # pixels of a side: of larger planes the middle is looked at
_SIDE = 256  # a plane is shrunk to about this before it is described
_GRID = 4
_OCTAVES = 5


def suggest_planes(planes: int, count: int) -> list[int]:
    """Choose planes to annotate by hierarchical uniform sampling [1]_: both ends, then midpoints level by level.

    Parameters
    ----------
    planes : int
        Planes of the stack.
    count : int
        How many to choose, 1..planes.

    Returns
    -------
    list of int
        Ascending plane numbers. The choice for fewer planes is part of the choice for more.

    References
    ----------
    .. [1] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
       Lightweight Segmentation Model", arXiv:2512.05613, 2025.

    Examples
    --------
    >>> suggest_planes(50, 5)
    [0, 12, 24, 36, 49]
    """
    check_count(count, planes)
    chosen = [0]
    if count > 1:
        chosen.append(planes - 1)
    gaps = [(0, planes - 1)]
    while len(chosen) < count:
        split = [(a, (a + b) // 2, b) for a, b in gaps if b - a > 1]
        chosen += [middle for _, middle, _ in split][: count - len(chosen)]
        gaps = [pair for a, m, b in split for pair in ((a, m), (m, b))]
    return sorted(chosen)


def check_count(count: int, planes: int) -> None:
    """Raise SupportSetError if ``count`` is not 1 to the number of planes."""
    if not 1 <= count <= planes:
        raise SupportSetError(f"cannot choose {count} of {planes} planes; ask for 1 to {planes}")


def suggest_diverse_planes(volume: Volume, count: int, *, taken: Collection[int] = ()) -> list[int]:
    """Planes to annotate that together are most like all the others: the sum over the volume of each plane's
    distance to the nearest one chosen is made small, one choice after the other (greedy k-medoids).

    A plane is described by its brightness, its texture at five scales, where in the plane both are, and its place in
    the stack; the last counts twice, the others alike. A lone odd plane is thus not chosen before what many planes
    look like. No weights are needed.

    Parameters
    ----------
    volume : Volume
        At most `LOOKED_AT` planes of it are read, evenly spread, and of planes larger than 2048 pixels the middle.
    count : int
        How many to choose beside ``taken``, at least 1; fewer are returned where fewer planes differ or were read.
    taken : collection of int
        Planes that are annotated already: what is like them is not suggested again.

    Returns
    -------
    list of int
        Ascending plane numbers. The choice for fewer planes is part of the choice for more.

    Raises
    ------
    SupportSetError
        If ``count`` is not 1 to the number of planes.
    InputFileError
        If a plane cannot be read.
    """
    return finish(iter_diverse_planes(volume, count, taken=taken))


@as_run
def iter_diverse_planes(
    volume: Volume, count: int, *, taken: Collection[int] = ()
) -> Generator[TrainStep, None, list[int]]:
    """`suggest_diverse_planes` as a run: a step a plane that was read; closed, it has chosen nothing."""
    planes = volume.shape[0]
    check_count(count, planes)
    # the planes chosen evenly are part of those that are looked at
    looked_at = sorted({*suggest_planes(planes, min(planes, max(count, LOOKED_AT))), *taken})
    described = []
    for index, z in enumerate(looked_at, 1):
        described.append(describe_plane(volume.plane(z, _WINDOW)))
        yield TrainStep(index, len(looked_at), stage="looking")
    features = comparable(np.array(looked_at, np.float32), described)
    blank = [not texture.any() for _, texture, _ in described]
    taken_rows = [i for i, z in enumerate(looked_at) if z in taken]
    free = [i for i, z in enumerate(looked_at) if z not in taken and not blank[i]]
    free = free or [i for i, z in enumerate(looked_at) if z not in taken]
    return sorted(looked_at[i] for i in choose_medoids(features, count, free, taken_rows))


def describe_plane(plane: Array) -> tuple[F32, F32, F32]:
    """What a plane looks like in numbers: brightness, texture, layout.

    Parameters
    ----------
    plane : array, shape (y, x) or (y, x, c)
        Channels are averaged; NaN counts as 0.

    Returns
    -------
    brightness : shape (7,)
        Percentiles 1, 5, 25, 50, 75, 95, 99 of the pixels.
    texture : shape (5,)
        Deviation of what is lost each time the plane is halved: fine grain first. All 0 for a plane of one value.
    layout : shape (2 * 4 * 4,)
        Mean and deviation in a grid of four by four.
    """
    gray = np.nan_to_num(plane.astype(np.float32), posinf=0.0, neginf=0.0)
    gray = gray.mean(-1) if gray.ndim == 3 else gray
    step = max(1, round(max(gray.shape) / _SIDE))
    small = _shrunk(gray, step)
    brightness = np.percentile(small, (1, 5, 25, 50, 75, 95, 99))
    texture, level = np.zeros(_OCTAVES), small
    for octave in range(_OCTAVES):
        if min(level.shape) < 2:
            break
        coarse = _shrunk(level, 2)
        fine = level[: 2 * coarse.shape[0], : 2 * coarse.shape[1]]
        texture[octave] = (fine - coarse.repeat(2, 0).repeat(2, 1)).std()
        level = coarse
    cells = [cell for rows in np.array_split(small, _GRID) for cell in np.array_split(rows, _GRID, axis=1)]
    layout = [value for cell in cells for value in ((cell.mean(), cell.std()) if cell.size else (0.0, 0.0))]
    return brightness.astype(np.float32), texture.astype(np.float32), np.array(layout, np.float32)


def choose_medoids(features: F32, count: int, free: Sequence[int], taken: Sequence[int] = ()) -> list[int]:
    """Rows that stand for all rows: each next one lowers the sum of distances to the nearest chosen most.

    Parameters
    ----------
    features : float32 array, shape (n, d)
    count : int
        How many rows to choose; fewer are, if ``free`` has fewer.
    free, taken : sequences of int
        Rows that may be chosen; rows that are chosen already.

    Returns
    -------
    list of int
        In the order of choice.

    Notes
    -----
    This is greedy facility location. The loss by greedy choice is bounded [1]_.

    References
    ----------
    .. [1] Nemhauser, Wolsey, Fisher, "An analysis of approximations for maximizing submodular set functions - I",
       Mathematical Programming 14, 1978.
    """
    distance = np.sqrt(((features[:, None] - features[None]) ** 2).sum(-1))
    nearest = np.full(len(features), distance.max(initial=0.0) + 1, np.float32)
    for row in taken:
        nearest = np.minimum(nearest, distance[row])
    chosen: list[int] = []
    left = list(free)
    for _ in range(min(count, len(left))):
        best = min(left, key=lambda row: float(np.minimum(nearest, distance[row]).sum()))
        nearest = np.minimum(nearest, distance[best])
        left.remove(best)
        chosen.append(best)
    return chosen


def comparable(places: F32, described: Sequence[tuple[F32, F32, F32]]) -> F32:
    """Place, brightness, texture and layout side by side, of the same spread, but place of twice. Shape (n, d)."""
    groups = [places[:, None], *(np.stack(group) for group in zip(*described, strict=True))]
    spread = []
    for group in groups:
        away = group - group.mean(0)
        size = float(np.sqrt((away**2).sum(-1).mean()))
        spread.append(away / size if size > 0 else away)
    spread[0] *= 2
    return np.concatenate(spread, 1).astype(np.float32)


def _shrunk(gray: F32, step: int) -> F32:
    """Means of squares of ``step`` pixels; what is left at the edges is cut off, unless it is all there is."""
    rows, columns = (max(1, n // step) for n in gray.shape)
    tall, wide = (min(step, n) for n in gray.shape)
    cut = gray[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide)
    return np.asarray(cut.mean((1, 3)))
