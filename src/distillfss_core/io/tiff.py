"""The images in TIFF files, through tifffile; what a file states and does not hold is an error that names it."""

from __future__ import annotations

import logging
import math
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import tifffile

from distillfss_core.errors import InputFileError
from distillfss_core.types import Array

log: logging.Logger = logging.getLogger(__name__)

_GDAL_NODATA = 42113  # the tag of the value that tiles without data have
_ORIENTATION = 274
_MOST_NAMED = 3


class TiffImage:
    """One resolution of one image of an open TIFF file.

    tifffile gives zeros, or fewer planes, for pages, strips and tiles that are not there; here that is an error.

    Parameters
    ----------
    file : tifffile.TiffFile
        From `open_tiff_file`.
    path : path
        For messages.
    series, level : int
        Which image, and which resolution of it.
    """

    def __init__(self, file: Any, path: Path, series: int = 0, level: int = 0) -> None:
        self.file: Any = file
        self.path: Path = path
        self.number: int = series
        self.level: int = level
        self.series: Any = file.series[series]
        self.resolution: Any = self.series.levels[level]
        self.axes: str = self.resolution.axes.upper()
        self.shape: tuple[int, ...] = tuple(self.resolution.shape)
        self.leading: int = 0
        """How many of the first axes count pages."""
        while math.prod(self.shape[: self.leading]) < len(self.resolution) and self.leading < len(self.shape):
            self.leading += 1
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self.missing: set[str] = set()
        self._check_stated()

    @property
    def has_alpha(self) -> bool:
        """Whether the last of its samples is no color."""
        return "S" in self.axes and bool(getattr(self.resolution.keyframe, "extrasamples", ()))

    def read(self) -> Array:
        """The whole image, with all its axes.

        Raises
        ------
        InputFileError
            If a part of it is not there.
        """
        if self.resolution.dataoffset is None:
            for page in range(len(self.resolution)):
                self.check_page(page)
        array: Array = self.resolution.asarray()
        return array

    def read_own(self) -> Array:
        """The planes that lie in the file ``path``, where it is one of several files of an image; else the whole.

        Raises
        ------
        InputFileError
            As `read` does, if another file of the image is missing, or the planes of this one make no stack.
        """
        own = [i for i, page in enumerate(self.resolution) if page is None or _lies_in(page, self.path)]
        if len(own) == len(self.resolution):
            return self.read()
        if gone := self._files_missing():
            raise InputFileError(f"{self.path}: {gone}")
        leading = self.shape[: self.leading]
        positions = [np.unique(p) for p in np.unravel_index(own, leading)]
        if not own or math.prod(map(len, positions)) != len(own):
            raise InputFileError(
                f"{self.path}: holds {len(own)} planes of an image of {len(self.resolution)} that make no stack; give "
                "the image as a volume"
            )
        for number in own:
            self.check_page(number)
        planes = np.stack([self.resolution[number].asarray() for number in own])
        array: Array = planes.reshape(*map(len, positions), *self.shape[self.leading :])
        return array

    def check_page(self, number: int) -> None:
        """Make sure that every byte of a page is in its file.

        Raises
        ------
        InputFileError
            If the page, its file, or a strip or tile is not there.
        """
        if number in self._checked or self.resolution.dataoffset is not None:
            return
        with self._lock:
            page = self.resolution[number]
            if page is None:
                raise InputFileError(f"{self.path}: plane {number} is missing: {self._why_missing()}")
            first = self.resolution.keyframe
            if (tuple(page.shape), page.dtype) != (tuple(first.shape), first.dtype):
                raise InputFileError(
                    f"{self.path}: plane {number} in {page.parent.filehandle.name} is {page.shape} {page.dtype}, "
                    f"others are {first.shape} {first.dtype}; it is damaged, copy it again"
                )
            size = page.parent.filehandle.size
            for start, count in zip(page.dataoffsets, page.databytecounts, strict=False):
                if start + count > size:
                    raise InputFileError(
                        f"{self.path}: is cut short at plane {number} ({size} bytes, {start + count} needed); "
                        "copy it again"
                    )
            self._check_segments(number, page)
            self._checked.add(number)

    def _check_segments(self, number: int, page: Any) -> None:
        """All strips or tiles of a page are there, unless the file states what those hold that are not."""
        segments = math.prod(page.chunked)
        held = [n for n, _ in zip(page.databytecounts, page.dataoffsets, strict=False) if n > 0]
        gone = segments - len(held)
        if gone <= 0:
            return
        kind = "tiles" if page.keyframe.is_tiled else "strips"
        if self.file.pages.first.tags.get(_GDAL_NODATA) is None:
            first = next((i for i, n in enumerate(page.databytecounts) if n == 0), len(held))
            raise InputFileError(
                f"{self.path}: plane {number} has no data in {gone} of its {segments} {kind} (the first is {first}); "
                "copy it again, or save it whole with the program that wrote it"
            )
        if not self.missing:
            log.warning(
                "%s: plane %d has %d empty %s; they hold %s, as the file states",
                self.path,
                number,
                gone,
                kind,
                page.keyframe.nodata,
            )
        self.missing.add(str(number))

    def _why_missing(self) -> str:
        return self._files_missing() or "it is cut short, or its metadata state more planes than there are"

    def _files_missing(self) -> str:
        """Which files of the image are not there; "" if none is missing."""
        gone = [name for name in ome_files(self.file.ome_metadata) if not (self.path.parent / name).exists()]
        more = f" and {len(gone) - _MOST_NAMED} more" if len(gone) > _MOST_NAMED else ""
        listed = f"{', '.join(gone[:_MOST_NAMED])}{more}"
        return f"there is no {listed} beside it; put the files of an image into one folder" if gone else ""

    def _check_stated(self) -> None:
        """As many planes are there as the metadata state."""
        resolution = self.resolution
        plane = math.prod(n for n, a in zip(self.shape, self.axes, strict=False) if a in "YX")
        stated = _stated_planes(self.file, self.number)
        sizes = zip(self.series.shape, self.series.axes.upper(), strict=False)
        planes = math.prod(n for n, a in sizes if a not in "YX")
        if stated > planes:
            raise InputFileError(
                f"{self.path}: states {stated} planes, {planes} can be read; it is cut short or its metadata are "
                "damaged, copy it again"
            )
        start, size = resolution.dataoffset, self.file.filehandle.size
        if start is not None:
            if start + resolution.nbytes > size:
                raise InputFileError(
                    f"{self.path}: is cut short ({size} bytes, {start + resolution.nbytes} needed); copy it again"
                )
        elif len(resolution) * math.prod(resolution.keyframe.shape) < math.prod(self.shape):
            raise InputFileError(
                f"{self.path}: states the shape {self.shape}, but has {len(resolution)} pages of "
                f"{resolution.keyframe.shape} ({plane} pixels a plane); it is cut short, copy it again"
            )


