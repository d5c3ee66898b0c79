"""Mitochondria among neurites in electron microscopy: serial sections, thicker than a pixel is wide.

It imitates what makes such stacks hard: membranes everywhere that are as dark as what is wanted, vesicles and dark
bodies that are no mitochondria, cells that are paler or darker than others, sections of uneven contrast.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt

from distillfss_core.samples.noise import F32, Labels, blur, drifting, renumber, texture, without_slivers

PIXEL_NM = 8.0
PLANE_NM = 40.0
_STEP = PLANE_NM / PIXEL_NM  # planes lie so many pixels apart
_CELL = 50.0  # pixels between the seeds of cells
_SMALLEST = 60  # pixels of a cut that a person would outline
_FAR = 99.0


def draw_mitochondria(
    rng: np.random.Generator, shape: tuple[int, int, int]
) -> Generator[float, None, tuple[npt.NDArray[np.uint8], Labels]]:
    """Gray values, and which mitochondrion each voxel is of; both (z y x). The share that is done is yielded."""
    planes, size, _ = shape
    cells, edge = yield from _cells(rng, shape)
    shade = rng.normal(0, 13, int(cells.max()) + 1).astype(np.float32)
    gray = 172 + shade[cells] + 7 * texture(rng, shape, 1.3) + 4 * texture(rng, shape, 5.0)
    yield 0.4
    _add_reticulum(rng, gray, edge)
    _add_vesicles(rng, gray, cells, edge)
    yield 0.55
    labels = np.zeros(shape, np.uint16)
    wobble = drifting(rng, shape, 9.0, 0.1)
    wanted = max(3, round(size * size * (planes * _STEP + 60) / 520_000))
    number = 0
    tries = wanted * 60
    for done in range(1, tries + 1):
        number += _add_mitochondrion(rng, gray, labels, cells, edge, wobble, number + 1)
        yield 0.55 + 0.3 * max(done / tries, number / wanted)
        if number == wanted:
            break
    _add_dark_bodies(rng, gray, labels, edge)
    width = 1.5 + 1.6 * np.clip(drifting(rng, shape, 11.0, 0.3) - 1.3, 0, 1)  # synapses are thick and dark
    gray -= 92 * np.exp(-((edge / width) ** 2)) * (labels == 0)
    gray = blur(gray.astype(np.float32), 0.7)
    yield 0.93
    contrast = rng.normal(1, 0.05, (planes, 1, 1)) * (gray - 150) + 150 + rng.normal(0, 4, (planes, 1, 1))
    noisy = contrast + rng.normal(0, 8.5, shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), renumber(without_slivers(labels, _SMALLEST))


def _cells(
    rng: np.random.Generator, shape: tuple[int, int, int]
) -> Generator[float, None, tuple[npt.NDArray[np.int32], F32]]:
    """Which cell each voxel is of, and its distance in the plane to the nearest membrane, in pixels.

    Cells are groups of the regions nearest to seeds on a shaken grid; seeds wander from plane to plane, and a smooth
    displacement bends the borders.
    """
    planes, size, _ = shape
    side = int(np.ceil(size / _CELL)) + 6
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1) - 3 + 0.5
    grid = (grid + rng.uniform(-0.44, 0.44, grid.shape)) * _CELL
    swing = rng.normal(0, 0.1, grid.shape) * _CELL
    pace, start = rng.uniform(0.1, 0.35, grid.shape), rng.uniform(0, 2 * np.pi, grid.shape)
    groups = _grouped(rng, grid)
    bend = [9 * drifting(rng, shape, 15.0, 0.14) for _ in range(2)]
    cells, edge = np.empty(shape, np.int32), np.empty(shape, np.float32)
    y, x = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32), indexing="ij")
    for z in range(planes):
        seeds = (grid + swing * np.sin(pace * z + start)).astype(np.float32).reshape(-1, 2)
        v, u = y + bend[0][z], x + bend[1][z]
        row, column = (np.clip((c / _CELL).astype(np.int32) + 3, 1, side - 2) for c in (v, u))
        near = np.stack([(row + i) * side + column + j for i in (-1, 0, 1) for j in (-1, 0, 1)])
        sy, sx, of = seeds[near, 0], seeds[near, 1], groups.ravel()[near]
        square = (sy - v) ** 2 + (sx - u) ** 2
        first = square.argmin(0)[None]
        mine, ty, tx, tof = (np.take_along_axis(a, first, 0) for a in (square, sy, sx, of))
        apart = np.sqrt((sy - ty) ** 2 + (sx - tx) ** 2)
        border = np.where(of == tof, _FAR, (square - mine) / (2 * np.maximum(apart, 1e-3)))
        cells[z], edge[z] = tof[0], border.min(0)
        yield 0.3 * (z + 1) / planes
    return cells, edge


def _grouped(rng: np.random.Generator, grid: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
    """The cell of each seed: some pairs of neighbors are one, and all round a few places are one large cell."""
    side = len(grid)
    groups = np.arange(side * side, dtype=np.int32).reshape(side, side)
    for i in range(side - 1):
        for j in range(side - 1):
            turn = rng.random()
            if turn < 0.4:
                groups[i + (turn < 0.2), j + (turn >= 0.2)] = groups[i, j]
    for number in range(max(1, round(side * side / 45))):
        middle, radius = grid[tuple(rng.integers(0, side, 2))], rng.uniform(1.1, 2.0) * _CELL
        groups[((grid - middle) ** 2).sum(-1) < radius**2] = side * side + number
    return groups


def _add_mitochondrion(
    rng: np.random.Generator,
    gray: F32,
    labels: Labels,
    cells: npt.NDArray[np.int32],
    edge: F32,
    wobble: F32,
    number: int,
) -> bool:
    """Draw one bent tube within its cell, in place; whether there was room for it."""
    planes, size, _ = gray.shape
    length, radius = rng.uniform(15, 150), rng.uniform(11, 19)
    center = np.array([rng.uniform(-15, planes * _STEP + 15), *rng.uniform(-10, size + 10, 2)])
    along = rng.normal(size=3) * (0.8, 1, 1)
    along /= np.linalg.norm(along)
    across = np.cross(along, rng.normal(size=3))
    across /= np.linalg.norm(across)
    bow = rng.uniform(0, 0.16) * length
    if not _has_room(center, along, across, length, radius, bow, cells, edge):
        return False
    reach = np.abs(along) * length / 2 + bow + radius + 2
    low = np.maximum(0, np.ceil((center - reach) / (_STEP, 1, 1))).astype(int)
    high = np.minimum(gray.shape, np.floor((center + reach) / (_STEP, 1, 1)) + 1).astype(int)
    if (high <= low).any():
        return False
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = [np.arange(a, b, dtype=np.float32) for a, b in zip(low, high, strict=True)]
    dz, dy, dx = np.meshgrid(axes[0] * _STEP - center[0], axes[1] - center[1], axes[2] - center[2], indexing="ij")
    u = along[0] * dz + along[1] * dy + along[2] * dx
    v = across[0] * dz + across[1] * dy + across[2] * dx
    v = v - bow * ((2 * u / length).clip(-1, 1) ** 2 - 0.4)
    other = np.cross(along, across)
    w = other[0] * dz + other[1] * dy + other[2] * dx
    beyond = np.maximum(np.abs(u) - length / 2, 0)
    thick = radius * (1 + 0.13 * np.sin(u / 17 + rng.uniform(0, 6))) * (1 + 0.06 * wobble[box])
    distance = np.sqrt(v * v + (w / rng.uniform(0.75, 1)) ** 2 + beyond**2) / thick
    inside = distance < 1
    if not inside.any():
        return False
    home = np.bincount(cells[box][inside]).argmax()
    mine = inside & (cells[box] == home) & (edge[box] > 3)
    if mine.sum() < max(_SMALLEST, 0.75 * inside.sum()) or (labels[box][distance < 1.2] > 0).any():
        return False
    depth = np.minimum((1 - distance) * thick, edge[box] - 3)  # pixels below its own membrane
    folds = np.cos(2 * np.pi * (u + 3.5 * wobble[box] + 0.9 * w) / rng.uniform(6.5, 8.5))
    body = 112 + rng.normal(0, 7) - 26 * np.clip(folds, -0.3, 1) * np.clip(depth / 4, 0, 1)
    body -= 58 * np.exp(-(((depth - 1) / 1.6) ** 2))
    gray[box][mine] = body[mine]
    labels[box][mine] = number
    return True


def _has_room(
    center: npt.NDArray[np.floating],
    along: npt.NDArray[np.floating],
    across: npt.NDArray[np.floating],
    length: float,
    radius: float,
    bow: float,
    cells: npt.NDArray[np.int32],
    edge: F32,
) -> bool:
    """Whether the middle line of a tube lies in one cell, away from its membrane, as far as it lies in the stack."""
    t = np.linspace(-1, 1, 9)[:, None]
    line = (center + along * t * length / 2 + across * bow * (t**2 - 0.4)) / (_STEP, 1, 1)
    points = np.rint(line).astype(int)
    points = points[((points >= 0) & (points < cells.shape)).all(1)].T
    occupied = cells[tuple(points)]
    return bool(occupied.size and (occupied == occupied[0]).all() and (edge[tuple(points)] > 0.5 * radius).all())


def _add_reticulum(rng: np.random.Generator, gray: F32, edge: F32) -> None:
    """Thin dark sheets inside some cells: where a smooth field is zero, they draw curves from plane to plane."""
    shape = (len(gray), *gray.shape[1:])
    where = np.clip(drifting(rng, shape, 22.0, 0.1) - 0.35, 0, 1) * np.clip((edge - 5) / 3, 0, 1)
    field = drifting(rng, shape, 9.0, 0.16)
    gray -= 75 * np.exp(-((field / 0.10) ** 2)) * np.clip(1.6 * where, 0, 1)


def _add_vesicles(rng: np.random.Generator, gray: F32, cells: npt.NDArray[np.int32], edge: F32) -> None:
    """Small pale bubbles with a dark rim, as many as fit into some of the cells; each lies in one section."""
    planes, size, _ = gray.shape
    full = rng.random(int(cells.max()) + 1) < 0.22
    y, x = np.meshgrid(np.arange(-4, 5), np.arange(-4, 5), indexing="ij")
    for _ in range(size * size * planes // 260):
        cz, cy, cx = rng.integers((0, 4, 4), (planes, size - 4, size - 4))
        if not full[cells[cz, cy, cx]] or edge[cz, cy, cx] < 6:
            continue
        away = np.sqrt(y * y + x * x) - rng.uniform(1.9, 2.7)
        bubble = 14 * (away < 0) - 58 * np.exp(-((away / 0.8) ** 2))
        gray[cz, cy - 4 : cy + 5, cx - 4 : cx + 5] += bubble


def _add_dark_bodies(rng: np.random.Generator, gray: F32, labels: Labels, edge: F32) -> None:
    """Round bodies, dark throughout: as dark as mitochondria, without folds."""
    planes, size, _ = gray.shape
    for _ in range(max(2, round(size * size * planes / 110_000))):
        cz, cy, cx = rng.uniform((0, 0, 0), (planes * _STEP, size, size))
        radius = rng.uniform(7, 13)
        low, high = max(0, int(np.ceil((cz - radius) / _STEP))), min(planes, int((cz + radius) / _STEP) + 1)
        up, down = max(0, int(cy - radius)), min(size, int(cy + radius) + 1)
        left, right = max(0, int(cx - radius)), min(size, int(cx + radius) + 1)
        box = (slice(low, high), slice(up, down), slice(left, right))
        z, y, x = np.ogrid[box]
        away = np.sqrt((z * _STEP - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2)
        room = (labels[box] == 0) & (edge[box] > 3)
        if room[away < radius].all():
            cover = np.clip(radius - away, 0, 1)
            gray[box] += cover * (rng.uniform(62, 92) - gray[box])
