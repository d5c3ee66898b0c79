"""Results are written whole or not at all."""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from distillfss_core.errors import ImageError, OutputError
from distillfss_core.io.images import READABLE, TIFF_SUFFIXES, PathLike
from distillfss_core.types import Array


def write_labels(path: PathLike, array: Array) -> None:
    """Write labels as TIFF (zlib) or PNG, by the path's suffix; whole or not at all.

    Parameters
    ----------
    path : path
        Ending in .tif, .tiff or (one plane only) .png.
    array : integer or bool array, shape (y, x) or (z, y, x)
        Written as uint8 if no label is larger than 255, else as uint16.

    Raises
    ------
    ImageError
        If the array is no label image, or holds a number outside 0..65535.
    OutputError
        If the suffix is another or the file cannot be written; an older file stays as it was.
    """
    path = Path(path)
    if array.ndim not in (2, 3) or array.dtype.kind not in "bui" or array.size == 0:
        raise ImageError(f"{path.name}: labels are integers y x or z y x, this is {array.dtype} {array.shape}")
    high = _highest_label(array, 65535, path)
    array = np.ascontiguousarray(array, np.uint8 if high <= 255 else np.uint16)
    suffix = path.suffix.lower()
    if suffix in TIFF_SUFFIXES:
        _write_tiff(path, array, "YX" if array.ndim == 2 else "ZYX")
    elif suffix == ".png" and array.ndim == 2:
        with atomic_path(path) as temporary:
            Image.fromarray(array).save(temporary, format="PNG")
    elif suffix == ".png":
        raise OutputError(f"{path.name}: a PNG holds one plane, these are {len(array)}; end the name in .tif")
    else:
        raise OutputError(f"{path.name}: cannot write {suffix or 'a file without suffix'!r}; end it in .tif or .png")


def write_label_stack(
    path: PathLike,
    planes: Iterable[Array],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    *,
    scale: Sequence[float | None] = (None, None, None),
    unit: str | None = None,
) -> None:
    """Write labels of any number of planes as an OME-TIFF (zlib), plane by plane; whole or not at all.

    Parameters
    ----------
    path : path
        Ending in .tif or .tiff. A file that is there is replaced.
    planes : iterable of integer arrays (y, x)
        As many as ``shape`` has. Read one at a time, so an array of any size can be given piece by piece.
    shape : (z, y, x)
    dtype : integer dtype
        Numbers of 64 bits are written in 32.
    scale, unit
        Size of a voxel (z, y, x), as of a `Volume`; written where the unit is known.

    Raises
    ------
    ImageError
        If a plane is no label image, or holds a number outside 0..4294967295.
    OutputError
        If the suffix is another or the file cannot be written; an older file stays as it was.
    """
    path = Path(path)
    if path.suffix.lower() not in TIFF_SUFFIXES:
        raise OutputError(f"{path.name}: labels of a volume are written as TIFF; end the name in .tif")
    if dtype.kind not in "bui":
        raise ImageError(f"{path.name}: labels are integers, these are {dtype}")
    bits = np.uint8 if dtype.itemsize == 1 else np.uint16 if dtype.itemsize == 2 else np.uint32

    def checked() -> Iterator[Array]:
        for plane in planes:
            _highest_label(plane, np.iinfo(bits).max, path)
            yield np.ascontiguousarray(plane, bits)

    sizes = {f"PhysicalSize{a}": s for a, s in zip("ZYX", scale, strict=True) if unit and s}
    units = {f"{name}Unit": {"micrometer": "µm"}.get(unit or "", unit) for name in sizes}
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            checked(),
            shape=shape,
            dtype=bits,
            ome=True,
            photometric="minisblack",
            compression="zlib",
            metadata={"axes": "ZYX", **sizes, **units},
            bigtiff=math.prod(shape) * np.dtype(bits).itemsize > 2**31,
        )


def _highest_label(array: Array, most: int, path: Path) -> int:
    """The highest label, which is within 0..most, as all others are."""
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > most:
        raise ImageError(f"{path.name}: holds the label {low if low < 0 else high}; labels must be within 0..{most}")
    return high


def write_float_tiff(path: PathLike, array: Array, axes: str | None = None) -> None:
    """Write probabilities or uncertainty as a float32 TIFF (zlib); whole or not at all.

    Parameters
    ----------
    path : path
        Ending in .tif or .tiff.
    array : floating array
        Any shape that ``axes`` names.
    axes : str, optional
        One letter a dimension; by default YX, CYX (probabilities of a plane) or ZCYX.

    Raises
    ------
    ImageError
        If the axes do not name the array's dimensions.
    OutputError
        If the suffix is another or the file cannot be written; an older file stays as it was.
    """
    path = Path(path)
    axes = axes or {2: "YX", 3: "CYX", 4: "ZCYX"}.get(array.ndim, "")
    if len(axes) != array.ndim or array.size == 0:
        raise ImageError(f"{path.name}: axes {axes!r} do not name the dimensions of an array of shape {array.shape}")
    if path.suffix.lower() not in TIFF_SUFFIXES:
        raise OutputError(f"{path.name}: floats are written as TIFF; end the name in .tif")
    _write_tiff(path, np.ascontiguousarray(array, np.float32), axes)


