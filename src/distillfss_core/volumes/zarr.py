"""Zarr and OME-Zarr 0.1 to 0.5 as volumes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
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
from distillfss_core.volumes.remote import Address, RemoteStore
from distillfss_core.volumes.source import MICROMETER, READ_ERRORS, UNITS, Channel, Opened, letters_of, reason, spread

log: logging.Logger = logging.getLogger(__name__)

ZarrName = Path | Address
"""Where a zarr lies, for messages; "/" appends a part."""

ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")
_CHUNKS = 64  # files of a zarr
_MANY_CHUNKS = 10_000
_SPARSE = 1000  # so many times more chunks are stated than have a file
_SETTLED = 5.0  # seconds in which chunks that are being read end
_END = 1 << 15  # bytes at the beginning and the end of such a file


def is_zarr(folder: Path) -> bool:
    """Whether a folder has the metadata of zarr."""
    return any((folder / name).is_file() for name in ZARR_FILES)


# zarr


class _ZarrSource:
    """A zarr array; warns once of chunks that were read and have no file, unless it is ``sparse``."""

    def __init__(self, array: Any, axes: str, name: str, *, sparse: bool = False) -> None:
        self.array, self.axes, self.name = array, axes, name
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)
        self.chunks = tuple(array.chunks)
        self._stored = tuple(getattr(array, "shards", None) or array.chunks)  # what has a file of its own
        self._size_of, self._sparse = _stored_sizes(array), sparse
        self.missing: set[str] = set()
        self._lock = threading.Lock()

    def get(self, box: tuple[slice, ...]) -> Array:
        voxels = _read_box(self.array, box)
        if self._size_of is not None:
            self._look_for_missing(box, self._size_of)
        return voxels

    def _look_for_missing(self, box: tuple[slice, ...], size_of: Callable[[str], int | None]) -> None:
        spans = [range(s.start // n, -(-s.stop // n)) for s, n in zip(box, self._stored, strict=True)]
        keys = [self.array.metadata.encode_chunk_key(index) for index in product(*spans)]
        sizes = {key: size_of(key) for key in keys}
        empty = next((key for key, size in sizes.items() if size == 0), None)
        if empty is not None:  # zarr takes an empty shard for fill values
            raise InputFileError(f"{self.name}: the file of chunk {empty} is empty; copy it again")
        gone = [] if self._sparse else [key for key, size in sizes.items() if size is None]
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
        store = self.array.store_path.store
        if isinstance(store, zarr.storage.ZipStore) and store.read_only:  # one to write to is the caller's
            store.close()


def _stored_sizes(array: Any) -> Callable[[str], int | None] | None:
    """Bytes of the file of a chunk, by its key; None where there is none. No function for other stores.

    At an address the size of what was read is not known, and 1 stands for it.
    """
    store = array.store_path.store
    if isinstance(store, zarr.storage.LocalStore):
        root = store.root / array.path
        return lambda key: _size_of(root / key)
    if isinstance(store, RemoteStore):
        return lambda key: None if f"{array.path}/{key}".lstrip("/") in store.absent else 1
    if isinstance(store, zarr.storage.ZipStore):
        with zipfile.ZipFile(store.path) as file:
            sizes = {entry.filename: entry.file_size for entry in file.infolist()}
        return lambda key: sizes.get(f"{array.path}/{key}".lstrip("/"))
    return None


def _size_of(file: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_box(array: Any, box: tuple[slice, ...]) -> Array:
    """A box of an array; where a chunk is damaged, the other chunks are waited for, so that none fails unheard."""
    try:
        return np.asarray(array[box])
    except Exception:
        sync(_settle())
        raise


async def _settle() -> None:
    """Wait for the chunks that are being read, and take their errors; those of whole reads belong to others."""
    tasks = [t for t in asyncio.all_tasks() if getattr(t.get_coro(), "__name__", "") != "_runner"]
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=_SETTLED)
        for task in done:
            if not task.cancelled():
                task.exception()


def _warn_of_sparse(array: Any, name: str) -> None:
    """Name an array of which hardly a chunk has a file: its metadata may state a wrong size."""
    store = array.store_path.store
    stored = getattr(array, "shards", None) or array.chunks
    stated = math.prod(-(-n // size) for n, size in zip(array.shape, stored, strict=True))
    if stated < _MANY_CHUNKS or not isinstance(store, zarr.storage.LocalStore):
        return
    limit = min(stated // _SPARSE, _MANY_CHUNKS)
    held = sum(1 for _ in islice((f for _, _, files in os.walk(store.root / array.path) for f in files), limit + 1))
    if held <= limit and held < stated // _SPARSE:
        log.warning(
            "%s: states the shape %s, which is %d voxels in %d chunks, and at most %d of them have a file; check its "
            "metadata, the rest is read as the fill value",
            name,
            tuple(array.shape),
            math.prod(array.shape),
            stated,
            held,
        )


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


def open_zarr(
    path: ZarrName, level: int, axes: str | None, series: int | None, place: ZarrPlace | None = None
) -> Opened:
    """Open an array or an image; ``place`` is where it lies, unless it is the folder ``path``."""
    place = place or ZarrPlace(path)
    node = place.open()
    if isinstance(node, zarr.Array):
        if level:
            raise SettingsError(f"{path}: has no level {level}; it is one array, level 0 (or give the folder above it)")
        return from_zarr_array(node, axes, str(path))
    metadata = _ome_metadata(node, path)
    if "plate" in metadata:
        fields = list_images(path, place)
        raise InputFileError(
            f"{path}: is a plate of {len(metadata['plate'].get('wells', ()))} wells; give one of its images, e.g. "
            f"{path / fields[0] if fields else path / 'A' / '1' / '0'}, or the plate to distillfss batch"
        )
    if "well" in metadata:
        return _open_one_of(path, place, list_images(path, place), level, axes, series, "a well of")
    if "multiscales" not in metadata:
        images = _series(place, node) if "bioformats2raw.layout" in metadata else []
        if images:
            return _open_one_of(path, place, images, level, axes, series, "a collection of")
        return _open_bare_group(path, place, node, metadata, level, axes, series)
    return _open_multiscale(path, node, metadata, level, axes, series)


@dataclass(frozen=True)
class ZarrPlace:
    """Where a zarr lies: a store as zarr takes it, and the path in it."""

    store: Any
    inside: str = ""

    def __truediv__(self, name: str) -> ZarrPlace:
        return ZarrPlace(self.store, f"{self.inside}/{name}".lstrip("/"))

    def open(self) -> Any:
        """The array or group, by the metadata of each part: consolidated ones may be older than what is there."""
        return zarr.open(self.store, path=self.inside, mode="r", use_consolidated=False)


def zip_place(path: Path, inside: str = "") -> ZarrPlace:
    """The zarr in a zip file: at its root, or in the one folder in it that is a zarr.

    Raises
    ------
    InputFileError
        If the file is damaged, or holds no zarr, or several.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if not name.startswith("__MACOSX/")]
    except zipfile.BadZipFile as error:
        raise InputFileError(f"{path}: is no zip file, or cut short ({reason(error)}); copy it again") from error
    folders = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in ZARR_FILES}
    roots = [folder for folder in sorted(folders) if not any(_above(folder, other) for other in folders)]
    if inside:
        parent = next((root for root in ("", *roots) if f"{root}/{inside}".lstrip("/") in folders), None)
        if parent is None:
            raise InputFileError(f"{path}: has no zarr {inside!r} in it; it holds {', '.join(roots[:8]) or 'none'}")
        return ZarrPlace(zarr.storage.ZipStore(path, mode="r"), f"{parent}/{inside}".lstrip("/"))
    if len(roots) > 1:
        raise InputFileError(f"{path}: holds {len(roots)} zarrs ({', '.join(roots[:8])}); give {path / roots[0]}, ...")
    if not roots:
        kinds = ", ".join(sorted({Path(name).suffix for name in names if Path(name).suffix})[:5]) or "no files"
        advice = "save the regions of interest as a mask (TIFF or PNG)" if ".roi" in kinds else "unpack it"
        raise InputFileError(f"{path}: holds no zarr ({kinds}); {advice}")
    return ZarrPlace(zarr.storage.ZipStore(path, mode="r"), roots[0])


