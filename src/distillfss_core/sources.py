"""Where the voxels of a volume lie: zarr, TIFF, folders of planes, arrays; each opened without reading voxels."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable
from xml.etree import ElementTree

import numpy as np
import tifffile
import zarr
import zarr.errors
import zarr.storage
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.sync import sync

from distillfss_core.errors import ImageError, InputFileError, SettingsError
from distillfss_core.io import DECODER_FAULTS, READABLE, TIFF_SUFFIXES, read_image
from distillfss_core.types import Array

log = logging.getLogger(__name__)

ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")
_LARGE_TIFFS = (".btf", ".tf8", ".lsm")
LARGE_FILES = (*_LARGE_TIFFS, ".zip")  # opened as volumes, beside what is READABLE
MICROMETRE = "micrometer"
UNITS = {  # of one of them in micrometres
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
_HASHED = 1 << 28  # bytes of an array in memory that are looked at whole
_SIDE = 256  # of a tile of a larger array, or of one that lies elsewhere
_TILES = 8  # of an array that lies elsewhere: each may cost a chunk of it
_CHUNKS = 64  # files of a zarr
_END = 1 << 15  # bytes at the beginning and the end of such a file
FAULTS = (*DECODER_FAULTS, AssertionError, AttributeError, NotImplementedError)


@runtime_checkable
class Source(Protocol):
    """An array of any axes somewhere; ``get`` reads a box of it, one slice an axis, as numpy."""

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]

    def get(self, box: tuple[slice, ...]) -> Array: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Found:
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
    channel_names: tuple[str, ...] = ()
    colour: bool = False  # whether the channels are samples of a colour picture


def is_zarr(folder: Path) -> bool:
    """Whether a folder has the metadata of zarr."""
    return any((folder / name).is_file() for name in ZARR_FILES)


def open_path(path: Path, level: int, axes: str | None, series: int | None) -> Found:
    if not path.exists():
        raise InputFileError(f"{path}: no such file or folder; check the name")
    if path.is_dir():
        if is_zarr(path):
            return _open_zarr(path, level, axes, series)
        if ".zarr" in path.suffixes:
            raise InputFileError(
                f"{path}: has no zarr metadata ({', '.join(ZARR_FILES)}); the copy is not whole, or it is no zarr"
            )
        found = _open_folder(path, axes)
    elif path.suffix.lower() == ".zip":
        return _open_zarr(path, level, axes, series)
    elif path.suffix.lower() in (*TIFF_SUFFIXES, *_LARGE_TIFFS):
        return _open_tiff(path, level, axes, series)
    elif path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise InputFileError(f"{path}: is no single .npy array; save it with numpy.save")
        stat = path.stat()
        found = Found(ArraySource(array, letters_of(axes, array.shape, str(path))), file_identity("npy", stat))
    elif path.suffix.lower() in READABLE:
        image = read_image(path)
        source = ArraySource(image, letters_of(axes or "yxc"[: image.ndim], image.shape, str(path)))
        found = Found(source, file_identity("image", path.stat()), colour=image.ndim == 3)
    else:
        raise InputFileError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'!r}; give OME-Zarr, zarr, TIFF, MRC, NIfTI, "
            "DICOM, .npy or a folder of planes"
        )
    if level:
        raise SettingsError(f"{path}: has no level {level}; it has only level 0")
    return found


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
    found, unit = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        unit /= base
        found += digit * unit
    return found


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


def reason(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:160] or type(fault).__name__


# arrays


class ArraySource:
    """Anything with shape, dtype and numpy's basic indexing."""

    def __init__(self, array: Any, axes: str) -> None:
        self.array, self.axes = array, axes
        self.shape, self.dtype = tuple(int(n) for n in array.shape), np.dtype(array.dtype)
        chunks = getattr(array, "chunksize", None) or getattr(array, "chunks", None)
        if not chunks or not all(isinstance(n, int) for n in chunks):
            chunks = [1 if a in "tz" else n for a, n in zip(axes, self.shape, strict=True)]
        self.chunks = tuple(chunks)

    def get(self, box: tuple[slice, ...]) -> Array:
        return np.asarray(self.array[box])

    def close(self) -> None:
        pass


