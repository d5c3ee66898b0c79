"""The array of painted labels that a Labels layer edits: zarr on disk, with the plane under the brush in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

import distillfss_core as core

_CHUNK = 512

_Index = tuple[int, ...]
_Span = tuple[int, int]


@dataclass
class _Unwritten:
    """A plane that is changed in memory: rows and columns that are not on disk, and how often they were changed."""

    plane: npt.NDArray[np.uint8]
    box: tuple[_Span, _Span]
    changes: int = 1


class PaintedArray:
    """Painted labels (uint8) of a volume on disk, made when something is first written.

    For every dab of a brush napari reads the pixels under it, writes them, and indexes the first axis to know the data
    type. In zarr each takes milliseconds, and the first index of a series is a whole stack. So the plane that is being
    painted is in memory, and an index of the first axis is read when its values are needed.

    Planes that cannot be written, as on a full disk, stay in memory until they can.

    Parameters
    ----------
    path : path
        Of the zarr array; one that is there is taken up.
    shape : tuple of int
        (..., y, x).
    made : function, optional
        Called when the array was made on disk.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, shape: tuple[int, ...], made: Callable[[], object] = lambda: None) -> None:
        self._path, self._made = path, made
        is_there = (path / "zarr.json").is_file()  # a folder alone is what a full disk has left
        self._array: Any = zarr.open_array(path, mode="r+") if is_there else None
        self.shape, self.ndim, self.size = shape, len(shape), math.prod(shape)
        self.is_written_later = False  # whether `write` is called after every change, by whoever makes them
        self._held: _Index | None = None  # index of the plane in memory
        self._plane: npt.NDArray[np.uint8] = np.zeros((0, 0), np.uint8)
        self._changed: dict[_Index, _Unwritten] = {}
        self._lock = RLock()  # jobs read and write in other threads

    @property
    def is_on_disk(self) -> bool:
        return self._array is not None

    @property
    def in_memory_only(self) -> Mapping[_Index, int]:
        """Indices of the planes that are not on disk as they are here, and how often each was changed."""
        with self._lock:
            return {index: unwritten.changes for index, unwritten in self._changed.items()}

    def take_over(self, other: PaintedArray) -> None:
        """Take over the planes that another array of the same labels could not write."""
        with self._lock:
            self._changed.update(other._changed)
            self._held = None

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self[...], dtype)

    def __deepcopy__(self, memo: Any) -> npt.NDArray[np.uint8]:
        """Labels of their own, as a duplicate of a layer has; planes without labels take no memory."""
        labels = np.zeros(self.shape, np.uint8)
        for index in np.ndindex(*self.shape[:-2]):
            plane = self[(*index, slice(None), slice(None))]
            if plane.any():
                labels[index] = plane
        return labels

    def __getitem__(self, key: Any) -> Any:
        if self.ndim > 2 and isinstance(key, int):
            return _Part(self, key)
        with self._lock:
            found = self._plane_of(key)
            if found is not None:
                index, inside = found
                is_whole = inside[-2:] == (slice(None), slice(None))
                if index == self._held or index in self._changed or not is_whole:
                    return self._hold(index)[inside].copy()
            self.try_to_write()
            if not self._changed:
                return np.zeros(self.shape, np.uint8)[key] if self._array is None else np.asarray(self._array[key])
            labels = np.zeros(self.shape, np.uint8) if self._array is None else np.asarray(self._array[...])
            for index, unwritten in self._changed.items():
                labels[index] = unwritten.plane
            return labels[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Change labels.

        Raises
        ------
        core.OutputError
            If they cannot be written.
        """
        with self._lock:
            found = self._plane_of(key)
            if found is not None:
                index, inside = found
                self._hold(index)[inside] = value
                self._mark(index, inside[-2:])
            else:
                try:
                    self.write()
                    self._held = None
                    self._write(key, value)
                except core.OutputError:
                    if not (self._set_box(key, value) or self._set_points(key, value)):
                        raise
            if not self.is_written_later:
                self.write()

    def _set_points(self, key: Any, value: Any) -> bool:
        """Set pixels whose places are an array for each axis, as an undo does, in memory. Returns whether they are."""
        if not isinstance(key, tuple) or len(key) != self.ndim or any(np.ndim(part) != 1 for part in key):
            return False
        *lead, rows, columns = (np.asarray(part) for part in key)
        values = np.broadcast_to(value, rows.shape)
        planes = np.ravel_multi_index(tuple(lead), self.shape[:-2]) if lead else np.zeros(rows.shape, int)
        for plane in np.unique(planes):
            those = planes == plane
            index = tuple(int(n) for n in np.unravel_index(plane, self.shape[:-2])) if lead else ()
            self._take(index)[rows[those], columns[those]] = values[those]
            self._mark(index, (slice(None), slice(None)))
        return True

    def _set_box(self, key: Any, value: Any) -> bool:
        """Set a box of several planes, as a brush of three dimensions does, in memory. Returns whether it is one."""
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, (int, np.integer, slice)) for part in parts):
            return False
        parts = (*parts, *(slice(None),) * (self.ndim - len(parts)))
        places = [range(n)[part] for part, n in zip(parts, self.shape, strict=True)]
        values = np.broadcast_to(value, [len(p) for p in places if isinstance(p, range)])
        for offset in np.ndindex(*(len(p) for p in places[:-2] if isinstance(p, range))):
            steps = iter(offset)
            index = tuple(p[next(steps)] if isinstance(p, range) else p for p in places[:-2])
            self._take(index)[parts[-2:]] = values[offset]
            self._mark(index, parts[-2:])
        return True

    def write(self) -> None:
        """Write what is changed in memory only.

        Raises
        ------
        core.OutputError
            If that is not possible; it is still in memory.
        """
        with self._lock:
            for index, unwritten in list(self._changed.items()):
                box = tuple(slice(*span) for span in unwritten.box)
                self._write((*index, *box), unwritten.plane[box])
                del self._changed[index]

    def try_to_write(self) -> None:
        """Write what is in memory only, if that is possible."""
        with suppress(core.OutputError):
            self.write()

    def _write(self, key: Any, value: Any) -> None:
        try:
            if self._array is None:
                side = [1] * (self.ndim - 2) + [min(_CHUNK, n) for n in self.shape[-2:]]
                self._array = zarr.create_array(
                    self._path, shape=self.shape, chunks=tuple(side), dtype="uint8", fill_value=0
                )
                self._made()
            self._array[key] = value
        except OSError as error:
            folder = self._path.parent.name
            raise core.OutputError(
                f"annotations cannot be kept in {folder}: {error.strerror or error}; they are in memory only until "
                "it can be written"
            ) from error

    def _plane_of(self, key: Any) -> tuple[_Index, tuple[Any, ...]] | None:
        """Index of the plane in which a key lies, and the key within it; None if it is of several, or of arrays."""
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, (int, np.integer, slice)) for part in parts):
            return None
        parts = (*parts, *(slice(None),) * (self.ndim - len(parts)))
        index, kept = [], 0
        for part, n in zip(parts[:-2], self.shape, strict=False):
            places = range(n)[part]
            if isinstance(places, range):
                if len(places) != 1:
                    return None
                kept += 1
                places = places[0]
            index.append(places)
        return tuple(index), (*(None,) * kept, *parts[-2:])

    def _hold(self, index: _Index) -> npt.NDArray[np.uint8]:
        """Plane of an index, in memory; what is changed elsewhere is written before, if that is possible."""
        if index != self._held:
            self.try_to_write()
        return self._take(index)

    def _take(self, index: _Index) -> npt.NDArray[np.uint8]:
        """Plane of an index, in memory."""
        if index != self._held:
            if index in self._changed:
                self._plane = self._changed[index].plane
            else:
                self._plane = np.zeros(self.shape[-2:], np.uint8)
                if self._array is not None:
                    self._plane[...] = self._array[index]
            self._held = index
        return self._plane

    def _mark(self, index: _Index, inside: tuple[Any, ...]) -> None:
        """Note that a part of the plane in memory is changed."""
        rows, columns = (_span(part, n) for part, n in zip(inside, self.shape[-2:], strict=True))
        if rows and columns:
            before = self._changed.get(index)
            if before is None:
                self._changed[index] = _Unwritten(self._plane, (rows, columns))
            else:
                before.box = _union(before.box[0], rows), _union(before.box[1], columns)
                before.changes += 1


def _span(part: int | slice, n: int) -> _Span | None:
    """First and last plus one of the places of a key along an axis; None if there is none."""
    places = range(n)[part]
    if isinstance(places, int):
        return places, places + 1
    return (min(places), max(places) + 1) if places else None


def _union(a: _Span, b: _Span) -> _Span:
    return min(a[0], b[0]), max(a[1], b[1])


class _Part:
    """One index of the first axis of an array, read when its values are needed."""

    def __init__(self, array: PaintedArray, index: int) -> None:
        self._array, self._index = array, range(len(array))[index]
        self.dtype, self.shape, self.ndim = array.dtype, array.shape[1:], array.ndim - 1

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self[...], dtype)

    def __getitem__(self, key: Any) -> Any:
        return self._array[(self._index, *(key if isinstance(key, tuple) else (key,)))]
