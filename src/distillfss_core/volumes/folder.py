"""Folders of planes as volumes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tifffile import natural_sorted

from distillfss_core.errors import InputFileError
from distillfss_core.io.images import READABLE, TIFF_SUFFIXES, read_image
from distillfss_core.io.tiff import members_of_set
from distillfss_core.types import Array
from distillfss_core.volumes.source import ArraySource, Opened, Source, files_digest, letters_of
from distillfss_core.volumes.tiff import open_tiff

log: logging.Logger = logging.getLogger(__name__)

# a folder of planes


class _FolderSource:
    """Files of one plane each, in natural order of their names."""

    def __init__(
        self,
        files: Sequence[Path],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        decode: Callable[[Path], Array] = read_image,
    ) -> None:
        self.files, self.shape, self.dtype = files, (len(files), *shape), dtype
        self.axes = "zyxc"[: len(self.shape)]
        self.chunks = (1, *shape)
        self._decode = lru_cache(maxsize=4)(decode)

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
    source = open_tiff(path, 0, None, 0).source
    try:
        if source.axes not in ("yx", "yxc"):
            raise InputFileError(f"{path}: has axes {source.axes}; a folder of planes holds one plane a file")
        yield source
    finally:
        source.close()


def open_folder(path: Path, axes: str | None, decode: Callable[[Path], Array] = read_image) -> Opened:
    """Open a folder with one plane "y x [c]" a file, in the natural order of names; or the files of one OME-TIFF.

    Parameters
    ----------
    path : Path
    axes : str or None
        One letter of tczyx a dimension; by default "zyx", or "zyxc" for planes in color.
    decode : callable
        Reads a file that is no TIFF: `read_image`, or `read_labels`.

    Raises
    ------
    InputFileError
        If the folder has no plane, one cannot be read, or files of an OME-TIFF lie among others.
    SettingsError
        If the axes are not possible.
    """
    files = [f for f in path.iterdir() if f.is_file() and f.suffix.lower() in READABLE and not f.name.startswith(".")]
    if not files:
        raise InputFileError(f"{path}: holds no plane and no zarr; put one image file a plane there")
    order = {name: place for place, name in enumerate(natural_sorted({f.name.lower() for f in files}))}
    files.sort(key=lambda f: order[f.name.lower()])
    members = members_of_set(files[0])
    if members:
        others = [f.name for f in files if f not in members]
        if others:
            raise InputFileError(
                f"{path}: holds an image of {len(members)} files, {files[0].name} and so on, and other files "
                f"({', '.join(others[:3])}); give one file of the image that is meant"
            )
        opened = open_tiff(files[0], 0, axes, None)
        present = [f for f in files if f.is_file()]
        return replace(opened, identity={**opened.identity, "kind": "ome set", "files": files_digest(present)})
    _warn_of_gap(path, files)
    with _plane_of(files[0], decode) as first:
        shape, dtype = first.shape, first.dtype
    source = _FolderSource(files, shape, dtype, decode)
    if axes is not None:
        source.axes = letters_of(axes, source.shape, str(path))
    return Opened(source, {"kind": "folder", "files": files_digest(files)}, color=len(shape) == 3)


def _warn_of_gap(path: Path, files: Sequence[Path]) -> None:
    """Name the place where the numbers in the names of planes jump, though they are evenly spaced elsewhere."""
    numbers = [int((re.findall(r"\d+", f.stem) or ["-1"])[-1]) for f in files]
    steps = [after - before for before, after in pairwise(numbers)]
    usual = min(steps, default=0)
    widest = max(steps, default=0)
    if usual > 0 and widest > usual and -1 not in numbers:
        before = steps.index(widest)
        log.warning(
            "%s: holds %d planes, and their numbers jump from %s to %s; a plane may be missing",
            path,
            len(files),
            files[before].name,
            files[before + 1].name,
        )