def write_stack(path: PathLike, array: Array) -> None:
    """Write a gray stack as TIFF (zlib) in its own type; whole or not at all.

    Parameters
    ----------
    path : path
        Ending in .tif or .tiff.
    array : integer or floating array, shape (z, y, x)

    Raises
    ------
    OutputError
        If the file cannot be written; an older file stays as it was.
    """
    _write_tiff(Path(path), np.ascontiguousarray(array), "ZYX")


def check_output(path: Path) -> None:
    """Find out now, not after hours, that a file could not be written.

    Raises
    ------
    OutputError
    """
    folder = _target(path).parent
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; write elsewhere") from error


FILE_SUFFIXES = (*READABLE, ".csv", ".tsv", ".json", ".parquet", ".xlsx", ".txt", ".zip", ".onnx", ".safetensors")
"""What a new folder is not called: these names mean a file."""


def check_folder_name(folder: Path) -> None:
    """Refuse to make a folder whose name means a file.

    Raises
    ------
    OutputError
    """
    if folder.suffix.lower() in FILE_SUFFIXES and not folder.is_dir():
        raise OutputError(f"{folder} is the name of a file, but a folder is written; give another with -o")


def check_replaceable(outputs: Iterable[Path], reads: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse outputs that are read, and, unless they may be overwritten, those that are there already.

    Parameters
    ----------
    outputs : paths of files
    reads : paths
        Files that are read; of a folder, the files in it.
    overwrite : bool

    Raises
    ------
    OutputError
        Nothing was written.
    """
    present = [path for path in outputs if path.exists()]
    if not present:
        return
    inputs = {_identity(file) for path in reads for file in (path, *_files_in(path)) if file.exists()}
    for path in present:
        if _identity(path) in inputs:
            raise OutputError(f"{path} is read by this command, and would be lost; give another name for the output")
    if not overwrite:
        more = f" and {len(present) - 1} more are" if len(present) > 1 else " is"
        raise OutputError(f"{present[0]}{more} already there; give --overwrite, or another name for the output")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _files_in(path: Path) -> Iterator[Path]:
    return path.iterdir() if path.is_dir() else iter(())


def make_folder(folder: Path, *, parents: bool = False) -> None:
    """Make a folder that may be there already.

    Parameters
    ----------
    folder : path
    parents : bool
        Whether folders above it are made too; otherwise they must exist.

    Raises
    ------
    OutputError
        If a folder above it is missing or nothing can be written there.
    """
    try:
        folder.mkdir(parents=parents, exist_ok=True)
    except FileNotFoundError as error:
        raise OutputError(f"cannot make {folder}: there is no folder {folder.parent}; make it first") from error
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}; give another with -o") from error


def append_line(file: FileIO, line: bytes, path: Path) -> None:
    """Append a line to an unbuffered file and force it to disk; a line that cannot be written whole is removed.

    Raises
    ------
    OutputError
        If it cannot be written; what was there stays as it was.
    """
    start = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            file.truncate(start)
        file.seek(start)
        raise OutputError(f"cannot write {path}: {error_reason(error)}") from error


def _target(path: Path) -> Path:
    """The file that a path stands for, through links; it can lie there."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {target.parent}; make it first")
    if target.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the name of a file")
    return target


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Write to the path this gives; at the end it takes the place of ``path``, whole or not at all.

    The temporary file lies in the same folder and has the same suffix. If anything is raised inside, it is removed
    and what was at ``path`` stays as it was.

    Raises
    ------
    OutputError
        In place of any OSError: no such folder, no permission, no space left, ...
    """
    named = Path(path)
    target = _target(named)
    temporary = target.with_name(f".{target.name[:60]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {named}: {error_reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def error_reason(error: OSError) -> str:
    """What went wrong and what to do, in a line."""
    advice = {
        errno.ENOSPC: "free some space or write elsewhere",
        errno.EDQUOT: "free some space or write elsewhere",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.EROFS: "choose a folder you may write to",
    }.get(error.errno or 0, "nothing was changed")
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{what}; {advice}"


def _write_tiff(path: Path, array: Array, axes: str) -> None:
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            array,
            photometric="minisblack",
            planarconfig="separate" if axes.startswith("C") and len(array) > 1 else None,
            compression="zlib",
            metadata={"axes": axes},
            bigtiff=array.nbytes > 2**31,
        )