def open_tiff_file(path: Path) -> Any:
    """Open a TIFF file whose list of pages is whole; of an OME-TIFF of several files any one may be given.

    Returns
    -------
    tifffile.TiffFile
        To be closed by the caller.

    Raises
    ------
    InputFileError
        If it is no TIFF file, is cut short, or its metadata lie in a file that is not there.
    """
    with open(path, "rb") as raw:
        _check_pages_chained(raw, path)
    file = tifffile.TiffFile(path)
    try:
        _warn_of_orientation(file, path)
        text = file.ome_metadata if file.is_ome else None
        root = _parse_ome(text) if text else None
        if root is None:
            return file
        other = _metadata_file(root)
        if other is not None:
            return _open_master(file, path, other)
        names = ome_files(text)
        if root.get("UUID") is None and len(names) == 1 and not (path.parent / names[0]).exists():
            file.close()  # a file that was renamed: all planes are its own
            return tifffile.TiffFile(path, omexml=_without_files(root))
        if not any(series.kind == "ome" for series in file.series):
            _check_set(path, names)
    except BaseException:
        file.close()
        raise
    return file


def ome_files(text: str | None) -> list[str]:
    """The names of the files that hold an OME-TIFF, in the order in which its metadata name them."""
    root = _parse_ome(text) if text else None
    if root is None:
        return []
    names = (e.get("FileName") for e in root.iter() if _name_of(e) == "UUID")
    return list(dict.fromkeys(name for name in names if name))


def first_of_sets(files: Sequence[Path]) -> list[Path]:
    """The files without those that belong to an OME-TIFF of several files of which another one is listed before.

    Parameters
    ----------
    files : sequence of path
        Of one folder. What is no TIFF file, or cannot be read, is kept.
    """
    kept: list[Path] = []
    covered: set[Path] = set()
    for file in files:
        if file in covered:
            continue
        kept.append(file)
        covered |= members_of_set(file)
    return kept


def members_of_set(file: Path) -> set[Path]:
    """The files of the OME-TIFF that a file belongs to; empty where it is no part of several files."""
    if file.suffix.lower() not in (".tif", ".tiff") or not file.is_file():
        return set()
    try:
        with tifffile.TiffFile(file) as opened:
            names = _names_of_set(opened, file)
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, struct.error, tifffile.TiffFileError):
        return set()
    members = {file.parent / name for name in names}
    return members | {file} if len(members | {file}) > 1 and (file in members or not members) else set()