def _above(folder: str, other: str) -> bool:
    """Whether another folder of a zip file holds this one."""
    return folder != other and (not other or folder.startswith(f"{other}/"))


def list_images(path: ZarrName, place: ZarrPlace | None = None) -> list[str]:
    """Paths of the images in a plate, a well or a collection of bioformats2raw, in order; none for one image.

    A well that the plate lists but that is not there stands for itself.

    Raises
    ------
    InputFileError
        If the metadata are damaged.
    """
    place = place or ZarrPlace(path)
    try:
        node = place.open()
        metadata = {} if isinstance(node, zarr.Array) else _ome_metadata(node, path)
        if "plate" in metadata:
            wells = [str(well["path"]) for well in metadata["plate"]["wells"]]
            return [image for well in wells for image in _images_of_well(place, well)]
        if "well" in metadata:
            return [str(image["path"]) for image in metadata["well"]["images"]]
        if "bioformats2raw.layout" in metadata and "multiscales" not in metadata:
            return _series(place, node)
    except READ_ERRORS as error:
        if isinstance(error, InputFileError):
            raise
        raise InputFileError(
            f"{path}: the metadata of its wells or images are damaged ({type(error).__name__}: {reason(error)})"
        ) from error
    return []


def _series(place: ZarrPlace, node: Any) -> list[str]:
    """The images of a collection of bioformats2raw: as its metadata list them, else all groups by number."""
    try:
        listed = (place / "OME").open().attrs.asdict()
        return [str(name) for name in listed.get("ome", listed)["series"]]
    except InputFileError:
        raise
    except READ_ERRORS:  # an older collection, which lists nothing
        pass
    return sorted((name for name in _members(place, node)[1] if name != "OME"), key=lambda n: (len(n), n))


