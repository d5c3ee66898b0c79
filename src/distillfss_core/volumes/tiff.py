"""TIFF files of all kinds as volumes, through tifffile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product, zip_longest
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import zarr

from distillfss_core.errors import InputFileError, SettingsError
from distillfss_core.io.tiff import TiffImage, open_tiff_file
from distillfss_core.types import Array
from distillfss_core.volumes.source import MICROMETER, UNITS, Channel, Opened, Source, file_identity, letters_of, spread

_READ_WHOLE = 1 << 26  # bytes of an image whose alpha channel is looked at everywhere
_SIDE, _TILES = 256, 16  # of the parts of a larger one
_TABLE = (3, 256)  # shape of a color table of ImageJ
LARGE_TIFFS = (".btf", ".tf8", ".lsm")


# TIFF


class _TiffSource:
    """One resolution of an image in a TIFF file, read piece by piece through tifffile's view of it as zarr."""

    def __init__(self, image: TiffImage, axes: str) -> None:
        self._image, self.axes = image, axes
        self._array: Any = zarr.open_array(image.series.aszarr(level=image.level), mode="r")
        self.shape, self.dtype = tuple(self._array.shape), np.dtype(self._array.dtype)
        self.chunks = tuple(self._array.chunks)

    @property
    def missing(self) -> set[str]:
        return self._image.missing

    def get(self, box: tuple[slice, ...]) -> Array:
        leading = self._image.leading
        for index in product(*(range(s.start, s.stop) for s in box[:leading])):
            self._image.check_page(int(np.ravel_multi_index(index, self.shape[:leading])) if index else 0)
        return np.asarray(self._array[box])

    def close(self) -> None:
        self._image.file.close()


class _WithoutAlpha:
    """A source without its last channel, an alpha channel that has one value everywhere."""

    def __init__(self, source: Source, value: Any, name: str) -> None:
        self._source, self._value, self._name = source, value, name
        channel = source.axes.index("c")
        colors = source.shape[channel] - 1
        self._channel, self._gray = channel, colors == 1
        self.dtype = source.dtype
        if self._gray:
            self.axes = source.axes.replace("c", "")
            self.shape, self.chunks = (_without(values, channel) for values in (source.shape, source.chunks))
        else:
            self.axes = source.axes
            self.shape = (*source.shape[:channel], colors, *source.shape[channel + 1 :])
            self.chunks = tuple(min(n, c) for n, c in zip(self.shape, source.chunks, strict=True))

    @property
    def missing(self) -> set[str]:
        return set(getattr(self._source, "missing", ()))

    def get(self, box: tuple[slice, ...]) -> Array:
        channel = self._channel
        wanted = slice(0, 1) if self._gray else box[channel]
        rest = box if self._gray else _without(box, channel)
        voxels = self._source.get((*rest[:channel], slice(0, self._source.shape[channel]), *rest[channel:]))
        voxels = np.moveaxis(voxels, channel, -1)
        if (voxels[..., -1] != self._value).any():
            raise InputFileError(
                f"{self._name}: its alpha channel has several values, though most of it is {self._value}; save it "
                "without alpha"
            )
        colors = voxels[..., :-1]
        return colors[..., 0] if self._gray else np.moveaxis(colors[..., wanted], -1, channel)

    def close(self) -> None:
        self._source.close()


def _without(values: tuple[Any, ...], position: int) -> tuple[Any, ...]:
    return (*values[:position], *values[position + 1 :])


