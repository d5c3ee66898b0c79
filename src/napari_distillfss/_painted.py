"""The array of painted labels that a Labels layer edits: zarr on disk, with the plane under the brush in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

import distillfss_core as core

_CHUNK = 512

_Span = tuple[int, int]


class PaintedArray:
    """Painted labels (uint8) of a volume on disk, made when something is first written.

    For every dab of a brush napari reads the pixels under it, writes them, and indexes the first axis to know the data
    type. In zarr each takes milliseconds, and the first index of a series is a whole stack. So the plane that is being
    painted is in memory, and an index of the first axis is read when its values are needed.

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
        self._array: Any = zarr.open_array(path, mode="r+") if path.is_dir() else None
        self.shape, self.ndim, self.size = shape, len(shape), math.prod(shape)
        self.is_written_later = False  # whether `write` is called after every change, by whoever makes them
        self._held: tuple[int, ...] | None = None  # index of the plane in memory
        self._plane: npt.NDArray[np.uint8] = np.zeros((0, 0), np.uint8)
        self._changed: tuple[_Span, _Span] | None = None  # rows and columns that are not written
        self._lock = RLock()  # jobs read and write in other threads

    @property
    def is_on_disk(self) -> bool:
        return self._array is not None

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
                if index == self._held or not is_whole:
                    return self._hold(index)[inside].copy()
            self.write()
            return np.zeros(self.shape, np.uint8)[key] if self._array is None else np.asarray(self._array[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        """Change labels.

        Raises
        ------
        core.OutputError
            If they cannot be written.
        """
        with self._lock:
            found = self._plane_of(key)
            if found is None:
                self.write()
                self._held = None
                self._write(key, value)
                return
            index, inside = found
            self._hold(index)[inside] = value
            self._mark(inside[-2:])
            if not self.is_written_later:
                self.write()

    def write(self) -> None:
        """Write what is changed in memory only.

        Raises
        ------
        core.OutputError
            If that is not possible; it is still in memory.
        """
        with self._lock:
            if self._changed is not None and self._held is not None:
                box = tuple(slice(*span) for span in self._changed)
                self._write((*self._held, *box), self._plane[box])
                self._changed = None

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
            raise core.OutputError(
                f"annotations cannot be kept in {self._path.parent}: {error.strerror or error}"
            ) from error

    def _plane_of(self, key: Any) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
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

    def _hold(self, index: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Plane of an index, in memory."""
        if index != self._held:
            self.write()
            self._plane = np.zeros(self.shape[-2:], np.uint8)
            if self._array is not None:
                self._plane[...] = self._array[index]
            self._held = index
        return self._plane

    def _mark(self, inside: tuple[Any, ...]) -> None:
        """Note that a part of the plane in memory is changed."""
        rows, columns = (_span(part, n) for part, n in zip(inside, self.shape[-2:], strict=True))
        if rows and columns:
            before = self._changed or (rows, columns)
            self._changed = _union(before[0], rows), _union(before[1], columns)


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
