"""Where voxels lie: arrays of any kind behind one protocol; opened, not read."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from distillfss_core.errors import SettingsError
from distillfss_core.io.images import DECODER_ERRORS
from distillfss_core.types import Array

MICROMETER = "micrometer"
UNITS = {  # of one of them in micrometers
    "angstrom": 1e-4,
    "å": 1e-4,
    "nanometer": 1e-3,
    "nm": 1e-3,
    "micrometer": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "\\u00b5m": 1.0,
    "millimeter": 1e3,
    "mm": 1e3,
    "centimeter": 1e4,
    "cm": 1e4,
    "meter": 1e6,
    "m": 1e6,
    "inch": 25400.0,
}
_HEX = 6  # digits of a color
_HASHED = 1 << 28  # bytes of an array in memory that are looked at whole
_SIDE = 256  # of a tile of a larger array, or of one that lies elsewhere
_GLANCE = 32, 256  # side and number of the tiles by which an array is taken for unchanged since it was looked at
_TILES = 8  # of an array that lies elsewhere: each may cost a chunk of it
READ_ERRORS = (*DECODER_ERRORS, AssertionError, AttributeError, NotImplementedError)


@runtime_checkable
class Source(Protocol):
    """An array of any axes somewhere; ``get`` reads a box of it, one slice an axis, as numpy."""

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]

    def get(self, box: tuple[slice, ...]) -> Array:
        """The voxels of a box, of type ``dtype``, in the order of ``axes``."""

    def close(self) -> None:
        """Close files; nothing can be read afterwards."""


@dataclass(frozen=True)
class Channel:
    """A channel as its file describes it.

    Parameters
    ----------
    name : str
        Empty where it has none.
    color : str, optional
        "#rrggbb" of the brightest voxels.
    window : (float, float), optional
        Intensities that are shown black and in full color, in the unit of the voxels.
    """

    name: str = ""
    color: str | None = None
    window: tuple[float, float] | None = None

    @classmethod
    def of(cls, name: Any, color: Any, window: Sequence[Any]) -> Channel:
        """A channel of metadata; a color or window that is damaged is left out."""
        digits = str(color).lstrip("#").lower()
        is_color = len(digits) == _HEX and not set(digits) - set("0123456789abcdef")
        try:
            low, high = (float(v) for v in window)
        except (TypeError, ValueError):
            low = high = 0.0
        is_window = -math.inf < low < high < math.inf
        return cls("" if name is None else str(name), f"#{digits}" if is_color else None,
                   (low, high) if is_window else None)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """What opening found: the array, and what is known about it.

    ``identity`` is what tells it from others without a look at its voxels; where that is not enough ``content`` gives
    a digest of some of them.
    """

    source: Source
    identity: Mapping[str, Any]
    content: Callable[[], str] | None = None
    step: Mapping[str, float] = field(default_factory=dict)  # size of a voxel along "z", "y", "x", as far as known
    unit: str | None = None
    origin: Mapping[str, float] = field(default_factory=dict)  # place of the first voxel, in the unit of the step
    levels: tuple[tuple[int, ...], ...] = ()
    channels: tuple[Channel, ...] = ()
    directions: str = ""  # where in the body z, y and x increase to, e.g. "SPL"; empty where it is not known
    labels: bool = False  # whether it is a label image of OME-Zarr
    color: bool = False  # whether the channels are samples of a color picture

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the channels; the number from 0 where one has none."""
        return tuple(channel.name or str(number) for number, channel in enumerate(self.channels))


def file_identity(kind: str, stat: Any) -> dict[str, Any]:
    """What tells a file from another, without reading it."""
    return {"kind": kind, "bytes": stat.st_size, "modified": stat.st_mtime_ns}