def _members(place: ZarrPlace, node: Any) -> tuple[list[str], list[str]]:
    """Names of the arrays and groups in a group; of one at an address, as far as consolidated metadata list them."""
    if isinstance(place.store, RemoteStore):
        node = zarr.open_group(place.store, path=place.inside, mode="r")
        if node.metadata.consolidated_metadata is None:
            raise InputFileError(
                f"{place.store.address}: holds several images or arrays, and the server does not list them; give the "
                "address of one"
            )
    return sorted(name for name, _ in node.arrays()), sorted(name for name, _ in node.groups())


def _images_of_well(place: ZarrPlace, well: str) -> list[str]:
    with suppress(FileNotFoundError):
        node = (place / well).open()
        metadata = node.attrs.asdict()
        images = metadata.get("ome", metadata)["well"]["images"]
        return [f"{well}/{image['path']}" for image in images]
    return [well]


def _ome_metadata(node: Any, path: ZarrName) -> dict[str, Any]:
    attributes = node.attrs.asdict()
    metadata = attributes.get("ome", attributes)
    if not isinstance(metadata, dict):
        raise InputFileError(f"{path}: its OME metadata are damaged (no mapping under 'ome')")
    return metadata


def _open_one_of(
    path: ZarrName, place: ZarrPlace, images: Sequence[str], level: int, axes: str | None, series: int | None, what: str
) -> Opened:
    """The one image of several that is meant by its number or because it is the only one."""
    if series is not None and not 0 <= series < len(images):
        raise SettingsError(f"{path}: has no series {series}; it is {what} {len(images)} images")
    if series is None and len(images) != 1:
        listed = ", ".join(images[:8]) + (", ..." if len(images) > 8 else "")
        raise InputFileError(
            f"{path}: is {what} {len(images)} images ({listed}); give the path of one, e.g. {path / images[0]}"
            if images
            else f"{path}: is {what} no image; the copy is not whole"
        )
    chosen = images[series or 0]
    return open_zarr(path / chosen, level, axes, None, place / chosen)


