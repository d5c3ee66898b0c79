"""Nodules in lung CT: a thorax in Hounsfield units, with slices several times as thick as a pixel is wide.

It imitates what makes such stacks hard: vessels that a plane cuts look like nodules, nodules that touch vessels and the
chest wall, faint ones, and few of them in much of everything else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
import numpy.typing as npt

from distillfss_core.samples.noise import F32, Labels, blur, drifting, renumber, texture, without_slivers

PIXEL_MM = 0.8
PLANE_MM = 2.5
_WIDTH = 307.2  # millimeters that are shown at most: all of the thorax
_AIR, _FAT, _MUSCLE, _BLOOD, _BONE, _LUNG = -1000, -95, 45, 40, 420, -850
_TREES = 16  # of vessels in each lung
_SMALLEST = 8  # pixels of a cut that a person would outline

Point = npt.NDArray[np.float64]
Field = npt.NDArray[np.floating]


def pixel_size(size: int) -> float:
    """Millimeters a pixel in planes of ``size`` pixels: 0.8, or finer where the whole thorax is in them."""
    return round(min(PIXEL_MM, _WIDTH / size), 4)


def draw_nodules(
    rng: np.random.Generator, shape: tuple[int, int, int]
) -> Generator[float, None, tuple[npt.NDArray[np.int16], Labels]]:
    """Hounsfield units, and which nodule each voxel is of; both (z y x). The share that is done is yielded, 0 to 1.

    Planes narrower than the thorax show its left side, the lung in the middle.
    """
    planes, size, _ = shape
    pixel = pixel_size(size)
    aside = 68.0 * float(np.clip(1.6 - size * pixel / 190, 0, 1))
    z = ((np.arange(planes) - (planes - 1) / 2) * PLANE_MM).astype(np.float32)
    side = ((np.arange(size) - (size - 1) / 2) * pixel).astype(np.float32)
    space = _Space(pixel, z[:, None, None], side[:, None], side[None, :] + np.float32(aside))
    image, lung = _thorax(rng, shape, space)
    yield 0.2
    vessels = np.zeros(shape, np.float32)
    for number, tree in enumerate(_vessels(rng, float(z[-1])), 1):
        for start, end, radius in tree:
            _add_tube(vessels, space, start, end, radius)
        yield 0.2 + 0.6 * number / (2 * _TREES)
    image += vessels * lung * (_BLOOD - image)
    labels = _add_nodules(rng, image, lung, space)
    yield 0.85
    image = blur(image, 0.75) + 24 * texture(rng, shape, 0.9)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16), renumber(without_slivers(labels, _SMALLEST))


class _Space:
    """Millimeters from the middle of the thorax along z (to the feet), y (to the back) and x (to the left)."""

    def __init__(self, pixel: float, z: Field, y: Field, x: Field) -> None:
        self.pixel, self.z, self.y, self.x = pixel, z, y, x

    def box(self, low: Point, high: Point) -> tuple[slice, ...] | None:
        """The voxels between two points; None if there are none."""
        axes = (self.z[:, 0, 0], self.y[:, 0], self.x[0])
        spans = [np.searchsorted(axis, (a, b)) for axis, a, b in zip(axes, low, high, strict=True)]
        return None if any(a >= b for a, b in spans) else tuple(slice(a, b) for a, b in spans)

    def part(self, box: tuple[slice, ...]) -> _Space:
        return _Space(self.pixel, self.z[box[0]], self.y[box[1]], self.x[:, box[2]])

    def ellipse(self, y: Field | float, x: Field | float, height: Field | float, width: Field | float) -> F32:
        """Millimeters below the surface of an upright ellipse, about; negative outside."""
        away = np.sqrt(((self.y - y) / height) ** 2 + ((self.x - x) / width) ** 2)
        return np.asarray((1 - away) * np.minimum(height, width), np.float32)

    def cover(self, depth: Field) -> Field:
        """How much of a voxel lies inside, 0 to 1."""
        result: Field = np.clip(depth / self.pixel + 0.5, 0, 1)
        return result


def _thorax(rng: np.random.Generator, shape: tuple[int, int, int], space: _Space) -> tuple[F32, F32]:
    """Everything but vessels and nodules in Hounsfield units, and how much of each voxel is lung."""
    z = space.z
    bend = 3.0 * drifting(rng, shape, 26.0, 0.08)
    image, lung = np.full(shape, _AIR, np.float32), np.zeros(shape, np.float32)

    def put(depth: Field, value: float | Field) -> None:
        cover = space.cover(depth)
        image[...] += cover * (value - image)
        lung[...] *= 1 - cover

    def put_ellipse(y: Field | float, x: Field | float, height: float, width: float, value: float) -> None:
        reach = np.array([np.inf, height + 2, width + 2])
        box = space.box(np.array([0, np.min(y), np.min(x)]) - reach, np.array([0, np.max(y), np.max(x)]) + reach)
        if box is not None:
            cover = space.cover(space.part(box).ellipse(y, x, height, width))
            image[box] += cover * (value - image[box])
            lung[box] *= 1 - cover

    body = space.ellipse(0, 0, 116, 146) + 0.5 * bend
    put(body, _FAT)
    wall = body - 13 - 5 * np.abs(space.x) / 146
    put(wall, _MUSCLE + 10 * texture(rng, (1, *shape[1:]), 6.0))
    heart = space.ellipse(-26, 18 + 0.2 * z, 36 + 0.35 * z, 40 + 0.5 * z) + bend
    middle = np.maximum(heart, space.ellipse(6, 0, 74, 23) + bend)
    lungs = [space.ellipse(2, s * 64.0, 88 + 0.2 * z, 60) + bend for s in (-1, 1)]
    depth = np.minimum(np.minimum(np.maximum(*lungs), wall - 9), -middle)
    put(middle, _FAT + 60)
    put(heart - 4, _BLOOD)
    tissue = _LUNG + 0.5 * space.y + 22 * drifting(rng, shape, 5.0, 0.5)  # the back is denser: blood sinks
    put(depth, tissue)
    lung[...] = space.cover(depth)
    put_ellipse(36, 16 + 0.1 * z, 12, 12, 150)  # aorta
    for s in (-1, 1):
        put_ellipse(8 + 0.1 * z, s * (14 + 0.3 * z), 6, 6, -960)  # main bronchi
    put_ellipse(70, 0, 17, 20, 310)  # a vertebra: hard outside, softer within
    put_ellipse(70, 0, 14, 17, 190)
    put_ellipse(96, 0, 8, 9, 30)
    put_ellipse(-99, 0, 6, 17, 160)  # breastbone
    for angle in np.linspace(0.35, 2.8, 8):
        for s in (-1, 1):  # ribs run downwards, so that each plane cuts them elsewhere
            turn = angle + 0.012 * z + rng.normal(0, 0.03)
            put_ellipse(90 * np.cos(turn), s * 116 * np.sin(turn), 5, 8, _BONE)
    return image, lung


def _vessels(rng: np.random.Generator, reach: float) -> Iterator[Iterator[tuple[Point, Point, float]]]:
    """Trees that leave the middle, each to be iterated before the next."""
    for s in (-1.0, 1.0):
        for _ in range(_TREES):
            hilum = np.array([rng.uniform(-reach - 12, reach + 12), rng.normal(6, 8), s * 24])
            aim = np.array([rng.normal(0, 0.45), rng.normal(0, 0.75), s])
            yield _tree(rng, hilum, aim / np.linalg.norm(aim), rng.uniform(2.2, 3.8))


def _tree(rng: np.random.Generator, hilum: Point, aim: Point, radius: float) -> Iterator[tuple[Point, Point, float]]:
    """Pieces (start, end, radius; z y x in millimeters) of a tree that forks towards the wall."""
    growing = [(hilum, aim, radius)]
    while growing:
        start, aim, radius = growing.pop()
        end = start + aim * rng.uniform(8, 15)
        yield start, end, radius
        if radius < 0.65 or abs(end[2]) > 125 or abs(end[1]) > 100:
            continue
        for share in (0.86, rng.uniform(0.5, 0.78)):
            turned = aim + rng.normal(0, 0.32 / share, 3)
            growing.append((end, turned / np.linalg.norm(turned), radius * share))


def _add_tube(vessels: F32, space: _Space, start: Point, end: Point, radius: float) -> None:
    """How much of each voxel a straight piece of vessel fills, in place."""
    box = space.box(np.minimum(start, end) - radius - 1, np.maximum(start, end) + radius + 1)
    if box is None:
        return
    part = space.part(box)
    z, y, x = part.z, part.y, part.x
    dz, dy, dx = end - start
    along = ((z - start[0]) * dz + (y - start[1]) * dy + (x - start[2]) * dx) / (dz * dz + dy * dy + dx * dx)
    t = np.clip(along, 0, 1)
    away = np.sqrt((z - start[0] - t * dz) ** 2 + (y - start[1] - t * dy) ** 2 + (x - start[2] - t * dx) ** 2)
    thin = min(1.0, radius / 1.1)  # a slice is thicker than a small vessel, which it shows paler
    vessels[box] = np.maximum(vessels[box], thin * space.cover(radius - away))


def _add_nodules(rng: np.random.Generator, image: F32, lung: F32, space: _Space) -> Labels:
    """Draw nodules in place; number of the nodule each voxel is of, 0 elsewhere."""
    labels = np.zeros(image.shape, np.uint16)
    places = np.argwhere(lung > 0.9)
    if not len(places):
        return labels
    volume = len(places) * space.pixel**2 * PLANE_MM
    number = 0
    for _ in range(max(2, round(volume / 19_000))):
        place = places[rng.integers(len(places))]
        center = np.array([space.z[place[0], 0, 0], space.y[place[1], 0], space.x[0, place[2]]], float)
        center += rng.uniform(-1, 1, 3)
        radius = float(np.clip(rng.lognormal(np.log(5.6), 0.32), 3, 11))
        box = space.box(center - 1.5 * radius, center + 1.5 * radius)
        if box is None:
            continue
        part = space.part(box)
        z, y, x = (a - c for a, c in zip((part.z, part.y, part.x), center, strict=True))
        stretch = rng.uniform(0.8, 1.25)
        away = np.sqrt((z / rng.uniform(0.85, 1.15)) ** 2 + (y * stretch) ** 2 + (x / stretch) ** 2)
        angle, slope = np.arctan2(y, x), np.arctan2(z, np.sqrt(y * y + x * x))
        lobes = sum(rng.normal(0, 0.11 / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 5))
        surface = radius * (1 + lobes * np.cos(slope))
        if (labels[box][away < surface + 2] > 0).any():
            continue
        depth = surface - away
        faint = rng.random() < 0.2
        value = rng.uniform(-420, -250) if faint else rng.uniform(0, 70)
        softness = 1.6 if faint else 0.8  # millimeters over which it fades
        cover = np.clip(depth / softness + 0.5, 0, 1) * lung[box]
        image[box] += cover * np.maximum(value - image[box], 0)
        number += 1
        labels[box][(depth > 0) & (lung[box] > 0.5)] = number
    return labels
