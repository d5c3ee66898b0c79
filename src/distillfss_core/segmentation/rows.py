"""Blocks of a volume that follow one another along x: what two of them share is read once.

::

    chunks    |       |       |       |       |
    block n   [===============]                   read up to the end of its last chunk,
    block n+1          [===============]          whose columns are kept; only the rest is read

Without this, the chunks under a halo are decoded for each block that needs a part of them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from distillfss_core.types import Array
from distillfss_core.volumes.volume import Volume

_KEPT = 1 << 25  # bytes of columns that are kept at most


@dataclass(frozen=True, eq=False)
class _Kept:
    """Columns from ``start`` on, of some planes and rows."""

    place: tuple[int, int, int, int]
    start: int
    voxels: Array

    @property
    def stop(self) -> int:
        return self.start + int(self.voxels.shape[2])


class RowReader:
    """Reads blocks of a volume, one at a time, and keeps the columns that the next block along x may need.

    Parameters
    ----------
    volume : Volume
    """

    def __init__(self, volume: Volume) -> None:
        self.volume: Volume = volume
        self._kept: _Kept | None = None
        self._halo = 0
        self._lock = threading.Lock()

    def read(self, z: slice, y: slice, x: slice, end: int) -> Array:
        """Voxels (z, y, x[, c]), as `Volume.read` gives them.

        Parameters
        ----------
        end : int
            Where the inner part of the block ends along x. The next block begins there, with a halo no wider than those
            of the blocks before; a wider one is read anew.
        """
        with self._lock:
            columns, chunk = self.volume.shape[2], self.volume.chunks[2]
            stop = min(columns, -(-x.stop // chunk) * chunk)
            self._halo = max(self._halo, x.stop - end)
            start = max(x.start, end - self._halo)
            nbytes = (z.stop - z.start) * (y.stop - y.start) * (stop - start) * self._voxel_bytes
            if nbytes > _KEPT:
                stop = x.stop
            place, kept = (z.start, z.stop, y.start, y.stop), self._kept
            self._kept = None
            if kept and kept.place == place and kept.start <= x.start < kept.stop:
                parts = [kept.voxels[:, :, x.start - kept.start :]]
                if kept.stop < stop:
                    parts.append(self.volume.read(z, y, slice(kept.stop, stop)))
                block = np.concatenate(parts, axis=2)
            else:
                block = self.volume.read(z, y, slice(x.start, stop))
            if nbytes <= _KEPT and end < columns:
                self._kept = _Kept(place, start, block[:, :, start - x.start :].copy())
            inside: Array = block[:, :, : x.stop - x.start]
            return inside

    @property
    def _voxel_bytes(self) -> int:
        channels = self.volume.shape[3] if self.volume.ndim == 4 else 1
        return int(self.volume.dtype.itemsize) * channels
