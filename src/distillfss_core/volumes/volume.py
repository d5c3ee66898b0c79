"""Volumes that stay where they are: axes, scale and planes of files and arrays of any size; nothing is read unasked."""

from __future__ import annotations

import json
import logging
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from distillfss_core.errors import ImageError, InputFileError, SettingsError
from distillfss_core.types import Array, is_usable
from distillfss_core.volumes.opening import open_address, open_any, open_array
from distillfss_core.volumes.remote import Address, address_of
from distillfss_core.volumes.source import READ_ERRORS, Channel, Opened, Source, reason

log: logging.Logger = logging.getLogger(__name__)

_PLAIN = {"level": 0, "labels": False}  # options of `open_volume` that are not None where they are not given

Scale = tuple[float | None, float | None, float | None]


@dataclass(frozen=True, eq=False)
class Volume:
    """A stack of planes, read piece by piece. It is made by `open_volume`.

    Parameters
    ----------
    name : str
        For messages.
    shape : (z, y, x) or (z, y, x, c)
    dtype : numpy dtype
    scale : (float or None,) * 3
        Size of a voxel along z, y, x, in ``unit``; None where not known.
    unit : str or None
        "micrometer", or None where the file gives numbers without a known unit.
    origin : (float,) * 3
        Place of the first voxel along z, y, x, in ``unit``; 0 where not known.
    level, levels : int, tuple of shapes
        Which resolution this is, and the sizes (z, y, x) of all there are (0 is the finest).
    chunks : (z, y, x)
        Pieces in which it is stored: reading less than one costs as much as one.
    path : Path or None
        Where it lies on disk; None of an array, and of what lies elsewhere.
    address : str or None
        Where it lies elsewhere (https://, s3://).
    is_label_image : bool
        Whether its metadata (OME-Zarr) call it labels.
    directions : str
        Where in the body z, y and x increase to (NIfTI, DICOM): S or I, P or A, L or R each; empty where not known.
    order : str
        Which axes of what was opened z, y and x are: "zyx", or another order after `along`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: Scale
    unit: str | None
    origin: tuple[float, float, float]
    level: int
    levels: tuple[tuple[int, int, int], ...]
    chunks: tuple[int, int, int]
    path: Path | None
    address: str | None
    _identify: Callable[[], Mapping[str, Any]] = field(repr=False)
    _source: Source = field(repr=False)
    _fixed: Mapping[str, slice] = field(repr=False)
    _reopen: tuple[Any, dict[str, Any]] = field(repr=False)
    is_label_image: bool = False
    directions: str = ""
    order: str = "zyx"

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON-able; two volumes that differ in it are not the same. (Those that differ in ``order`` are not, either.)

        Files are distinguished by size and time, zarr by a few megabytes of its chunks, an array in memory by its
        voxels (above 256 MB by a sample), any other by a few tiles. They are read at the first access. An array in
        memory, which may change, is read again when small tiles all over it are no longer as they were.
        """
        return self._identify()

    @property
    def is_in_memory(self) -> bool:
        """Whether it is a numpy array, whose voxels may change while it is open."""
        return isinstance(self._reopen[0], np.ndarray)

    @property
    def location(self) -> str | None:
        """Its path or address, by which it can be opened again; None of an array."""
        return self.address or (str(self.path) if self.path else None)

    @property
    def ndim(self) -> int:
        """3, or 4 where the volume has channels."""
        return len(self.shape)

    @property
    def axes(self) -> str:
        """ "zyx", or "zyxc" where the volume has channels."""
        return "zyxc"[: len(self.shape)]

    @property
    def missing(self) -> frozenset[str]:
        """Names of the chunks asked for so far that have no file, so that they read as the fill value."""
        return frozenset(getattr(self._source, "missing", ()))

    def read(self, z: slice = slice(None), y: slice = slice(None), x: slice = slice(None)) -> Array:
        """A box of voxels, shape (z, y, x) or (z, y, x, c); slices as for numpy, without steps.

        Raises
        ------
        InputFileError
            If what is asked for is damaged or cannot be read.
        """
        spans = {a: slice(*s.indices(n)[:2]) for a, s, n in zip("zyx", (z, y, x), self.shape, strict=False)}
        if any(s.step not in (None, 1) for s in (z, y, x)):
            raise SettingsError(f"{self.name}: a volume is read without steps")
        if any(s.stop <= s.start for s in spans.values()):
            return np.empty((*(max(0, s.stop - s.start) for s in spans.values()), *self.shape[3:]), self.dtype)
        where = {**spans, **self._fixed}
        box = tuple(where[a] for a in self._source.axes)
        try:
            voxels = np.asarray(self._source.get(box))
        except (ImageError, InputFileError):
            raise
        except READ_ERRORS as error:
            place = ", ".join(f"{a} {s.start}:{s.stop}" for a, s in spans.items())
            raise InputFileError(
                f"{self.name}: cannot be read at {place} ({reason(error)}); check that the file is whole"
            ) from error
        return self._ordered(voxels)

    def plane(self, z: int, side: int | None = None) -> Array:
        """Plane ``z``, shape (y, x) or (y, x, c); with ``side``, at most so many pixels of its middle along y and x.

        Raises
        ------
        SettingsError
            If there is no such plane.
        InputFileError
            As `read` does.
        """
        if not 0 <= z < self.shape[0]:
            raise SettingsError(f"{self.name}: has no plane {z}; its planes are 0 to {self.shape[0] - 1}")
        whole = self.shape[1:3]
        corner = [max(0, (n - side) // 2) if side else 0 for n in whole]
        spans = [slice(start, start + (side or n)) for start, n in zip(corner, whole, strict=True)]
        result: Array = self.read(slice(z, z + 1), *spans)[0]
        return result

    def along(self, axis: str) -> Volume:
        """The same voxels with planes across another axis: planes (z, x) along "y", planes (z, y) along "x".

        Shape, scale, origin and chunks are in the new order; ``levels`` stay as they are.
        """
        return self._reordered({"y": (1, 0, 2), "x": (2, 0, 1)}[axis])

    def _reordered(self, order: tuple[int, int, int]) -> Volume:
        """The same voxels; z, y and x are what these axes, by number, are now."""
        letters = str.maketrans({"zyx"[old]: new for new, old in zip("zyx", order, strict=True)})
        z, y, x = order
        return replace(
            self,
            shape=(*(self.shape[k] for k in order), *self.shape[3:]),
            scale=(self.scale[z], self.scale[y], self.scale[x]),
            origin=(self.origin[z], self.origin[y], self.origin[x]),
            chunks=(self.chunks[z], self.chunks[y], self.chunks[x]),
            _source=_Renamed(self._source, letters),
            directions="".join(self.directions[k] for k in order if self.directions),
            order="".join(self.order[k] for k in order),
        )

    def __getitem__(self, key: Any) -> Array:
        """Basic indexing with numbers and slices, as dask and napari do."""
        spans, rest = split_index(key, self.shape)
        voxels = self.read(*spans[:3])
        if self.ndim == 4:
            voxels = voxels[..., spans[3]]
        return voxels[rest]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All voxels, as `read` gives them."""
        return np.array(self.read(), dtype, copy=copy)

    def close(self) -> None:
        """Let go of open files; reading is over then."""
        self._source.close()

    def __enter__(self) -> Volume:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (*self._reopen, self.order)

    def __dask_tokenize__(self) -> str:
        return json.dumps([str(self.location), self.identity, self.order], sort_keys=True, default=str)

    def _ordered(self, voxels: Array) -> Array:
        """Axes of the source brought to z, y, x[, c]; those that are not wanted have length 1 here."""
        axes = self._source.axes
        names = [a for a in self.axes if a in axes]
        others = [a for a in axes if a not in names]
        voxels = voxels.transpose([axes.index(a) for a in (*names, *others)])
        voxels = voxels.reshape(voxels.shape[: len(names)])
        return voxels if "z" in names else voxels[None]


def split_index(key: Any, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice | int, ...]]:
    """Basic indexing as a box to be read (slices without steps) and what to take from that box.

    Raises
    ------
    IndexError
        As numpy does; also for steps backwards, and for what is neither a number nor a slice.
    """
    key = key if isinstance(key, tuple) else (key,)
    if Ellipsis in key:
        position = key.index(Ellipsis)
        key = (*key[:position], *(slice(None),) * (len(shape) - len(key) + 1), *key[position + 1 :])
    key = (*key, *(slice(None),) * (len(shape) - len(key)))
    if len(key) > len(shape):
        raise IndexError(f"{len(key)} indices for {len(shape)} axes")
    spans: list[slice] = []
    rest: list[slice | int] = []
    for part, n in zip(key, shape, strict=True):
        if isinstance(part, slice):
            start, stop, step = part.indices(n)
            if step < 1:
                raise IndexError("a volume is not read backwards")
            spans.append(slice(start, max(start, stop)))
            rest.append(slice(None, None, step))
        else:
            position = _position(part, n)
            if not 0 <= position < n:
                raise IndexError(f"index {part} is out of range for an axis of {n}")
            spans.append(slice(position, position + 1))
            rest.append(0)
    return tuple(spans), tuple(rest)


def _position(part: Any, n: int) -> int:
    """An index from the start of an axis of ``n``."""
    try:
        number = operator.index(part)
    except TypeError:
        raise IndexError(f"index {part!r} is no whole number; give whole numbers and slices") from None
    return number + n if number < 0 else number


def open_volume(
    source: Any,
    *,
    axes: str | None = None,
    level: SupportsIndex = 0,
    channel: int | str | None = None,
    time: int | None = None,
    series: int | None = None,
    labels: bool = False,
    replace_nan: float | None = None,
) -> Volume:
    """Open a volume without reading its voxels.

    Parameters
    ----------
    source : path or array
        OME-Zarr (0.1 to 0.5; zarr format 2 or 3, sharded or not, also zipped), any zarr array, TIFF (OME also of
        several files, ImageJ, BigTIFF, pyramids), MRC, NIfTI, a DICOM series (a folder, or one file), a folder of
        planes, a .npy file, another image file; OME-Zarr or zarr at an address (https://, s3://); or an array with
        shape, dtype and indexing (numpy, dask, zarr). A `Volume` is returned as it is.
    axes : str, optional
        One letter of "tczyx" a dimension, where the source does not say (or says wrong) what its dimensions are.
        Without it, arrays of two and three dimensions are "yx" and "zyx".
    level : int
        Resolution; 0 is the finest.
    channel : int or "all", optional
        Needed where there are several, unless they are the samples of a color picture, which stay together.
    time : int, optional
        Needed where there are several time points.
    series : int, optional
        Which image of a file that holds several.
    labels : bool
        PNG and BMP hold numbers of labels: a palette gives its numbers, and gray of few bits is not stretched.
    replace_nan : float, optional
        What voxels that are NaN, infinite or beyond 3e38 are read as. Without it they are read as they are, and an
        image that has one cannot be learned from or segmented.

    Returns
    -------
    Volume

    Raises
    ------
    InputFileError
        If it is missing, damaged, cut short, or of an unknown kind.
    SettingsError
        If there is no such level, channel, time point or series, or one has to be chosen, or the axes are not known,
        or ``replace_nan`` is no number of the volume's type, or a volume that is open is given with options.
    ImageError
        If the array cannot be an image (axes, dtype, empty).

    Examples
    --------
    >>> volume = open_volume(np.zeros((4, 32, 32), np.uint8))
    >>> volume.shape, volume.axes
    ((4, 32, 32), 'zyx')
    >>> volume.read(slice(0, 1), slice(0, 8), slice(0, 8)).shape
    (1, 8, 8)
    """
    level = _level(level)
    options: dict[str, Any] = {
        "axes": axes,
        "level": level,
        "channel": channel,
        "time": time,
        "series": series,
        "labels": labels,
    }
    options |= {} if replace_nan is None else {"replace_nan": float(replace_nan)}
    if isinstance(source, Volume):
        if given := [name for name, value in options.items() if value is not None and value != _PLAIN.get(name)]:
            raise SettingsError(f"{source.name}: is open, so {given[0]} cannot be chosen; give its path or array")
        return source
    address = address_of(source) if isinstance(source, (str, Path)) else None
    source = source if address is None else address
    path = Path(source) if isinstance(source, (str, Path)) and address is None else None
    name = str(source) if isinstance(source, (str, Path)) else "array"
    opened = _find(source, name, level, axes, series, labels=labels)
    if path is None and address is None and level:
        raise SettingsError(f"{name}: has no level {level}; an array has only level 0")
    try:
        return _choose(name, path, opened, options, source)
    except BaseException:
        opened.source.close()
        raise


def _level(level: Any) -> int:
    """A level as a number, also one of numpy."""
    try:
        number = operator.index(level)
    except TypeError:
        number = -1
    if number < 0:
        raise SettingsError(f"level {level} is not possible; give 0 (the finest), 1, ...")
    return number


def _find(source: Any, name: str, level: int, axes: str | None, series: int | None, *, labels: bool = False) -> Opened:
    try:
        if isinstance(source, Address):
            return open_address(source, level, axes, series)
        if isinstance(source, (str, Path)):
            return open_any(Path(source), level, axes, series, labels=labels)
        return open_array(source, axes)
    except (SettingsError, ImageError, InputFileError):
        raise
    except READ_ERRORS as error:
        raise InputFileError(f"{name}: cannot be opened ({reason(error)}); check that it is whole") from error


def count_choices(path: str | Path, *, axes: str | None = None, series: int | None = None) -> dict[str, int]:
    """How many time points ("t") and channels ("c") a file has of which `open_volume` wants one; {} without a choice.

    Raises
    ------
    InputFileError, SettingsError, ImageError
        As `open_volume` does.
    """
    source = address_of(path) or path
    opened = _find(source, str(source), 0, axes, series)
    opened.source.close()
    size = dict(zip(opened.source.axes, opened.source.shape, strict=True))
    return {a: int(size[a]) for a in "tc" if size.get(a, 1) > 1 and not (a == "c" and opened.color)}


def read_channels(path: str | Path, *, axes: str | None = None, series: int | None = None) -> tuple[Channel, ...]:
    """Name, color and range of display of each channel, from OMERO's metadata, OME-XML or ImageJ's.

    Parameters
    ----------
    path : path or address
    axes, series
        As for `open_volume`.

    Returns
    -------
    tuple of Channel
        One for each channel of `count_choices`; empty where there is no choice of a channel.

    Raises
    ------
    InputFileError, SettingsError, ImageError
        As `open_volume` does.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> path = Path(tempfile.mkdtemp()) / "a.ome.tif"
    >>> about = {"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP"]}}
    >>> tifffile.imwrite(path, np.zeros((2, 8, 9), np.uint8), photometric="minisblack", metadata=about)
    >>> [channel.name for channel in read_channels(path)]
    ['DAPI', 'GFP']
    """
    source = address_of(path) or path
    opened = _find(source, str(source), 0, axes, series)
    opened.source.close()
    size = dict(zip(opened.source.axes, opened.source.shape, strict=True))
    count = 0 if opened.color or size.get("c", 1) == 1 else size["c"]
    return (*opened.channels[:count], *[Channel()] * (count - len(opened.channels)))


def axis_sizes(path: str | Path, *, series: int | None = None) -> dict[str, int]:
    """The axes of a file in the order in which it states them, each one letter of "tczyx" with its length.

    Raises
    ------
    InputFileError, SettingsError, ImageError
        As `open_volume` does.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.npy"
    >>> np.save(path, np.zeros((4, 8, 9), np.uint8))
    >>> axis_sizes(path)
    {'z': 4, 'y': 8, 'x': 9}
    """
    source = address_of(path) or path
    opened = _find(source, str(source), 0, None, series)
    opened.source.close()
    return {a: int(n) for a, n in zip(opened.source.axes, opened.source.shape, strict=True)}


def _open_again(source: Any, options: dict[str, Any], order: str) -> Volume:
    volume = open_volume(source, **options)
    z, y, x = ("zyx".index(axis) for axis in order)
    return volume if order == "zyx" else volume._reordered((z, y, x))


class _Replaced:
    """A source of floating values in which those that cannot be used are replaced by a number."""

    def __init__(self, source: Source, value: float) -> None:
        self.source, self.axes, self.value = source, source.axes, value
        self.shape, self.dtype, self.chunks = source.shape, source.dtype, source.chunks

    @property
    def missing(self) -> Collection[str]:
        missing: Collection[str] = getattr(self.source, "missing", ())
        return missing

    def get(self, box: tuple[slice, ...]) -> Array:
        voxels = np.asarray(self.source.get(box))
        usable = is_usable(voxels)
        return voxels if usable.all() else np.where(usable, voxels, voxels.dtype.type(self.value))

    def close(self) -> None:
        self.source.close()


class _Renamed:
    """A source whose axes go by other letters."""

    def __init__(self, source: Source, letters: dict[int, str]) -> None:
        self.source, self.axes = source, source.axes.translate(letters)
        self.shape, self.dtype, self.chunks = source.shape, source.dtype, source.chunks

    def get(self, box: tuple[slice, ...]) -> Array:
        return self.source.get(box)

    def close(self) -> None:
        self.source.close()


def _identity(opened: Opened, details: Mapping[str, Any], name: str) -> dict[str, Any]:
    identity = {**opened.identity, **details}
    if opened.content is not None:
        try:
            identity["content"] = opened.content()
        except InputFileError:
            raise
        except READ_ERRORS as error:
            raise InputFileError(f"{name}: cannot be read ({reason(error)}); check that it is whole") from error
    return identity


def _choose(name: str, path: Path | None, opened: Opened, options: dict[str, Any], original: Any) -> Volume:
    """Settle time and channel; what is left is z, y, x and perhaps c."""
    source = opened.source
    axes, shape = source.axes, source.shape
    if 0 in shape:
        raise ImageError(f"{name}: is empty (shape {shape})")
    if source.dtype.kind not in "buif":
        raise ImageError(f"{name}: cannot use voxels of type {source.dtype}; give integers, floats or bool")
    replace_nan = options.get("replace_nan")
    if replace_nan is not None and source.dtype.kind == "f":
        with np.errstate(over="ignore"):  # of a type that is too small for it
            number = np.full(1, replace_nan).astype(source.dtype)
        if not is_usable(number).all():
            raise SettingsError(f"{name}: replace_nan {replace_nan} is no finite {source.dtype}; give one, e.g. 0")
        source = _Replaced(source, replace_nan)
    size = dict(zip(axes, shape, strict=True))
    points, count = size.get("t", 1), size.get("c", 1)
    time = _time_point(name, options["time"], points)
    channel = _channel(name, options["channel"], count, opened)
    kept = {"t": slice(time, time + 1), "c": slice(0, count) if channel == "all" else slice(channel, channel + 1)}
    spatial = tuple(size.get(a, 1) for a in "zyx")
    chunk = dict(zip(axes, source.chunks, strict=True))
    levels = [dict(zip(axes, s, strict=False)) for s in opened.levels or (shape,)]
    details = {
        "axes": axes,
        "shape": list(shape),
        "dtype": str(source.dtype),
        "level": options["level"],
        "time": options["time"],
        "channel": "all" if channel == "all" else None if options["channel"] is None else channel,
    }
    details |= {} if replace_nan is None else {"replace_nan": replace_nan}
    identify = partial(_identity, opened, details, name)
    return Volume(
        name=name,
        shape=(*spatial, count) if channel == "all" and count > 1 else spatial,
        dtype=source.dtype,
        scale=(opened.step.get("z"), opened.step.get("y"), opened.step.get("x")),
        unit=opened.unit,
        origin=(opened.origin.get("z", 0.0), opened.origin.get("y", 0.0), opened.origin.get("x", 0.0)),
        level=options["level"],
        levels=tuple((s.get("z", 1), s.get("y", 1), s.get("x", 1)) for s in levels),
        chunks=(chunk.get("z", 1), chunk.get("y", 1), chunk.get("x", 1)),
        path=path,
        address=str(original) if isinstance(original, Address) else None,
        _identify=identify if isinstance(original, np.ndarray) else cache(identify),
        _source=source,
        _fixed={axis: kept[axis] for axis in "tc" if axis in axes},
        _reopen=(original if path is None else path.absolute(), options),
        is_label_image=opened.labels,
        directions=opened.directions,
    )


def _time_point(name: str, time: int | None, points: int) -> int:
    """The time point that is meant; it must be given where there are several."""
    if time is None and points > 1:
        raise SettingsError(f"{name}: has {points} time points; choose one, time 0 to {points - 1}")
    if time is not None and not 0 <= time < points:
        raise SettingsError(f"{name}: has no time point {time}; choose 0 to {points - 1}")
    return time or 0


def _channel(name: str, channel: int | str | None, count: int, opened: Opened) -> Any:
    """The number of the channel that is meant, or "all"; it must be given where there are several, but of a picture."""
    listed = f" ({', '.join(opened.channel_names)})" if opened.channel_names else ""
    if channel == "all" or (channel is None and opened.color):
        return "all"
    if channel is None:
        if count > 1:
            raise SettingsError(f"{name}: has {count} channels{listed}; choose one, channel 0 to {count - 1}, or all")
        return 0
    names = opened.channel_names[:count]
    if isinstance(channel, str):
        return _channel_by_name(name, channel, names, listed)
    if not 0 <= channel < count:
        if str(channel) in names:
            return _channel_by_name(name, str(channel), names, listed)
        raise SettingsError(f"{name}: has no channel {channel}{listed}; choose 0 to {count - 1}, a name, or all")
    if str(channel) in names and names.index(str(channel)) != channel:
        log.warning(
            "%s: channel %d is read by its number from 0%s; the channel named %r has number %d",
            name,
            channel,
            f", named {names[channel]!r}" if channel < len(names) else "",
            str(channel),
            names.index(str(channel)),
        )
    return channel


def _channel_by_name(name: str, channel: str, names: Sequence[str], listed: str) -> int:
    """The number of a channel, by its name; upper and lower case matter only where names differ in nothing else."""
    exact = [number for number, label in enumerate(names) if label == channel]
    numbers = exact or [number for number, label in enumerate(names) if label.lower() == channel.lower()]
    if not numbers:
        raise SettingsError(f"{name}: has no channel {channel!r}{listed}; give its number from 0, or all")
    if len(numbers) > 1:
        raise SettingsError(f"{name}: has several channels {channel!r}{listed}; give one by its number from 0")
    return numbers[0]