def _plain_alpha(source: _TiffSource) -> Any:
    """The one value that the last channel has; None where it has several. Of a large image some tiles are read."""
    channel = source.axes.index("c")
    whole = math.prod(source.shape) * source.dtype.itemsize <= _READ_WHOLE
    sides = [
        n if whole or a == "c" else min(n, _SIDE) if a in "yx" else 1
        for a, n in zip(source.axes, source.shape, strict=True)
    ]
    value = None
    for corner in spread([-(-n // side) for n, side in zip(source.shape, sides, strict=True)], _TILES):
        starts = [min(i * side, n - side) for i, side, n in zip(corner, sides, source.shape, strict=True)]
        tile = source.get(tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))
        alpha = tile.take(-1, channel)
        value = alpha.flat[0] if value is None else value
        if (alpha != value).any():
            return None
    return value


def open_tiff(path: Path, level: int, axes: str | None, series: int | None) -> Opened:
    """Open one image of a TIFF, OME-TIFF, ImageJ or LSM file; tiles or strips are read on demand.

    Parameters
    ----------
    path : Path
    level : int
        Resolution of a pyramid; 0 is the finest.
    axes : str or None
        One letter of tczyx a dimension; by default what the file states.
    series : int or None
        Which image of the file, from 0; needed where there are several.

    Raises
    ------
    InputFileError
        If the file is no TIFF, damaged, or a part of it is missing.
    SettingsError
        If there is no such level or series, or the axes are not possible or not known.
    """
    file = open_tiff_file(path)
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
    image = TiffImage(file, path, series or 0, level)
    plain = _TiffSource(image, letters_of(letters, image.shape, str(path)))
    if plain.shape != image.shape:
        raise InputFileError(f"{path}: its metadata name the shape {image.shape}, it has {plain.shape}")
    step, unit, channels = _tiff_scale(file, series or 0)
    if step:
        fine = dict(zip(plain.axes, chosen.levels[0].shape, strict=False))
        coarse = dict(zip(plain.axes, plain.shape, strict=True))
        step = {a: s * fine.get(a, 1) / coarse.get(a, 1) for a, s in step.items()}
    source: Source = plain
    if axes is None and image.has_alpha and plain.shape[plain.axes.index("c")] in (2, 4):
        value = _plain_alpha(plain)
        source = plain if value is None else _WithoutAlpha(plain, value, str(path))
    return Opened(
        source,
        file_identity("tiff", path.stat()) | {"series": series or 0},
        step=step,
        unit=unit,
        levels=tuple(tuple(s.shape) for s in chosen.levels),
        channels=channels,
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


def _tiff_scale(file: Any, series: int) -> tuple[dict[str, float], str | None, tuple[Channel, ...]]:
    """Voxel size along z, y, x, its unit, and the channels; as far as the file tells."""
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
    channels = _imagej_channels(metadata)
    if factor is None:
        return {a: abs(s) for a, s in step.items() if s}, None, channels
    return {a: abs(s) * factor for a, s in step.items() if s}, MICROMETER, channels


def _imagej_channels(metadata: Mapping[str, Any]) -> tuple[Channel, ...]:
    """Channels by the labels of the first planes, the ends of their color tables, and their ranges of display."""
    count = int(metadata.get("channels", 1))
    if count <= 1:
        return ()
    labels = [str(v) for v in metadata.get("Labels") or ()]
    tables = [np.asarray(table) for table in metadata.get("LUTs") or ()]
    ends = ["".join(f"{int(v):02x}" for v in table[:, -1]) if table.shape == _TABLE else None for table in tables]
    ranges = list(metadata.get("Ranges") or ())
    rows = zip_longest(labels[:count], ends[:count], (ranges[2 * n :][:2] for n in range(count)))
    return tuple(Channel.of(label, end, limits or ()) for label, end, limits in rows)


def _ome_scale(text: str, series: int) -> tuple[dict[str, float], str | None, tuple[Channel, ...]]:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return {}, None, ()
    pixels = [e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"]
    if series >= len(pixels):
        return {}, None, ()
    attributes = pixels[series]
    channels = tuple(
        Channel.of(e.get("Name"), _ome_color(e.get("Color")), ())
        for e in attributes
        if e.tag.rpartition("}")[2] == "Channel"
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
        return step, None, channels
    return {a: s * float(f or 1) for (a, s), f in zip(step.items(), factors, strict=True)}, MICROMETER, channels


def _ome_color(number: str | None) -> str | None:
    """Red, green and blue of a color of OME-XML, a signed number whose bytes are red, green, blue and alpha."""
    with suppress(TypeError, ValueError):
        return f"{(int(number or '') >> 8) & 0xFFFFFF:06x}"
    return None