def _open_bare_group(
    path: ZarrName,
    place: ZarrPlace,
    node: Any,
    metadata: dict[str, Any],
    level: int,
    axes: str | None,
    series: int | None,
) -> Opened:
    """A group that is no multiscale image: a collection of images, or of plain arrays."""
    if "labels" in metadata:
        raise InputFileError(
            f"{path}: is a group of labels ({', '.join(map(str, metadata['labels']))}); give one of them"
        )
    arrays, groups = _members(place, node)
    if groups and not arrays:
        images = [name for name in groups if name != "OME"]
        if series is not None and str(series) in images:
            images = [str(series)]
        if len(images) != 1:
            raise InputFileError(f"{path}: holds {len(images)} images ({', '.join(images[:8])}); give the path of one")
        return open_zarr(path / images[0], level, axes, None, place / images[0])
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
    path: ZarrName, node: Any, multiscales: dict[str, Any], level: int, axes: str | None, series: int | None
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
    letters = letters_of(image.axes, array.shape, str(path))
    step, origin, unit = image.place(letters)
    if any(not 0 < s < math.inf for s in step.values()):
        raise InputFileError(
            f"{path}: its metadata give an impossible scale {image.scales[1]}; mend it, or give the array"
        )
    if "image-label" not in multiscales:
        _warn_of_sparse(array, str(path))
    digest = hashlib.sha256(json.dumps([multiscales["multiscales"], array.metadata.to_dict()], default=str).encode())
    return Opened(
        # Where nothing is, labels have no file.
        _ZarrSource(array, letters, str(path), sparse="image-label" in multiscales),
        {"kind": "ome-zarr", "metadata": digest.hexdigest()[:16]},
        partial(_zarr_content, array),
        step=step,
        unit=unit,
        origin=origin,
        levels=tuple(tuple(level_array.shape) for level_array in arrays if level_array is not None),
        channels=image.channels,
        labels="image-label" in multiscales,
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
    channels: tuple[Channel, ...]

    def fits(self, ndim: int) -> bool:
        """Whether there is one axis, and one number of each vector, for every dimension of an array."""
        return len(self.axes) == ndim and all(len(v) in (0, ndim) for v in (*self.scales, *self.shifts))

    def place(self, axes: str) -> tuple[dict[str, float], dict[str, float], str | None]:
        """Voxel size and origin along z, y, x as far as there are, and their unit: micrometers where it is known.

        Those of an axis without a unit, where others have one, are not known.
        """
        if not any(self.scales):
            return {}, {}, None
        ones, zeros = [1.0] * len(axes), [0.0] * len(axes)
        total = np.multiply(self.scales[0] or ones, self.scales[1] or ones)
        place = np.multiply(self.scales[0] or ones, self.shifts[1] or zeros) + (self.shifts[0] or zeros)
        spatial = [a for a in "zyx" if a in axes]
        spatial = [a for a in spatial if self.units.get(a)] or spatial
        factors = {a: UNITS.get((self.units.get(a) or "").lower()) for a in spatial}
        has_scale = bool(factors) and None not in factors.values()
        step = {a: float(total[axes.index(a)]) * (factors[a] or 1.0 if has_scale else 1.0) for a in spatial}
        origin = {a: float(place[axes.index(a)]) * (factors[a] or 1.0 if has_scale else 1.0) for a in spatial}
        return step, origin, MICROMETER if has_scale and step else None


def _read_multiscale(
    path: ZarrName, metadata: dict[str, Any], level: int, axes: str | None, series: int | None
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
        tuple(Channel.of(c.get("label"), c.get("color"), _window_of(c)) for c in channels),
    )


def _window_of(channel: dict[str, Any]) -> tuple[Any, ...]:
    """The intensities between which OMERO shows a channel; empty where there are none."""
    window = channel.get("window")
    return (window.get("start"), window.get("end")) if isinstance(window, dict) else ()


def _arrays_of_levels(node: Any, names: Sequence[str]) -> list[Any]:
    """The array of each level; None where there is none that can be read."""
    arrays: list[Any] = []
    for name in names:
        array = None
        try:
            array = node[name]
        except InputFileError:  # of a server that cannot be reached
            raise
        except (KeyError, *READ_ERRORS):
            pass
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
    """One zarr array as a source; axes that are not given are its dimension names, if these are of t, c, z, y, x.

    ``name`` is for messages.

    Raises
    ------
    SettingsError
        If the axes are not possible, or not known.
    """
    if axes is None:
        names = getattr(array.metadata, "dimension_names", None)
        letters = [str(n).lower() for n in names or ()]
        if letters and all(n in ("t", "c", "z", "y", "x") for n in letters):
            axes = "".join(letters)
    digest = hashlib.sha256(json.dumps(array.metadata.to_dict(), default=str).encode())
    _warn_of_sparse(array, name)
    source = _ZarrSource(array, letters_of(axes, array.shape, name), name)
    return Opened(source, {"kind": "zarr", "metadata": digest.hexdigest()[:16]}, partial(_zarr_content, array))
