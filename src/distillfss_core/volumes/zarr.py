"""Zarr and OME-Zarr 0.1 to 0.5 as volumes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.errors
import zarr.storage
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.sync import sync

from distillfss_core.errors import InputFileError, SettingsError
from distillfss_core.types import Array
from distillfss_core.volumes.source import MICROMETER, READ_ERRORS, UNITS, Opened, letters_of, reason, spread

log = logging.getLogger(__name__)

ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")
_CHUNKS = 64  # files of a zarr
_END = 1 << 15  # bytes at the beginning and the end of such a file


def is_zarr(folder: Path) -> bool:
    """Whether a folder has the metadata of zarr."""
    return any((folder / name).is_file() for name in ZARR_FILES)


# zarr


class _ZarrSource:
    """A zarr array; says once in the log when chunks are asked for that have no file, unless it is ``sparse``."""

    def __init__(self, array: Any, axes: str, name: str, *, sparse: bool = False) -> None:
        self.array, self.axes, self.name = array, axes, name
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)
        self.chunks = tuple(array.chunks)
        self._stored = tuple(getattr(array, "shards", None) or array.chunks)  # what has a file of its own
        store = array.store_path.store
        self._root = store.root / array.path if isinstance(store, zarr.storage.LocalStore) and not sparse else None
        self.missing: set[str] = set()
        self._lock = threading.Lock()

    def get(self, box: tuple[slice, ...]) -> Array:
        if self._root is not None:
            self._look_for_missing(box)
        return np.asarray(self.array[box])

    def _look_for_missing(self, box: tuple[slice, ...]) -> None:
        spans = [range(s.start // n, -(-s.stop // n)) for s, n in zip(box, self._stored, strict=True)]
        keys = [self.array.metadata.encode_chunk_key(index) for index in product(*spans)]
        assert self._root is not None
        gone = [key for key in keys if not (self._root / key).exists()]
        with self._lock:
            first = bool(gone) and not self.missing
            self.missing.update(gone)
        if first:
            log.warning(
                "%s: %d of %d chunks asked for have no file; by the zarr standard they hold the fill value %s",
                self.name,
                len(gone),
                len(keys),
                self.array.fill_value,
            )

    def close(self) -> None:
        pass


def _zarr_content(array: Any) -> str:
    """A digest of the beginnings and ends of some of the files that hold an array, as they lie in its store."""
    sizes = getattr(array, "shards", None) or array.chunks
    grid = [-(-n // size) for n, size in zip(array.shape, sizes, strict=True)]
    keys = [array.metadata.encode_chunk_key(index) for index in spread(grid, _CHUNKS)]

    async def ends() -> list[Any]:
        files = [array.store_path / key for key in keys]
        parts = (RangeByteRequest(0, _END), SuffixByteRequest(_END))
        return await asyncio.gather(*(file.get(byte_range=part) for file in files for part in parts))

    digest = hashlib.sha256()
    for hashes in sync(ends()):
        digest.update(b"\0" if hashes is None else hashlib.sha256(hashes.to_bytes()).digest())
    return digest.hexdigest()[:16]


def open_zarr(path: Path, level: int, axes: str | None, series: int | None) -> Opened:
    store = zarr.storage.ZipStore(path, mode="r") if path.is_file() else path
    node = zarr.open(store, mode="r")
    if isinstance(node, zarr.Array):
        if level:
            raise SettingsError(f"{path}: has no level {level}; it is one array, level 0 (or give the folder above it)")
        return from_zarr_array(node, axes, str(path))
    attributes = node.attrs.asdict()
    metadata = attributes.get("ome", attributes)
    if not isinstance(metadata, dict):
        raise InputFileError(f"{path}: its OME metadata are damaged (no mapping under 'ome')")
    if "plate" in metadata or "well" in metadata:
        raise InputFileError(f"{path}: is a plate or well of many images; give the path of one image in it")
    if "multiscales" not in metadata:
        return _open_bare_group(path, node, metadata, level, axes, series)
    return _open_multiscale(path, node, metadata, level, axes, series)


def _open_bare_group(
    path: Path, node: Any, metadata: dict[str, Any], level: int, axes: str | None, series: int | None
) -> Opened:
    """A group that is no multiscale image: a collection of images, or of plain arrays."""
    if "labels" in metadata:
        raise InputFileError(
            f"{path}: is a group of labels ({', '.join(map(str, metadata['labels']))}); give one of them"
        )
    arrays = sorted(name for name, _ in node.arrays())
    groups = sorted(name for name, _ in node.groups())
    if groups and ("bioformats2raw.layout" in metadata or not arrays):
        images = [name for name in groups if name != "OME"]
        chosen = images[0] if len(images) == 1 else str(series) if series is not None else None
        if chosen in images:
            return open_zarr(path / str(chosen), level, axes, None)
        raise InputFileError(f"{path}: holds {len(images)} images ({', '.join(images[:8])}); give the path of one")
    if len(arrays) == 1:
        if level:
            raise SettingsError(f"{path}: has no level {level}; it holds one array, level 0")
        return from_zarr_array(node[arrays[0]], axes, str(path))
    if arrays:
        raise InputFileError(
            f"{path}: has no multiscales metadata and {len(arrays)} arrays ({', '.join(arrays[:8])}); "
            "give the path of one"
        )
    raise InputFileError(f"{path}: holds neither an array nor OME metadata; the copy is not whole, or it is empty")


def _open_multiscale(
    path: Path, node: Any, multiscales: dict[str, Any], level: int, axes: str | None, series: int | None
) -> Opened:
    try:
        image = _read_multiscale(path, multiscales, level, axes, series)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise InputFileError(
            f"{path}: its OME-Zarr metadata are damaged ({type(error).__name__}: {reason(error)})"
        ) from error
    arrays = _arrays_of_levels(node, image.datasets)
    array = arrays[level]
    if array is None:
        raise InputFileError(
            f"{path}: level {level} is named {image.datasets[level]!r} in its metadata, but there is no such array "
            "that can be read; the copy is not whole"
        )
    if not image.fits(array.ndim):
        raise InputFileError(
            f"{path}: its metadata do not fit its array: axes {image.axes}, scale {image.scales[1]}, "
            f"shape {array.shape}"
        )
    found_axes = letters_of(image.axes, array.shape, str(path))
    step, origin, unit = image.place(found_axes)
    if any(not 0 < s < math.inf for s in step.values()):
        raise InputFileError(
            f"{path}: its metadata give an impossible scale {image.scales[1]}; mend it, or give the array"
        )
    digest = hashlib.sha256(json.dumps([multiscales["multiscales"], array.metadata.to_dict()], default=str).encode())
    return Opened(
        # Where nothing is, labels have no file.
        _ZarrSource(array, found_axes, str(path), sparse="image-label" in multiscales),
        {"kind": "ome-zarr", "metadata": digest.hexdigest()[:16]},
        partial(_zarr_content, array),
        step=step,
        unit=unit,
        origin=origin,
        levels=tuple(tuple(level_array.shape) for level_array in arrays if level_array is not None),
        channel_names=image.channels,
    )


@dataclass(frozen=True)
class _Multiscale:
    """One image of the metadata: OME-Zarr 0.1 to 0.5, and what other writers make of it.

    ``scales`` and ``shifts`` are two vectors each: of all levels together, and of the level; empty where there is none.
    """

    axes: str
    units: Mapping[str, str | None]
    datasets: Sequence[str]
    scales: tuple[list[float], list[float]]
    shifts: tuple[list[float], list[float]]
    channels: tuple[str, ...]

    def fits(self, ndim: int) -> bool:
        """Whether there is one axis, and one number of each vector, for every dimension of an array."""
        return len(self.axes) == ndim and all(len(v) in (0, ndim) for v in (*self.scales, *self.shifts))

    def place(self, axes: str) -> tuple[dict[str, float], dict[str, float], str | None]:
        """Voxel size and origin along z, y, x as far as there are, and their unit: micrometers where it is known."""
        if not any(self.scales):
            return {}, {}, None
        ones, zeros = [1.0] * len(axes), [0.0] * len(axes)
        total = np.multiply(self.scales[0] or ones, self.scales[1] or ones)
        place = np.multiply(self.scales[0] or ones, self.shifts[1] or zeros) + (self.shifts[0] or zeros)
        spatial = [a for a in "zyx" if a in axes]
        factors = {a: UNITS.get((self.units.get(a) or "").lower()) for a in spatial}
        has_scale = bool(factors) and None not in factors.values()
        step = {a: float(total[axes.index(a)]) * (factors[a] or 1.0 if has_scale else 1.0) for a in spatial}
        origin = {a: float(place[axes.index(a)]) * (factors[a] or 1.0 if has_scale else 1.0) for a in spatial}
        return step, origin, MICROMETER if has_scale and step else None


def _read_multiscale(
    path: Path, metadata: dict[str, Any], level: int, axes: str | None, series: int | None
) -> _Multiscale:
    """What the metadata state of one image; damaged ones raise what Python raises."""
    images = metadata["multiscales"]
    if series is not None and not 0 <= series < len(images):
        raise SettingsError(f"{path}: has no series {series}; choose 0 to {len(images) - 1}")
    image = images[series or 0]
    datasets = [(str(d["path"]), d.get("coordinateTransformations", ())) for d in image["datasets"]]
    named = image.get("axes") or [*"tczyx"]
    letters = "".join(_axis_letter(a) for a in named)
    units = {letter: _unit_of(a) for letter, a in zip(letters, named, strict=False)}
    if axes is None and (len(set(letters)) < len(letters) or "?" in letters):
        names = [a.get("name") if isinstance(a, dict) else a for a in named]
        raise SettingsError(f"{path}: has axes {names}; say which they are with axes, one letter of tczyx each")
    if not 0 <= level < len(datasets):
        raise SettingsError(f"{path}: has no level {level}; its levels are 0 to {len(datasets) - 1}")
    whole, own = image.get("coordinateTransformations", ()), datasets[level][1]
    channels = (metadata.get("omero") or {}).get("channels", ()) or ()
    return _Multiscale(
        letters if axes is None else axes.lower(),
        units,
        [name for name, _ in datasets],
        (_vector(whole, "scale"), _vector(own, "scale")),
        (_vector(whole, "translation"), _vector(own, "translation")),
        tuple(str(c.get("label", i)) for i, c in enumerate(channels)),
    )


def _arrays_of_levels(node: Any, names: Sequence[str]) -> list[Any]:
    """The array of each level; None where there is none that can be read."""
    arrays: list[Any] = []
    for name in names:
        array = None
        with suppress(KeyError, *READ_ERRORS):
            array = node[name]
        arrays.append(array if isinstance(array, zarr.Array) else None)
    return arrays


def _axis_letter(axis: Any) -> str:
    """The letter of an axis of the metadata; "?" where it has none."""
    name = str(axis["name"] if isinstance(axis, dict) else axis).lower()
    if name in ("t", "c", "z", "y", "x"):
        return name
    kind = axis.get("type") if isinstance(axis, dict) else None
    return {"time": "t", "channel": "c"}.get(str(kind), "?")


def _unit_of(axis: Any) -> str | None:
    unit = axis.get("unit") if isinstance(axis, dict) else None
    return str(unit) if unit else None


def _vector(transformations: Any, kind: str) -> list[float]:
    """The vector of the first transformation of a kind, "scale" or "translation"; empty if there is none."""
    for transformation in transformations or ():
        if transformation["type"] == kind and kind in transformation:
            return [float(v) for v in transformation[kind]]
    return []


def from_zarr_array(array: Any, axes: str | None, name: str) -> Opened:
    if axes is None:
        names = getattr(array.metadata, "dimension_names", None)
        letters = [str(n).lower() for n in names or ()]
        if letters and all(n in ("t", "c", "z", "y", "x") for n in letters):
            axes = "".join(letters)
    digest = hashlib.sha256(json.dumps(array.metadata.to_dict(), default=str).encode())
    source = _ZarrSource(array, letters_of(axes, array.shape, name), name)
    return Opened(source, {"kind": "zarr", "metadata": digest.hexdigest()[:16]}, partial(_zarr_content, array))
