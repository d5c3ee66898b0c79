"""Which reader opens a path."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import zarr

from distillfss_core.errors import ImageError, InputFileError, SettingsError
from distillfss_core.io.images import READABLE, TIFF_SUFFIXES, load_npy, read_image
from distillfss_core.io.labels import read_labels
from distillfss_core.volumes.folder import open_folder
from distillfss_core.volumes.medical import DICOM, MRC, NIFTI, dicom_files, open_dicom, open_mrc, open_nifti
from distillfss_core.volumes.remote import Address, address_of, remote_store
from distillfss_core.volumes.source import ArraySource, Opened, array_content, file_identity, letters_of
from distillfss_core.volumes.tiff import LARGE_TIFFS, open_tiff
from distillfss_core.volumes.zarr import (
    ZARR_FILES,
    ZarrPlace,
    from_zarr_array,
    is_zarr,
    list_images,
    open_zarr,
    zip_place,
)

ZIPS = (".zip", ".ozx")
LARGE_FILES = (*LARGE_TIFFS, *ZIPS)  # opened as volumes, beside what is READABLE


def open_path(path: Path, level: int, axes: str | None, series: int | None, *, labels: bool = False) -> Opened:
    """Open OME-Zarr, zarr, TIFF, .npy, a picture or a folder of planes; nothing is read but metadata and pictures.

    Parameters
    ----------
    path : Path
    level : int
        Resolution of a pyramid; 0 is the finest.
    axes : str or None
        One letter of tczyx a dimension; by default what the file states.
    series : int or None
        Which image of a file that holds several, from 0.
    labels : bool
        Pictures are read as numbers of labels.

    Raises
    ------
    InputFileError
        If there is no such path, or it is damaged or of an unknown format.
    SettingsError
        If there is no such level or series, or the axes are not possible or not known.
    """
    decode = read_labels if labels else read_image
    if not path.exists():
        file = next((parent for parent in path.parents if parent.suffix.lower() in ZIPS and parent.is_file()), None)
        if file is not None:
            return open_zarr(path, level, axes, series, zip_place(file, path.relative_to(file).as_posix()))
        raise InputFileError(f"{path}: no such file or folder; check the name")
    if path.is_dir():
        if is_zarr(path):
            return open_zarr(path, level, axes, series)
        if ".zarr" in path.suffixes:
            raise InputFileError(
                f"{path}: has no zarr metadata ({', '.join(ZARR_FILES)}); the copy is not whole, or it is no zarr"
            )
        opened = open_folder(path, axes, decode)
    elif path.suffix.lower() in ZIPS:
        return open_zarr(path, level, axes, series, zip_place(path))
    elif path.suffix.lower() in (*TIFF_SUFFIXES, *LARGE_TIFFS):
        return open_tiff(path, level, axes, series)
    elif path.suffix.lower() == ".npy":
        array = load_npy(path, mapped=True)
        stat = path.stat()
        opened = Opened(ArraySource(array, letters_of(axes, array.shape, str(path))), file_identity("npy", stat))
    elif path.suffix.lower() in READABLE:
        image = decode(path)
        source = ArraySource(image, letters_of(axes or "yxc"[: image.ndim], image.shape, str(path)))
        opened = Opened(source, file_identity("image", path.stat()), color=image.ndim == 3)
    else:
        raise InputFileError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'!r}; give OME-Zarr, zarr, TIFF, MRC, NIfTI, "
            "DICOM, .npy or a folder of planes"
        )
    if level:
        raise SettingsError(f"{path}: has no level {level}; it has only level 0")
    return opened


def open_address(address: Address, level: int, axes: str | None, series: int | None) -> Opened:
    """Open a zarr at an address: without credentials, and where access is denied, with those of the user.

    What was opened within the last minute is not requested again.

    Raises
    ------
    InputFileError
        If there is no zarr, access is denied, or the server cannot be reached.
    """
    return _open_address(address, level, axes, series, int(time.monotonic() // 60))


@lru_cache(maxsize=64)
def _open_address(address: Address, level: int, axes: str | None, series: int | None, minute: int) -> Opened:
    denied = False
    for anonymous in (True, False):
        store = remote_store(address, anonymous=anonymous)
        try:
            return open_zarr(address, level, axes, series, ZarrPlace(store))
        except FileNotFoundError:
            denied = bool(store.denied)
        except InputFileError:
            if anonymous:
                raise
        if not denied or address.startswith("http"):
            break
    if denied:
        raise InputFileError(
            f"{address}: access is denied, or nothing is there; check the address, or your credentials"
        )
    raise InputFileError(f"{address}: no zarr is there; check the address, which ends at the folder of the zarr")


def open_any(path: Path, level: int, axes: str | None, series: int | None, *, labels: bool = False) -> Opened:
    """Open a path of any format; ``labels``: pictures are read as numbers of labels."""
    opener: Callable[[Path, str | None, int | None], Opened] | None = None
    if path.is_file():
        name = path.name.lower()
        opener = next(
            (o for ends, o in ((MRC, open_mrc), (NIFTI, open_nifti), (DICOM, open_dicom)) if name.endswith(ends)),
            None,
        )
    elif path.is_dir() and not is_zarr(path) and dicom_files(path):
        opener = open_dicom
    if opener is None:
        return open_path(path, level, axes, series, labels=labels)
    if level:
        raise SettingsError(f"{path}: has no level {level}; it has only level 0")
    return opener(path, axes, series)


def volumes_in(path: Path) -> list[tuple[Path, str]]:
    """The volumes that a path holds, and a name for the results of each.

    The images of a plate (all fields of all wells), of a well and of a collection of bioformats2raw are volumes of
    their own, called PLATE_ROW_COLUMN_FIELD. Any other path is one volume.

    Raises
    ------
    InputFileError
        If the metadata of a plate are damaged.
    """
    address = address_of(path)
    if address is not None:
        images = list_images(address, ZarrPlace(remote_store(address)))
    else:
        images = list_images(path) if path.is_dir() and is_zarr(path) else []
    if not images or images == ["0"]:  # a collection of one image is that image
        return [(path, stem_of(path))]
    return [(path / image, "_".join((stem_of(path), *image.split("/")))) for image in images]


def is_volume(path: Path) -> bool:
    """Whether a path looks like one volume, by its name and, of a folder, by the names in it.

    A folder called NAME.zarr is one, also without metadata: opening it names what is missing.
    """
    if path.is_dir():
        if ".zarr" in path.suffixes:
            return True
        inside = [f.name.lower() for f in path.iterdir()]
        return any(f in ZARR_FILES or f.endswith((*READABLE, *DICOM)) for f in inside)
    return path.name.lower().endswith((*READABLE, *LARGE_FILES, *MRC, *NIFTI, *DICOM))


def is_one_volume(path: Path) -> bool:
    """Whether a path is one file or volume: a zarr and a DICOM series are, although they are folders."""
    if address_of(path) is not None:
        return True
    return path.is_file() or (path.is_dir() and (is_zarr(path) or ".zarr" in path.suffixes or bool(dicom_files(path))))


def stem_of(path: Path) -> str:
    """The name without its endings: "a.ome.zarr", "a.ome.tif" and "a.nii.gz" are "a"."""
    stem = path.name if path.is_dir() and ".zarr" not in path.suffixes else path.stem
    if path.suffix.lower() in ZIPS:
        stem = stem.removesuffix(".zarr")
    return stem.removesuffix(".ome").removesuffix(".nii")


def open_array(array: Any, axes: str | None) -> Opened:
    """Open an array in memory or elsewhere: shape, dtype and numpy's indexing suffice.

    Raises
    ------
    ImageError
        If it is no array.
    SettingsError
        If the axes are not possible, or not known: an array without axes is (y, x) or (z, y, x).
    """
    if isinstance(array, zarr.Array):
        return from_zarr_array(array, axes, "zarr array")
    if not all(hasattr(array, name) for name in ("shape", "dtype", "__getitem__")):
        raise ImageError(f"a volume is a path or an array with shape and dtype, not {type(array).__name__}")
    source = ArraySource(array, letters_of(axes, array.shape, "array"))
    return Opened(source, {"kind": "array"}, partial(array_content, source))