def files_digest(files: Sequence[Path]) -> str:
    """The same of several files."""
    stats = [(file.name, file.stat()) for file in files]
    text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spread(shape: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """At most so many places in a grid of up to five axes, the same ones each time, evenly along every axis.

    They are those of Halton (1960), so no two axes are in step and what lies in the corners is not all that is seen.
    """
    if math.prod(shape) <= count:
        yield from product(*map(range, shape))
        return
    for i in range(1, count + 1):
        yield tuple(int(_mirrored(i, base) * n) for base, n in zip((2, 3, 5, 7, 11), shape, strict=False))


def _mirrored(number: int, base: int) -> float:
    """Its digits in a base, mirrored at the point: 6 in base 2 is 110, then 0.011."""
    fraction, unit = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        unit /= base
        fraction += digit * unit
    return fraction


def letters_of(axes: str | None, shape: Sequence[int], name: str) -> str:
    """The axes given, checked; or those that an array of so many dimensions has."""
    if axes is None:
        if len(shape) not in (2, 3):
            raise SettingsError(
                f"{name}: has {len(shape)} axes {tuple(shape)}, and nothing says which; give axes, one letter of tczyx "
                "each, e.g. zyxc"
            )
        return "zyx"[-len(shape) :]
    axes = axes.lower()
    if set(axes) - set("tczyx") or len(set(axes)) < len(axes) or not {"y", "x"} <= set(axes):
        raise SettingsError(f"axes {axes!r} are not possible; give one letter of tczyx a dimension, y and x among them")
    if len(axes) != len(shape):
        raise SettingsError(f"{name}: axes {axes!r} are {len(axes)}, but it has {len(shape)} dimensions {tuple(shape)}")
    return axes


def reason(error: BaseException) -> str:
    """The message of an error in one line of at most 160 characters; without a message, the name of its type."""
    return " ".join(str(error).split())[:160] or type(error).__name__


# arrays


class ArraySource:
    """Anything with shape, dtype and numpy's basic indexing."""

    def __init__(self, array: Any, axes: str) -> None:
        self.array: Any = array
        self.axes: str = axes
        self.shape: tuple[int, ...] = tuple(int(n) for n in array.shape)
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)
        chunks = getattr(array, "chunksize", None) or getattr(array, "chunks", None)
        if not chunks or not all(isinstance(n, int) for n in chunks):
            chunks = [1 if a in "tz" else n for a, n in zip(axes, self.shape, strict=True)]
        self.chunks: tuple[int, ...] = tuple(chunks)

    def get(self, box: tuple[slice, ...]) -> Array:
        """The voxels of a box as a numpy array, in the order of ``axes``."""
        return np.asarray(self.array[box])

    def close(self) -> None:
        """An array has nothing to close."""


def array_content(source: ArraySource) -> str:
    """A digest of the voxels: of all where they are few and in memory, else of tiles of some planes.

    That of an array in memory is known from the second time on, unless small tiles all over it have changed.
    """
    array = source.array
    if not isinstance(array, np.ndarray):
        return _digest_of(_tiles(source, _SIDE, _TILES))
    number, glance = id(array), _digest_of(_tiles(source, *_GLANCE))
    holder, seen, known = _known.get(number, (None, "", ""))
    if holder is not None and holder() is array and seen == glance:
        return known
    small, count = array.nbytes <= _HASHED, _HASHED // (_SIDE * _SIDE * source.dtype.itemsize)
    digest = _digest_of(array if small else _tiles(source, _SIDE, count))
    _known[number] = weakref.ref(array, lambda _: _known.pop(number, None)), glance, digest
    return digest


_known: dict[int, tuple[weakref.ref[Array], str, str]] = {}  # arrays in memory by `id`: a glance at them, and digest


def _tiles(source: ArraySource, side: int, count: int) -> Iterator[Array]:
    sides = [min(n, side) if a in "yx" else 1 for a, n in zip(source.axes, source.shape, strict=True)]
    for corner in spread([-(-n // side) for n, side in zip(source.shape, sides, strict=True)], count):
        starts = [min(i * side, n - side) for i, side, n in zip(corner, sides, source.shape, strict=True)]
        yield source.get(tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))


def _digest_of(parts: Iterable[Array]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]
