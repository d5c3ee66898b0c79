"""Tiles of a plane: pure geometry, no pixels.

A tile is computed on a larger window, its halo thrown away::

    +---------------------+
    | halo                |      windows start and end at multiples of the step of the PLANE's grid
    |    +-----------+    |      (or at the plane's border), so every backbone grid cell covers the same
    |    |  inner    |    |      pixels however the plane is cut
    |    |           |    |
    |    +-----------+    |      at the plane's border there is no halo: the window ends where the plane ends
    |                     |
    +---------------------+
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Span:
    """One axis of a tile, in half-open pixels: ``inner`` has its labels, ``outer`` is its input."""

    inner: tuple[int, int]
    outer: tuple[int, int]

    @property
    def length(self) -> int:
        """Pixels of the input."""
        return self.outer[1] - self.outer[0]

    @property
    def crop(self) -> slice:
        """Where the inner part lies within the window."""
        return slice(self.inner[0] - self.outer[0], self.inner[1] - self.outer[0])

    def touches(self, start: int, stop: int, *, beyond: bool) -> bool:
        """Whether the labels, or with ``beyond`` the input, have a pixel from ``start`` to ``stop``."""
        first, end = self.outer if beyond else self.inner
        return first < stop and start < end

    def fade(self) -> npt.NDArray[np.float32]:
        """Weights over the window that fade out towards its ends; those of two neighbors add up to one."""
        centers = np.arange(self.length, dtype=np.float32) + 0.5
        weights = np.ones_like(centers)
        for halo, distance in ((self.crop.start, centers), (self.outer[1] - self.inner[1], centers[::-1])):
            if halo:
                weights = weights * np.minimum(distance / (2 * halo), 1)
        return weights


@dataclass(frozen=True)
class Tile:
    """A rectangle of a plane."""

    y: Span
    x: Span

    @property
    def inner(self) -> tuple[slice, slice]:
        """Slices (y, x) of the plane whose labels the tile gives."""
        return slice(*self.y.inner), slice(*self.x.inner)

    @property
    def outer(self) -> tuple[slice, slice]:
        """Slices (y, x) of the plane that the tile reads."""
        return slice(*self.y.outer), slice(*self.x.outer)

    @property
    def area(self) -> int:
        """Pixels that the tile reads."""
        return self.y.length * self.x.length

    @property
    def crop(self) -> tuple[slice, slice]:
        """Slices (y, x) of the inner part within the window."""
        return self.y.crop, self.x.crop


def split_axis(length: int, tile: int, halo: int, step: int, *, alike: bool = False) -> list[Span]:
    """Cut ``length`` pixels into pieces of about ``tile``, each with ``halo`` pixels of context where there are any.

    Parameters
    ----------
    length, tile, halo, step : int
        Pixels. Tile and halo are rounded up to multiples of ``step``; pieces are even in size.
    alike : bool
        Whether all inputs are as long as the longest, but for less than a step: those at the borders have more context.

    Returns
    -------
    list of Span
        Inner parts cover every pixel exactly once, in order.

    Examples
    --------
    >>> split_axis(100, 64, 16, 32)
    [Span(inner=(0, 64), outer=(0, 96)), Span(inner=(64, 100), outer=(32, 100))]
    """
    tile, halo = _round_up(max(tile, 1), step), _round_up(halo, step)
    pieces = max(1, -(-length // tile))
    size = _round_up(-(-length // pieces), step)
    spans = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        spans.append(Span((start, stop), (max(0, start - halo), min(length, stop + halo))))
    if not alike:
        return spans
    window = max(_round_up(span.length, step) for span in spans)
    last = _round_up(length, step) - window
    starts = [min(span.outer[0], last) for span in spans]
    return [Span(span.inner, (start, min(length, start + window))) for span, start in zip(spans, starts, strict=True)]


def largest_window(tile: int, halo: int, step: int) -> int:
    """Side of the window of a tile that has neighbors on both sides."""
    return _round_up(max(tile, 1), step) + 2 * _round_up(halo, step)


def split_plane(shape: tuple[int, int], tile: int, halo: int, step: int) -> Iterator[Tile]:
    """All tiles of a plane of ``shape`` (y, x), row by row."""
    columns = split_axis(shape[1], tile, halo, step)
    for y in split_axis(shape[0], tile, halo, step):
        for x in columns:
            yield Tile(y, x)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
