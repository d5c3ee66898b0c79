"""Levels, shards and chunks of labels on disk: pure geometry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from distillfss_core.errors import SettingsError

_SHARD = 1 << 23  # voxels of a shard, about
_SIDE = 1024  # of a shard in y and x, about; a larger tile makes a larger shard
_CHUNK = 512  # side of a chunk at most
_DEEPEST = 8  # levels at most
_SMALLEST = 512  # the coarsest level fits into such a square
_MOST_VOXELS, _MOST_SHARDS = 1 << 43, 1 << 20  # of a run; the plan of a million shards takes 1 GB

Index = tuple[int, int, int]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""A part of a volume: (z0, z1), (y0, y1), (x0, x1)."""

Part = Sequence[tuple[int | None, int | None]]
"""A box as it is asked for, along z, y and x; None is where the volume begins or ends."""


@dataclass(frozen=True)
class Layout:
    """How labels are laid out; depends on nothing but the volume's size and scale and the model's grid of tiles.

    Parameters
    ----------
    shapes : of every level, (z, y, x)
    factors : of every level, how many voxels of the finest one of its voxels covers along z, y, x
    shard, chunk : (z, y, x), of every level
    dtype : str
    """

    shapes: tuple[Index, ...]
    factors: tuple[Index, ...]
    shard: Index
    chunk: Index
    dtype: str = "uint8"

    def whole(self, level: int) -> Box:
        """All of a level."""
        return as_box((0, n) for n in self.shapes[level])

    def shards(self, level: int, region: Box) -> Iterator[Index]:
        """Shards of a level that touch a region (in voxels of that level), plane by plane."""
        yield from product(*(range(a // n, -(-b // n)) for (a, b), n in zip(region, self.shard, strict=True)))

    def count(self, level: int, region: Box) -> int:
        """How many shards of a level touch a region."""
        return math.prod(-(-b // n) - a // n for (a, b), n in zip(region, self.shard, strict=True))

    def box(self, level: int, index: Index) -> Box:
        """The voxels that a shard holds."""
        spans = zip(index, self.shard, self.shapes[level], strict=True)
        return as_box((i * n, min((i + 1) * n, length)) for i, n, length in spans)

    def coarser(self, level: int, region: Box) -> Box:
        """A region of the finest level in voxels of another."""
        return as_box((a // f, -(-b // f)) for (a, b), f in zip(region, self.factors[level], strict=True))

    def step(self, level: int) -> Index:
        """How many voxels of the level before one voxel of this covers, along z, y, x."""
        fine = self.factors[level - 1]
        return tuple(a // b for a, b in zip(self.factors[level], fine, strict=True))  # type: ignore[return-value]

    def sources(self, level: int, index: Index) -> list[Index]:
        """The shards of the level before that a shard is made of."""
        step = self.step(level)
        finer = as_box(
            (a * f, min(b * f, n))
            for (a, b), f, n in zip(self.box(level, index), step, self.shapes[level - 1], strict=True)
        )
        return list(self.shards(level - 1, finer))

    def to_json(self) -> dict[str, Any]:
        """What a journal keeps of the layout: a later run must have the same."""
        return {
            "shape": self.shapes[0],
            "levels": len(self.shapes),
            "shard": self.shard,
            "chunk": self.chunk,
            "dtype": self.dtype,
        }


def plan_layout(
    shape: Sequence[int],
    tile: tuple[int, int],
    scale: Sequence[float | None] = (None, None, None),
    *,
    dtype: str = "uint8",
    levels: int | None = None,
    growth: float = 1,
) -> Layout:
    """Shards of whole tiles, of about 8 million voxels; each level halves y and x, and z where it is as fine.

    Parameters
    ----------
    shape : (z, y, x)
    tile : (y, x)
        Inner size of the tiles, a multiple of the model's step.
    scale : (z, y, x)
        Size of a voxel; where it is not known z is not halved.
    levels : int, optional
        How many; by default as many as bring a plane into 512 x 512. (Labels inside an image have as many as it.)
    growth : float
        How many times as many voxels a shard may have.
    """
    depth, height, width = (int(n) for n in shape[:3])
    rows, columns = (min(-(-n // t), max(1, _SIDE // t)) * t for n, t in zip((height, width), tile, strict=True))
    planes = 1 << max(0, int(math.log2(max(1, growth * _SHARD // (rows * columns)))))
    planes = min(planes, 64, 1 << max(0, (depth - 1).bit_length()))
    if _levels(shape, scale, levels)[1][-1][0] > 1:
        planes = max(planes, 2)  # two planes that become one are in one shard
    chunk = (min(planes, 4), _divisor(rows), _divisor(columns))
    return plan_blocks(shape, (planes, rows, columns), chunk, scale, dtype=dtype, levels=levels)


def plan_blocks(
    shape: Sequence[int],
    shard: Index,
    chunk: Index,
    scale: Sequence[float | None] = (None, None, None),
    *,
    dtype: str,
    levels: int | None = None,
) -> Layout:
    """Shards and chunks (z, y, x) as given; the rest as for `plan_layout`.

    Raises
    ------
    SettingsError
        If voxels that become one of the next level could lie in several shards.
    """
    shapes, factors = _levels(shape, scale, levels)
    halved = [any(b[k] > a[k] for a, b in pairwise(factors)) for k in range(3)]
    if any(side < 1 or (side % 2 and is_halved) for side, is_halved in zip(shard, halved, strict=True)):
        raise SettingsError(f"blocks of {shard} voxels (z y x) are not possible; give even numbers, e.g. 64, 256, 256")
    return Layout(tuple(shapes), tuple(factors), shard, chunk, dtype)


def _levels(shape: Sequence[int], scale: Sequence[float | None], levels: int | None) -> tuple[list[Index], list[Index]]:
    """Shapes and factors of a `Layout`."""
    depth, height, width = (int(n) for n in shape[:3])
    shapes, factors = [(depth, height, width)], [(1, 1, 1)]
    while len(shapes) < (levels or (_DEEPEST if max(shapes[-1][1:]) > _SMALLEST else 0)):
        f = factors[-1]
        z, y, x = scale
        halve = z is not None and y is not None and x is not None and z * f[0] <= 1.5 * math.sqrt(y * x) * f[1]
        factors.append((f[0] * 2 if halve and shapes[-1][0] > 1 else f[0], f[1] * 2, f[2] * 2))
        shapes.append(tuple(-(-n // g) for n, g in zip(shapes[0], factors[-1], strict=True)))  # type: ignore[arg-type]
    return shapes, factors


def _divisor(n: int) -> int:
    """The largest divisor that is not larger than a chunk."""
    return n // next(k for k in range(1, n + 1) if n % k == 0 and n // k <= _CHUNK)


def parse_region(text: str) -> Part:
    """Read "z0:z1,y0:y1,x0:x1"; ends may be left out (":50", "10:"), and so may the last axes.

    Raises
    ------
    SettingsError
        If it is no such text.
    """
    spans = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split(":")]
        if not all(end.isdecimal() or not end for end in ends) or (len(ends) != 2 and part.strip()):
            raise SettingsError(f"region {text!r} is not possible; give z0:z1,y0:y1,x0:x1, e.g. 0:100,:,512:1024")
        spans.append((int(ends[0]) if ends[0] else None, int(ends[-1]) if ends[-1] else None))
    if len(spans) > 3:
        raise SettingsError(f"region {text!r} has {len(spans)} axes; give z, y and x")
    return [*spans, *[(None, None)] * (3 - len(spans))]


def box_within(shape: Sequence[int], region: Part | None, name: str) -> Box:
    """A region with all its ends; without one, all of a volume of shape (z, y, x).

    Raises
    ------
    SettingsError
        If it is empty or not within the volume, or has not three spans.
    """
    box = []
    spans = [(None, None)] * 3 if region is None else list(region)
    if len(spans) != 3:
        raise SettingsError(f"region {spans} has {len(spans)} spans; give (start, stop) along z, y and x")
    for axis, (start, stop), length in zip("zyx", spans, shape, strict=True):
        first, last = start or 0, length if stop is None else stop
        if not 0 <= first < last <= length:
            raise SettingsError(f"region {axis} {first}:{last} is empty or outside {name}, 0:{length}")
        box.append((first, last))
    z, y, x = box
    return z, y, x


def check_size(box: Box, shape: Sequence[int], name: str) -> None:
    """Refuse a run that could not end: the metadata of a volume may state any shape.

    Raises
    ------
    SettingsError
        If the box has more than 2^43 voxels.
    """
    voxels = math.prod(stop - start for start, stop in box)
    if voxels > _MOST_VOXELS:
        raise SettingsError(
            f"{name}: {voxels} voxels of shape {tuple(shape)} are wanted, at most {_MOST_VOXELS} are possible in one "
            "run; check its metadata, or take a part of it"
        )


def check_shards(layout: Layout, region: Box, name: str) -> None:
    """Refuse a run whose plan does not fit into memory: that of a long volume of small planes, as metadata may state.

    Raises
    ------
    SettingsError
        If more than 2^20 shards touch the region.
    """
    count = layout.count(0, region)
    if count > _MOST_SHARDS:
        raise SettingsError(
            f"{name}: has the shape {layout.shapes[0]}, and {count} shards {layout.shard} of it are wanted; at most "
            f"{_MOST_SHARDS} are possible in one run; check its metadata, or take a part of it"
        )


def slices(box: Box) -> tuple[slice, slice, slice]:
    """A box for numpy."""
    return slice(*box[0]), slice(*box[1]), slice(*box[2])


def overlap(a: Box, b: Box) -> Box:
    """What two boxes have in common; empty spans where nothing."""
    return as_box((max(p[0], q[0]), max(max(p[0], q[0]), min(p[1], q[1]))) for p, q in zip(a, b, strict=True))


def as_box(spans: Iterator[tuple[int, int]] | Any) -> Box:
    """Three spans (start, stop) along z, y, x as a tuple."""
    z, y, x = spans
    return z, y, x
