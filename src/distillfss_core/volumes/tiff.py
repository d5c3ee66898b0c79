"""TIFF files of all kinds as volumes, through tifffile."""

from __future__ import annotations

import logging
import math
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import tifffile
import zarr
import zarr.errors
import zarr.storage

from distillfss_core.errors import InputFileError, SettingsError
from distillfss_core.types import Array
from distillfss_core.volumes.source import MICROMETER, UNITS, Opened, file_identity, letters_of

log = logging.getLogger(__name__)
LARGE_TIFFS = (".btf", ".tf8", ".lsm")


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
            for index in product(*spans):
                self._check_page(int(np.ravel_multi_index(index, self.shape[: self._leading])) if index else 0)
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


def open_tiff(path: Path, level: int, axes: str | None, series: int | None) -> Opened:
    with open(path, "rb") as raw:
        _check_pages_chained(raw, path)
    file = tifffile.TiffFile(path)
    try:
        return _from_tiff(file, path, level, axes, series)
    except BaseException:
        file.close()
        raise


def _from_tiff(file: Any, path: Path, level: int, axes: str | None, series: int | None) -> Opened:
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
    return Opened(
        source,
        file_identity("tiff", path.stat()) | {"series": series or 0},
        step=step,
        unit=unit,
        levels=tuple(tuple(s.shape) for s in chosen.levels),
        channel_names=names,
        color="S" in chosen.axes.upper(),
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
    metadata = file.imagej_metadata or {}
    step: dict[str, float] = {}
    if metadata.get("spacing"):
        step["z"] = float(metadata["spacing"])
    for a, tag in (("y", "YResolution"), ("x", "XResolution")):
        tag_value = file.pages[0].tags.get(tag)
        if tag_value is not None and tag_value.value[0] and tag_value.value[1]:
            step[a] = tag_value.value[1] / tag_value.value[0]
    factor = UNITS.get(str(metadata.get("unit", "")).lower())
    labels = tuple(str(v) for v in metadata.get("Labels") or ()) if metadata.get("channels", 1) > 1 else ()
    if factor is None:
        return {a: abs(s) for a, s in step.items() if s}, None, labels
    return {a: abs(s) * factor for a, s in step.items() if s}, MICROMETER, labels


def _ome_scale(text: str, series: int) -> tuple[dict[str, float], str | None, tuple[str, ...]]:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return {}, None, ()
    pixels = [e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"]
    if series >= len(pixels):
        return {}, None, ()
    attributes = pixels[series]
    names = tuple(
        e.get("Name") or str(i) for i, e in enumerate(c for c in attributes if c.tag.rpartition("}")[2] == "Channel")
    )
    step: dict[str, float] = {}
    factors: list[float | None] = []
    for a in "zyx":
        value = attributes.get(f"PhysicalSize{a.upper()}")
        with suppress(ValueError):
            if value and 0 < float(value) < math.inf:
                unit = attributes.get(f"PhysicalSize{a.upper()}Unit", "µm")
                step[a] = float(value)
                factors.append(UNITS.get(unit if unit == "m" else unit.lower()))
    if not step or any(f is None for f in factors):
        return step, None, names
    return {a: s * float(f or 1) for (a, s), f in zip(step.items(), factors, strict=True)}, MICROMETER, names


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