def open_array(array: Any, axes: str | None) -> Found:
    if isinstance(array, zarr.Array):
        return _from_zarr_array(array, axes, "zarr array")
    if not all(hasattr(array, name) for name in ("shape", "dtype", "__getitem__")):
        raise ImageError(f"a volume is a path or an array with shape and dtype, not {type(array).__name__}")
    source = ArraySource(array, letters_of(axes, array.shape, "array"))
    return Found(source, {"kind": "array"}, partial(_array_content, source))


def _array_content(source: ArraySource) -> str:
    """A digest of the voxels: of all where they are few and in memory, else of tiles of some planes."""
    digest, array = hashlib.sha256(), source.array
    in_memory = isinstance(array, np.ndarray)
    if in_memory and array.nbytes <= _HASHED:
        for part in array:
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()[:16]
    sides = [min(n, _SIDE) if a in "yx" else 1 for a, n in zip(source.axes, source.shape, strict=True)]
    count = _HASHED // (_SIDE * _SIDE * source.dtype.itemsize) if in_memory else _TILES
    for at in spread([-(-n // side) for n, side in zip(source.shape, sides, strict=True)], count):
        starts = [min(i * side, n - side) for i, side, n in zip(at, sides, source.shape, strict=True)]
        tile = source.get(tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))
        digest.update(np.ascontiguousarray(tile).data)
    return digest.hexdigest()[:16]


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
        keys = [self.array.metadata.encode_chunk_key(at) for at in product(*spans)]
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
    keys = [array.metadata.encode_chunk_key(at) for at in spread(grid, _CHUNKS)]

    async def ends() -> list[Any]:
        files = [array.store_path / key for key in keys]
        parts = (RangeByteRequest(0, _END), SuffixByteRequest(_END))
        return await asyncio.gather(*(file.get(byte_range=part) for file in files for part in parts))

    digest = hashlib.sha256()
    for found in sync(ends()):
        digest.update(b"\0" if found is None else hashlib.sha256(found.to_bytes()).digest())
    return digest.hexdigest()[:16]


def _open_zarr(path: Path, level: int, axes: str | None, series: int | None) -> Found:
    store = zarr.storage.ZipStore(path, mode="r") if path.is_file() else path
    node = zarr.open(store, mode="r")
    if isinstance(node, zarr.Array):
        if level:
            raise SettingsError(f"{path}: has no level {level}; it is one array, level 0 (or give the folder above it)")
        return _from_zarr_array(node, axes, str(path))
    attributes = node.attrs.asdict()
    about = attributes.get("ome", attributes)
    if not isinstance(about, dict):
        raise InputFileError(f"{path}: its OME metadata are damaged (no mapping under 'ome')")
    if "plate" in about or "well" in about:
        raise InputFileError(f"{path}: is a plate or well of many images; give the path of one image in it")
    if "multiscales" not in about:
        return _open_bare_group(path, node, about, level, axes, series)
    return _open_multiscale(path, node, about, level, axes, series)


def _open_bare_group(
    path: Path, node: Any, about: dict[str, Any], level: int, axes: str | None, series: int | None
) -> Found:
    """A group that is no multiscale image: a collection of images, or of plain arrays."""
    if "labels" in about:
        raise InputFileError(f"{path}: is a group of labels ({', '.join(map(str, about['labels']))}); give one of them")
    arrays = sorted(name for name, _ in node.arrays())
    groups = sorted(name for name, _ in node.groups())
    if groups and ("bioformats2raw.layout" in about or not arrays):
        images = [name for name in groups if name != "OME"]
        chosen = images[0] if len(images) == 1 else str(series) if series is not None else None
        if chosen in images:
            return _open_zarr(path / str(chosen), level, axes, None)
        raise InputFileError(f"{path}: holds {len(images)} images ({', '.join(images[:8])}); give the path of one")
    if len(arrays) == 1:
        if level:
            raise SettingsError(f"{path}: has no level {level}; it holds one array, level 0")
        return _from_zarr_array(node[arrays[0]], axes, str(path))
    if arrays:
        raise InputFileError(
            f"{path}: has no multiscales metadata and {len(arrays)} arrays ({', '.join(arrays[:8])}); "
            "give the path of one"
        )
    raise InputFileError(f"{path}: holds neither an array nor OME metadata; the copy is not whole, or it is empty")


def _open_multiscale(
    path: Path, node: Any, about: dict[str, Any], level: int, axes: str | None, series: int | None
) -> Found:
    try:
        image = _read_multiscale(path, about, level, axes, series)
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
    digest = hashlib.sha256(json.dumps([about["multiscales"], array.metadata.to_dict()], default=str).encode())
    return Found(
        # Where nothing is, labels have no file.
        _ZarrSource(array, found_axes, str(path), sparse="image-label" in about),
        {"kind": "ome-zarr", "metadata": digest.hexdigest()[:16]},
        partial(_zarr_content, array),
        step=step,
        unit=unit,
        origin=origin,
        levels=tuple(tuple(one.shape) for one in arrays if one is not None),
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
        known = bool(factors) and None not in factors.values()
        step = {a: float(total[axes.index(a)]) * (factors[a] or 1.0 if known else 1.0) for a in spatial}
        origin = {a: float(place[axes.index(a)]) * (factors[a] or 1.0 if known else 1.0) for a in spatial}
        return step, origin, MICROMETRE if known and step else None


def _read_multiscale(
    path: Path, about: dict[str, Any], level: int, axes: str | None, series: int | None
) -> _Multiscale:
    """What the metadata state of one image; damaged ones raise what Python raises."""
    images = about["multiscales"]
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
    channels = (about.get("omero") or {}).get("channels", ()) or ()
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
        found = None
        with suppress(KeyError, *FAULTS):
            found = node[name]
        arrays.append(found if isinstance(found, zarr.Array) else None)
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
    for one in transformations or ():
        if one["type"] == kind and kind in one:
            return [float(v) for v in one[kind]]
    return []


def _from_zarr_array(array: Any, axes: str | None, name: str) -> Found:
    if axes is None:
        names = getattr(array.metadata, "dimension_names", None)
        letters = [str(n).lower() for n in names or ()]
        if letters and all(n in ("t", "c", "z", "y", "x") for n in letters):
            axes = "".join(letters)
    digest = hashlib.sha256(json.dumps(array.metadata.to_dict(), default=str).encode())
    source = _ZarrSource(array, letters_of(axes, array.shape, name), name)
    return Found(source, {"kind": "zarr", "metadata": digest.hexdigest()[:16]}, partial(_zarr_content, array))


# TIFF


class _TiffSource:
    """One resolution of an image in a TIFF file, through tifffile's view of it as zarr.

    tifffile gives zeros for pages and strips that are not there; here that is an error.
    """

    def __init__(self, file: Any, series: Any, level: int, axes: str, name: str) -> None:
        self._file, self._series, self.axes, self.name = file, series.levels[level], axes, name
        self._array: Any = zarr.open_array(series.aszarr(level=level), mode="r")
        self.shape, self.dtype = tuple(self._array.shape), np.dtype(self._array.dtype)
        self.chunks = tuple(self._array.chunks)
        count, self._leading = len(self._series), 0
        while math.prod(self.shape[: self._leading]) < count and self._leading < len(self.shape):
            self._leading += 1
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self.missing: set[str] = set()

    def check_contiguous(self) -> None:
        start, size = self._series.dataoffset, self._file.filehandle.size
        if start is not None and start + self._series.nbytes > size:
            needed = start + self._series.nbytes
            raise InputFileError(f"{self.name}: is cut short ({size} bytes, {needed} needed); copy it again")

    def get(self, box: tuple[slice, ...]) -> Array:
        if self._series.dataoffset is None:
            spans = [range(s.start, s.stop) for s in box[: self._leading]]
            for at in product(*spans):
                self._check_page(int(np.ravel_multi_index(at, self.shape[: self._leading])) if at else 0)
        return np.asarray(self._array[box])

    def _check_page(self, number: int) -> None:
        """Every byte of a page must be in its file."""
        if number in self._checked:
            return
        with self._lock:
            page = self._series[number]
            if page is None:
                raise InputFileError(
                    f"{self.name}: plane {number} is not there; a file of this image is missing, or it is cut short"
                )
            size = page.parent.filehandle.size
            for start, count in zip(page.dataoffsets, page.databytecounts, strict=False):
                if start + count > size:
                    raise InputFileError(
                        f"{self.name}: is cut short at plane {number} ({size} bytes, {start + count} needed); "
                        "copy it again"
                    )
            sparse = sum(1 for n in page.databytecounts if n == 0)
            if sparse and not self.missing:
                log.warning("%s: plane %d has %d empty strips or tiles; they read as zeros", self.name, number, sparse)
            if sparse:
                self.missing.add(str(number))
            self._checked.add(number)

    def close(self) -> None:
        self._file.close()


def _open_tiff(path: Path, level: int, axes: str | None, series: int | None) -> Found:
    with open(path, "rb") as raw:
        _check_pages_chained(raw, path)
    file = tifffile.TiffFile(path)
    try:
        return _from_tiff(file, path, level, axes, series)
    except BaseException:
        file.close()
        raise


def _from_tiff(file: Any, path: Path, level: int, axes: str | None, series: int | None) -> Found:
    images = list(file.series)
    if series is None and len(images) > 1:
        sizes = ", ".join("x".join(map(str, s.shape)) for s in images[:4])
        raise SettingsError(f"{path}: holds {len(images)} images ({sizes}); choose one, series 0 to {len(images) - 1}")
    if not 0 <= (series or 0) < len(images):
        raise SettingsError(f"{path}: has no series {series}; it has {len(images)}")
    chosen = images[series or 0]
    if level >= len(chosen.levels):
        raise SettingsError(f"{path}: has no level {level}; its levels are 0 to {len(chosen.levels) - 1}")
    letters = axes.lower() if axes is not None else _tiff_letters(chosen.levels[level].axes, chosen.shape, path)
    source = _TiffSource(file, chosen, level, letters_of(letters, chosen.levels[level].shape, str(path)), str(path))
    if source.shape != tuple(chosen.levels[level].shape):
        raise InputFileError(f"{path}: its metadata name the shape {chosen.levels[level].shape}, it has {source.shape}")
    source.check_contiguous()
    step, unit, names = _tiff_scale(file, series or 0)
    if step:
        fine = dict(zip(source.axes, chosen.levels[0].shape, strict=False))
        coarse = dict(zip(source.axes, source.shape, strict=True))
        step = {a: s * fine.get(a, 1) / coarse.get(a, 1) for a, s in step.items()}
    return Found(
        source,
        file_identity("tiff", path.stat()) | {"series": series or 0},
        step=step,
        unit=unit,
        levels=tuple(tuple(s.shape) for s in chosen.levels),
        channel_names=names,
        colour="S" in chosen.axes.upper(),
    )


def _tiff_letters(axes: str, shape: Sequence[int], path: Path) -> str:
    """tifffile's letters in ours: samples are channels, a sequence of unknown meaning is z."""
    letters = axes.lower().replace("s", "c")
    unknown = [a for a in letters if a not in "tczyx"]
    if len(unknown) == 1 and "z" not in letters:
        letters = letters.replace(unknown[0], "z")
    elif unknown or len(set(letters)) < len(letters):
        raise SettingsError(
            f"{path}: has axes {axes} {tuple(shape)}; say which they are with axes, one letter of tczyx each"
        )
    return letters


def _tiff_scale(file: Any, series: int) -> tuple[dict[str, float], str | None, tuple[str, ...]]:
    """Voxel size along z, y, x, its unit, and names of channels; as far as the file tells."""
    if file.is_ome and file.ome_metadata:
        return _ome_scale(file.ome_metadata, series)
    if not file.is_imagej:
        return {}, None, ()
    about = file.imagej_metadata or {}
    step: dict[str, float] = {}
    if about.get("spacing"):
        step["z"] = float(about["spacing"])
    for a, tag in (("y", "YResolution"), ("x", "XResolution")):
        found = file.pages[0].tags.get(tag)
        if found is not None and found.value[0] and found.value[1]:
            step[a] = found.value[1] / found.value[0]
    factor = UNITS.get(str(about.get("unit", "")).lower())
    labels = tuple(str(v) for v in about.get("Labels") or ()) if about.get("channels", 1) > 1 else ()
    if factor is None:
        return {a: abs(s) for a, s in step.items() if s}, None, labels
    return {a: abs(s) * factor for a, s in step.items() if s}, MICROMETRE, labels


def _ome_scale(text: str, series: int) -> tuple[dict[str, float], str | None, tuple[str, ...]]:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return {}, None, ()
    pixels = [e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"]
    if series >= len(pixels):
        return {}, None, ()
    about = pixels[series]
    names = tuple(
        e.get("Name") or str(i) for i, e in enumerate(c for c in about if c.tag.rpartition("}")[2] == "Channel")
    )
    step: dict[str, float] = {}
    factors: list[float | None] = []
    for a in "zyx":
        value = about.get(f"PhysicalSize{a.upper()}")
        with suppress(ValueError):
            if value and 0 < float(value) < math.inf:
                unit = about.get(f"PhysicalSize{a.upper()}Unit", "µm")
                step[a] = float(value)
                factors.append(UNITS.get(unit if unit == "m" else unit.lower()))
    if not step or any(f is None for f in factors):
        return step, None, names
    return {a: s * float(f or 1) for (a, s), f in zip(step.items(), factors, strict=True)}, MICROMETRE, names


def _check_pages_chained(file: BinaryIO, path: Path) -> None:
    """Follow the chain of pages to its end: a file that is cut short has a page that is not there.

    Raises
    ------
    InputFileError
        Where tifffile would give fewer pages without a word.
    """
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(f"{order}H", head[2:4])[0] if order and len(head) >= 8 else 0
    if version not in (42, 43):
        raise InputFileError(f"{path}: is no TIFF file, or its beginning is damaged; copy it again")
    big = version == 43
    count_form, entry, next_form = (f"{order}Q", 20, f"{order}Q") if big else (f"{order}H", 12, f"{order}I")
    size = file.seek(0, 2)
    if big and len(head) < 16:
        raise InputFileError(f"{path}: is cut short ({size} bytes); copy it again")
    at = struct.unpack(next_form, head[8:16] if big else head[4:8])[0]
    seen: set[int] = set()
    while at:
        file.seek(at)
        raw = file.read(struct.calcsize(count_form))
        short = len(raw) < struct.calcsize(count_form)
        if not short:
            file.seek(struct.unpack(count_form, raw)[0] * entry, 1)
            raw = file.read(struct.calcsize(next_form))
            short = len(raw) < struct.calcsize(next_form)
        if short or at in seen:
            what = "goes in a circle" if at in seen else "ends"
            raise InputFileError(
                f"{path}: is cut short or damaged: its list of pages {what} after {len(seen)} ({size} bytes); "
                "copy it again"
            )
        seen.add(at)
        at = struct.unpack(next_form, raw)[0]
    if not seen:
        raise InputFileError(f"{path}: holds no page; it was not written to its end")


# a folder of planes


class _FolderSource:
    """Files of one plane each, in natural order of their names."""

    def __init__(self, files: Sequence[Path], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.files, self.shape, self.dtype = files, (len(files), *shape), dtype
        self.axes = "zyxc"[: len(self.shape)]
        self.chunks = (1, *shape)
        self._decode = lru_cache(maxsize=4)(read_image)

    def get(self, box: tuple[slice, ...]) -> Array:
        return np.stack([self._cut(self.files[z], box[1:]) for z in range(box[0].start, box[0].stop)])

    def _cut(self, path: Path, box: tuple[slice, ...]) -> Array:
        with _plane_of(path, self._decode) as plane:
            if plane.shape != self.shape[1:] or plane.dtype != self.dtype:
                raise InputFileError(
                    f"{path}: is {plane.shape} {plane.dtype}, but {self.files[0].name} is {self.shape[1:]} "
                    f"{self.dtype}; the planes of a folder must be alike"
                )
            return plane.get(box)

    def close(self) -> None:
        self._decode.cache_clear()


@contextmanager
def _plane_of(path: Path, decode: Callable[[Path], Array]) -> Iterator[Source]:
    """The plane "y x [c]" in a file; TIFF is read by windows, other kinds are decoded whole."""
    if path.suffix.lower() not in TIFF_SUFFIXES:
        image = decode(path)
        yield ArraySource(image, "yxc"[: image.ndim])
        return
    source = _open_tiff(path, 0, None, 0).source
    try:
        if source.axes not in ("yx", "yxc"):
            raise InputFileError(f"{path}: has axes {source.axes}; a folder of planes holds one plane a file")
        yield source
    finally:
        source.close()


def _open_folder(path: Path, axes: str | None) -> Found:
    files = [f for f in path.iterdir() if f.is_file() and f.suffix.lower() in READABLE and not f.name.startswith(".")]
    if not files:
        raise InputFileError(f"{path}: holds no plane and no zarr; put one image file a plane there")
    files.sort(key=lambda f: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", f.name.lower())])
    with _plane_of(files[0], read_image) as first:
        shape, dtype = first.shape, first.dtype
    source = _FolderSource(files, shape, dtype)
    if axes is not None:
        source.axes = letters_of(axes, source.shape, str(path))
    return Found(source, {"kind": "folder", "files": files_digest(files)}, colour=len(shape) == 3)
