"""Nuclei in fluorescence, for the demo, the tests and the examples.

It imitates what makes confocal stacks hard: nuclei packed until they touch, of every brightness, blurred most along z,
lit unevenly, over a structured haze, with bright debris that is no nucleus.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt

from distillfss_core.samples.noise import F32, Labels, along_z, blur, renumber, texture, without_slivers

Z_STEP = 2.5
"""Distance between two planes, in pixels of the plane: stacks are sampled more coarsely along z."""


def draw_nuclei(
    rng: np.random.Generator, shape: tuple[int, int, int]
) -> Generator[float, None, tuple[npt.NDArray[np.uint16], Labels]]:
    """Camera counts, and which nucleus each voxel is of; both (z y x). The share that is done is yielded, 0 to 1."""
    light, labels = yield from _nuclei(rng, shape)
    light += _debris(rng, shape)
    light = _microscope_blur(light)
    yield 0.65
    light += yield from _haze(rng, shape, light)
    light *= _illumination(rng, shape)
    return _camera(rng, light), labels


def _nuclei(rng: np.random.Generator, shape: tuple[int, int, int]) -> Generator[float, None, tuple[F32, Labels]]:
    """Light (z y x) of touching ellipsoids with chromatin texture, and which nucleus each voxel is of."""
    planes, size, _ = shape
    depth = planes * Z_STEP
    light = np.zeros(shape, np.float32)
    labels = np.zeros(shape, np.uint16)
    ownership = np.full(shape, np.inf, np.float32)  # how deep inside its nucleus a voxel lies: the deepest wins
    chromatin = texture(rng, shape, 2.2)
    yield 0.05
    clumps = texture(rng, shape, 5.0)
    yield 0.1
    clusters = rng.uniform(0, size, (max(2, round(size * size / 24_000)), 2))
    wanted = max(4, round(size * size * (depth + 16) / 28_000))
    placed: list[tuple[float, float, float, float]] = []
    number = 0
    for _ in range(wanted * 12):
        if number == wanted:
            break
        radius = float(np.clip(rng.lognormal(np.log(14.5), 0.18), 9.5, 22))
        # Most nuclei gather in clusters, the rest lie anywhere.
        if rng.random() < 0.68:
            y, x = clusters[rng.integers(len(clusters))] + rng.normal(0, 50, 2)
        else:
            y, x = rng.uniform(-6, size + 6, 2)
        z = rng.uniform(-8, depth + 8)
        if not (-12 < y < size + 12 and -12 < x < size + 12) or _crowded(placed, z, y, x, radius):
            continue
        placed.append((z, y, x, radius))
        number += _add_nucleus(rng, (z, y, x), radius, number + 1, light, labels, ownership, chromatin, clumps)
        yield 0.1 + 0.45 * number / wanted
    return light, renumber(without_slivers(labels, 50))


def _crowded(placed: list[tuple[float, float, float, float]], z: float, y: float, x: float, radius: float) -> bool:
    """Whether a nucleus here would lie more than a little inside another."""
    if not placed:
        return False
    other = np.asarray(placed)
    distance = np.sqrt((1.25 * (other[:, 0] - z)) ** 2 + (other[:, 1] - y) ** 2 + (other[:, 2] - x) ** 2)
    return bool((distance < 0.86 * (other[:, 3] + radius)).any())


def _add_nucleus(
    rng: np.random.Generator,
    center: tuple[float, float, float],
    radius: float,
    number: int,
    light: F32,
    labels: npt.NDArray[np.uint16],
    ownership: F32,
    chromatin: F32,
    clumps: F32,
) -> int:
    """Draw one nucleus in place; return 1 if any of its voxels lies in the stack."""
    planes, size, _ = light.shape
    z0, y0, x0 = center
    reach = radius * 1.75
    top, bottom = max(0, int((z0 - reach) / Z_STEP)), min(planes, int((z0 + reach) / Z_STEP) + 2)
    up, down = max(0, int(y0 - reach)), min(size, int(y0 + reach) + 2)
    left, right = max(0, int(x0 - reach)), min(size, int(x0 + reach) + 2)
    if top >= bottom or up >= down or left >= right:
        return 0
    box = (slice(top, bottom), slice(up, down), slice(left, right))
    z, y, x = np.meshgrid(
        np.arange(top, bottom, dtype=np.float32) * Z_STEP - z0,
        np.arange(up, down, dtype=np.float32) - y0,
        np.arange(left, right, dtype=np.float32) - x0,
        indexing="ij",
    )
    turn = rng.uniform(0, np.pi)
    stretch = rng.uniform(1.0, 1.42)
    u = (np.cos(turn) * y + np.sin(turn) * x) / (radius * stretch**0.5)
    v = (np.cos(turn) * x - np.sin(turn) * y) / (radius / stretch**0.5)
    w = z / (radius * rng.uniform(0.7, 0.95))
    angle = np.arctan2(v, u)
    bumps = sum(rng.normal(0, 0.05 / k) * np.cos((k + 1) * angle + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3))
    distance = np.sqrt((u * u + v * v) * (1 + bumps) ** 2 + w * w)  # 1 on the surface; smooth at the poles
    inside = distance < 1
    if not inside.any():
        return 0
    brightness = float(np.exp(rng.normal(0, 0.38)))
    soft = np.clip((1 - distance) * radius * 0.8, 0, 1)  # a rim about one pixel wide
    grain = 1 + 0.30 * chromatin[box] + 0.22 * clumps[box]
    rim = 1 + 0.25 * np.exp(-(((distance - 0.9) / 0.12) ** 2))  # heterochromatin lies at the envelope
    body = brightness * np.clip(grain * rim, 0.15, None)
    for _ in range(rng.integers(1, 4)):  # nucleoli hold little DNA: dark holes
        du, dv, dw = rng.uniform(-0.5, 0.5, 3)
        hole = ((u - du) ** 2 + (v - dv) ** 2 + (w - dw) ** 2) / rng.uniform(0.16, 0.27) ** 2
        body *= 1 - 0.62 * np.exp(-(hole**1.5))
    light[box] = np.maximum(light[box], (soft * body).astype(np.float32))
    mine = inside & (distance < ownership[box])
    labels[box][mine] = number
    ownership[box][mine] = distance[mine]
    return 1


def _debris(rng: np.random.Generator, shape: tuple[int, int, int]) -> F32:
    """Small bright things that are no nucleus: grains of dye and shreds of dead cells."""
    planes, size, _ = shape
    light = np.zeros(shape, np.float32)
    y, x = np.meshgrid(np.arange(-9, 10), np.arange(-9, 10), indexing="ij")
    for _ in range(max(3, round(size * size * planes / 22_000))):
        cz, cy, cx = rng.integers(0, (planes, size, size))
        turn, long, short = rng.uniform(0, np.pi), rng.uniform(1.2, 4.2), rng.uniform(0.9, 1.8)
        u = (np.cos(turn) * y + np.sin(turn) * x) / long
        v = (np.cos(turn) * x - np.sin(turn) * y + 0.06 * rng.normal() * y * y) / short
        spot = rng.uniform(1.0, 4.0) * np.exp(-0.5 * (u * u + v * v))
        up, down, left, right = max(0, cy - 9), min(size, cy + 10), max(0, cx - 9), min(size, cx + 10)
        light[cz, up:down, left:right] += spot[up - cy + 9 : down - cy + 9, left - cx + 9 : right - cx + 9]
    return light


def _microscope_blur(light: F32) -> F32:
    """A sharp core plus the wide cone that light from other planes arrives in."""
    sharp = along_z(blur(light, 0.9), (0.10, 0.80, 0.10))
    wide = along_z(blur(light, 5.0), (0.10, 0.24, 0.32, 0.24, 0.10))
    wider = along_z(blur(light, 14.0), (0.15, 0.22, 0.26, 0.22, 0.15))
    result: F32 = (0.66 * sharp + 0.22 * wide + 0.14 * wider).astype(np.float32)
    return result


def _haze(rng: np.random.Generator, shape: tuple[int, int, int], light: F32) -> Generator[float, None, F32]:
    """Background with structure: cytoplasm round the nuclei, fibers, a slow unevenness."""
    cytoplasm = blur(light, 9.0) * (0.45 + 0.25 * texture(rng, shape, 3.0))
    yield 0.75
    slow = 0.13 * np.clip(1 + 0.7 * texture(rng, shape, 34.0), 0, None)
    yield 0.82
    # The zero line of a smooth random field is a curve: it draws fibers.
    field = texture(rng, shape, 17.0)
    yield 0.88
    fibers = 0.22 * np.exp(-((field / 0.08) ** 2)) * np.clip(texture(rng, shape, 26.0), 0, None)
    yield 0.94
    result: F32 = (np.clip(cytoplasm, 0, None) + slow + fibers).astype(np.float32)
    return result


def _illumination(rng: np.random.Generator, shape: tuple[int, int, int]) -> F32:
    """A lamp that is off center, and light lost on the way into the tissue."""
    planes, size, _ = shape
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    cy, cx = rng.uniform(-0.4, 0.4, 2)
    field = np.exp(-0.32 * ((axis[:, None] - cy) ** 2 + (axis[None] - cx) ** 2))
    loss = np.exp(-0.35 * np.arange(planes) / max(planes, 12))
    result: F32 = (loss[:, None, None] * field[None]).astype(np.float32)
    return result


def _camera(rng: np.random.Generator, light: F32) -> npt.NDArray[np.uint16]:
    """Shot noise of the photons, read noise of the chip, gain, offset."""
    photons = rng.poisson(np.clip(light, 0, None) * 34).astype(np.float32)
    counts = 100 + 9.0 * photons + rng.normal(0, 14, light.shape)
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)