def _names_of_set(opened: Any, file: Path) -> list[str]:
    text = opened.ome_metadata if opened.is_ome else None
    root = _parse_ome(text) if text else None
    other = _metadata_file(root) if root is not None else None
    if other is None:
        return ome_files(text)
    master = file.parent / other
    if master.suffix.lower() in (".tif", ".tiff"):
        with tifffile.TiffFile(master) as whole:
            return [*ome_files(whole.ome_metadata), other]
    return ome_files(master.read_text(encoding="utf-8"))


def _lies_in(page: Any, path: Path) -> bool:
    return bool(page.parent.filehandle.name == path.name)


def _parse_ome(text: str) -> ElementTree.Element | None:
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        return None


def _name_of(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _metadata_file(root: ElementTree.Element) -> str | None:
    """The file in which the metadata lie, where they do not lie in this one."""
    return next((e.get("MetadataFile") for e in root if _name_of(e) == "BinaryOnly"), None)


def _open_master(file: Any, path: Path, other: str) -> Any:
    """The image that a file belongs to whose metadata lie in another one."""
    master = path.parent / other
    file.close()
    if not master.is_file():
        raise InputFileError(
            f"{path}: its metadata lie in {other}, and there is no such file beside it; put the files of an image into "
            "one folder"
        )
    if master.suffix.lower() in (".tif", ".tiff"):
        with open(master, "rb") as raw:
            _check_pages_chained(raw, master)
        return tifffile.TiffFile(master)
    text = master.read_text(encoding="utf-8")
    if _parse_ome(text) is None:
        raise InputFileError(f"{master}: holds no OME metadata, or they are damaged; copy it again")
    return tifffile.TiffFile(path, omexml=text.strip())


def _without_files(root: ElementTree.Element) -> str:
    """The metadata without the names of files: every plane is in the file itself."""
    for element in root.iter():
        if _name_of(element) == "TiffData":
            for child in list(element):
                element.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _check_set(path: Path, names: Sequence[str]) -> None:
    """Where tifffile reads no image as the OME metadata state it, a file may be missing."""
    gone = [name for name in names if not (path.parent / name).exists()]
    if gone:
        more = f" and {len(gone) - _MOST_NAMED} more" if len(gone) > _MOST_NAMED else ""
        raise InputFileError(
            f"{path}: is one of {len(names)} files of an image, and {', '.join(gone[:_MOST_NAMED])}{more} missing; put "
            "the files of an image into one folder"
        )
    log.warning("%s: its OME metadata do not fit its pages, which are read as a stack", path)


def _stated_planes(file: Any, series: int) -> int:
    """How many planes the metadata of the program that wrote a file state for an image; 0 where they do not."""
    if file.is_imagej:
        images = (file.imagej_metadata or {}).get("images", 0)
        return int(images) if isinstance(images, int) and series == 0 else 0
    root = _parse_ome(file.ome_metadata) if file.is_ome and file.ome_metadata else None
    pixels = [e for e in root.iter() if _name_of(e) == "Pixels"] if root is not None else []
    if len(pixels) != len(file.series):
        return 0
    sizes = [pixels[series].get(f"Size{a}", "1") for a in "ZCT"]
    return math.prod(int(n) for n in sizes) if all(n.isdecimal() for n in sizes) else 0


def _warn_of_orientation(file: Any, path: Path) -> None:
    tag = file.pages.first.tags.get(_ORIENTATION)
    if tag is not None and tag.value != 1 and isinstance(tag.value, int) and 1 < tag.value <= 8:
        log.warning(
            "%s: states orientation %d; rows and columns are read as they are stored, as ImageJ and napari show them",
            path,
            tag.value,
        )


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
    offset = struct.unpack(next_form, head[8:16] if big else head[4:8])[0]
    seen: set[int] = set()
    while offset:
        file.seek(offset)
        raw = file.read(struct.calcsize(count_form))
        short = len(raw) < struct.calcsize(count_form)
        if not short:
            file.seek(struct.unpack(count_form, raw)[0] * entry, 1)
            raw = file.read(struct.calcsize(next_form))
            short = len(raw) < struct.calcsize(next_form)
        if short or offset in seen:
            what = "goes in a circle" if offset in seen else "ends"
            raise InputFileError(
                f"{path}: is cut short or damaged: its list of pages {what} after {len(seen)} ({size} bytes); "
                "copy it again"
            )
        seen.add(offset)
        offset = struct.unpack(next_form, raw)[0]
    if not seen:
        raise InputFileError(f"{path}: holds no page; it was not written to its end")
