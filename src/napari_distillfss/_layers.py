"""Conversion between napari's image layers and volumes of the core; axes, scale, units and position are kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pint

import distillfss_core as core

if TYPE_CHECKING:
    from napari.layers import Image, Labels

_HELD = 4096**2  # pixels of a plane of results that may be held
_CANVAS = 1024  # pixels that fill a canvas, so that napari shows no finer level of a pyramid at first
_SAMPLE = 128  # pixels around the middle of a plane, by which a file and an array are compared

FROM_FILE = "distillfss"
"""Key of a layer's metadata under which the file it shows, and how that was opened, are kept."""

FIRST_NAME = "distillfss_name"
"""Key of a layer's metadata under which its name is kept when it is first chosen."""

REPLACE_NAN = "distillfss_replace_nan"
"""Key of a layer's metadata: the number that its pixels are read as that are not finite; None if it is offered only."""

_LEFT = "distillfss_left"  # key of a layer's metadata: its part in a dock that is closed

_FILLED = 0.95  # of the canvas, by a volume that is fitted to it
_OPAQUE = 0.9  # opacity from which on hardly anything is seen through a layer
_COVERING = ("opaque", "translucent", "translucent_no_depth")  # ways of blending

_TWO_COLORS, _COLORS = ("magenta", "green"), ("cyan", "magenta", "yellow", "blue", "green", "red")  # napari's

LEAD_NAMES = {"t": "time", "c": "channel"}

Point = Sequence[float] | npt.NDArray[np.float64]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


ANNOTATIONS, LABELS = "distillfss_annotations", "distillfss_labels"
PREVIEW, OBJECT = "distillfss_preview", "distillfss_mark"
"""Keys of the metadata of the layers that the dock adds: painted, written, previewed, and around an object."""


@dataclass(frozen=True, eq=False)
class ChosenVolume:
    """A volume and the grid of its voxels in napari's world.

    Parameters
    ----------
    layer : napari Image layer
    volume : core.Volume
        (z, y, x) or (z, y, x, c); a plane is a volume of one.
    lead : mapping of letter to index
        What of time and channels was chosen, in the layer's order.
    axes : str
        Letters of the layer's axes in its order, without colors: "zyx", "zcyx".
    factors : (z, y, x)
        How many voxels of the layer's finest level one of the volume's covers.
    opening : mapping
        What `core.open_volume` was told beside the source: level, time, channel, axes.
    """

    layer: Image | Labels
    volume: Any
    lead: Mapping[str, int] = field(default_factory=dict)
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    opening: Mapping[str, Any] = field(default_factory=dict)
    axes: str = "zyx"

    @property
    def name(self) -> str:
        return str(self.layer.name)

    @property
    def first_name(self) -> str:
        """Name of the file, or that the layer had when this was first asked. Annotations are under it.

        So a new name of the layer loses none, and it does not matter which part of napari has opened the file.
        """
        location = self.volume.location
        name = Path(location).name if location else self.name
        return str(self.layer.metadata.setdefault(FIRST_NAME, name))

    @property
    def planes(self) -> int:
        return int(self.volume.shape[0])

    @property
    def plane_shape(self) -> tuple[int, int]:
        return int(self.volume.shape[1]), int(self.volume.shape[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an array on this grid with the axes of the layer; chosen time and channel axes have length 1."""
        return tuple(int(n) for n in self._along_axes(dict.fromkeys("tc", 1), self.volume.shape[:3]))

    @property
    def pixel_size(self) -> tuple[float, float] | None:
        """Size of a pixel (y, x) in micrometers, if the layer's units are lengths."""
        _, y, x = self.volume.scale
        return (y, x) if self.volume.unit and y and x else None

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able; two grids of voxels that differ in it are not the same. See `core.Volume.identity`."""
        return identity_of(self.volume, self.lead, self.factors)

    @property
    def record(self) -> dict[str, Any]:
        """What is needed to find the volume again, without the layer; JSON-able."""
        return {
            "name": self.first_name,
            "location": self.volume.location,
            "opening": dict(self.opening),
            "lead": dict(self.lead),
            "factors": list(self.factors),
            "axes": self.axes,
            "pixel_size": list(self.pixel_size) if self.pixel_size else None,
        }

    def index(self, z: int) -> tuple[Any, ...]:
        """Index of plane ``z`` in an array of `shape`."""
        return index_of(self.axes, z)

    def place(self, z: int = 0, y: int = 0, x: int = 0) -> dict[str, Any]:
        """Keywords of a layer whose array lies on this grid and starts at voxel ``z``, ``y``, ``x``."""
        layer, factors = self.layer, self.factors
        middles = [(f - 1) / 2 for f in factors]
        first = [m + n * f for m, n, f in zip(middles, (z, y, x), factors, strict=True)]
        offset = self._along_axes(self.lead, first)
        return {
            "scale": layer.scale * np.array(self._along_axes(dict.fromkeys("tc", 1.0), factors)),
            "translate": layer.affine.inverse(layer.data_to_world(np.array(offset, float))),
            "rotate": layer.rotate,
            "shear": layer.shear,
            "affine": layer.affine,
            "units": layer.units,
            "axis_labels": layer.axis_labels,
        }

    def plane_at(self, point: Point) -> int:
        """Plane that napari shows at a point of the world; the nearest plane for a point outside the volume."""
        if "z" not in self.axes:
            return 0
        f = self.factors[0]
        z = (self.layer.world_to_data(point)[self.axes.index("z") - len(self.axes)] - (f - 1) / 2) / f
        return int(np.clip(np.round(z), 0, self.planes - 1))  # as napari does, where a point lies between two planes

    def plane_on(self, dims: Any) -> int:
        """Plane at napari's sliders, whose units may be others than the layer's."""
        return self.plane_at(point_on(self.layer, dims))

    def point_of(self, z: float, y: float | None = None, x: float | None = None) -> np.ndarray:
        """World coordinates of a voxel, one number for each axis of the layer; by default the middle of plane ``z``."""
        rows, columns = self.plane_shape
        voxel = (z, rows / 2 if y is None else y, columns / 2 if x is None else x)
        inside = [v * f + (f - 1) / 2 for v, f in zip(voxel, self.factors, strict=True)]
        return np.asarray(self.layer.data_to_world(self._along_axes(self.lead, inside)))

    def on_grid(self, array: Any) -> OnGrid:
        """An array (z, y, x) of the volume's size, seen with the axes of the layer."""
        return OnGrid(array, self.axes)

    def pyramid(self, levels: Sequence[Any], *, shown: Collection[int] = ()) -> Any:
        """Arrays (z, y, x), finest first, as data of a multiscale layer; napari takes no list of a single level.

        Parameters
        ----------
        shown : collection of int, optional
            The planes that napari shows first, which are read here. For a layer that is made of the data, it reads
            plane 0 before the one at its sliders.
        """
        from napari.layers._multiscale_data import MultiScaleData

        seen = [self.on_grid(level) for level in levels]
        for level in seen:
            level.hold({z * level.planes // self.planes for z in shown})
        return MultiScaleData(seen)

    def on_screen(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Part (y, x) of a plane that the canvas shows; the whole plane if it is not known."""
        corners = np.asarray(self.layer.corner_pixels, float)[:, -2:]
        if self.layer.multiscale:
            shapes = self.layer.level_shapes[:, -2:]
            corners *= shapes[0] / shapes[self.layer.data_level]
        corners /= self.factors[1:]
        spans = []
        for (a, b), n in zip(corners.T, self.plane_shape, strict=True):
            start, stop = max(0, math.floor(a)), min(n, math.ceil(b) + 1)
            spans.append((start, stop) if stop > start + 1 else (0, n))
        return spans[0], spans[1]

    def _along_axes(self, lead: Mapping[str, float], spatial: Sequence[float]) -> list[float]:
        """Numbers for time and channel, and for (z, y, x), in the order of the layer's axes."""
        numbers = {**lead, **dict(zip("zyx", spatial, strict=True))}
        return [numbers[a] for a in self.axes]


def identity_of(volume: Any, lead: Mapping[str, int], factors: Sequence[float]) -> dict[str, Any]:
    """Identity of a volume (core.Volume) as a grid of voxels, whatever is read where they are not finite."""
    own = {name: value for name, value in volume.identity.items() if name != "replace_nan"}
    return {**own, "lead": dict(lead), "factors": list(factors)}


def index_of(axes: str, z: int) -> tuple[Any, ...]:
    """Index of plane ``z`` in an array with these axes, of which time and channel have length 1."""
    return tuple(z if a == "z" else 0 for a in axes[:-2])


def layer_axes(layer: Image | Labels) -> str:
    """Letters of the axes of a layer in its order, without colors: as the layer's labels or its file state them.

    Where neither does, the axes before z y x are time, or time and channels. Time points of a plane are its planes.

    Raises
    ------
    core.ImageError
        If the layer is none that can be segmented, in one sentence.
    """
    if type(layer).__name__ not in ("Image", "Labels"):
        raise core.ImageError(f"layer {layer.name!r} has neither an image nor labels; choose one that has")
    extra, is_rgb = layer.ndim - 3, _is_rgb(layer)
    if layer.ndim < 2 or extra > (1 if is_rgb else 2):
        raise core.ImageError(
            f"layer {layer.name!r} has {layer.ndim} dimensions{' and colors' if is_rgb else ''}; planes and "
            "stacks, with time and channels at most, can be segmented"
        )
    letters = _labeled_axes(layer) or _axes_in_file(layer)
    if letters and letters[-2:] != "yx":
        raise core.ImageError(
            f"layer {layer.name!r} has axes {letters}, and y and x are not its last; put them last, or open the file "
            "with the dock's File button"
        )
    if letters:
        return letters if "z" in letters else letters.replace("t", "z")
    if extra == 1 and not is_rgb and str(layer.axis_labels[0]).lower() in ("c", "channel"):
        return "czyx"
    return "tc"[: max(0, extra)] + "zyx"[-min(layer.ndim, 3) :]


def has_mark(layer: Any, *marks: str) -> bool:
    """Whether the dock has added the layer, with one of these keys."""
    return any(layer.metadata.get(mark) for mark in marks)


def leave(layer: Any, part: str) -> None:
    """Hide a layer whose dock is closed, for the next dock to take up for the same part."""
    layer.visible = False
    layer.metadata[_LEFT] = part


def take_up(layers: Sequence[Any], part: str) -> Any:
    """The layer that a closed dock has left for a part; None if there is none."""
    for layer in layers:
        if layer.metadata.get(_LEFT) == part:
            del layer.metadata[_LEFT]
            return layer
    return None


def is_image(layer: Any) -> bool:
    """Whether a layer is an image of the user."""
    return type(layer).__name__ == "Image" and not has_mark(layer, PREVIEW)


def _is_rgb(layer: Any) -> bool:
    return bool(getattr(layer, "rgb", False))  # a Labels layer has none


def lead_axes(layer: Image | Labels) -> str:
    """Letters of the axes of which one position is chosen: "", "t", "c", "tc" or "ct"; errors are `layer_axes`'s."""
    return "".join(a for a in layer_axes(layer) if a in LEAD_NAMES)


def lead_at(layer: Image | Labels, point: Point) -> dict[str, int]:
    """Positions at a point of napari's world along the axes of `lead_axes`, the nearest that the layer has."""
    places = zip(layer_axes(layer), layer.world_to_data(point[-layer.ndim :]), finest_shape(layer), strict=False)
    return {a: int(np.clip(round(float(place)), 0, n - 1)) for a, place, n in places if a in LEAD_NAMES}


def is_at(layer: Image | Labels, point: Point, displayed: Sequence[int]) -> bool:
    """Whether a layer has pixels at a point of napari's world, wherever that lies along the displayed axes."""
    place = np.round(layer.world_to_data(point)[-layer.ndim :])
    inside = (place >= 0) & (place < finest_shape(layer)[: layer.ndim])
    shown = [axis - len(point) for axis in displayed]
    return all(inside[axis] for axis in range(-layer.ndim, 0) if axis not in shown)


def shows_planes(dims: Any) -> bool:
    """Whether napari shows planes (y, x) of volumes: in 2D, and in their own order of axes."""
    return bool(dims.ndisplay == 2 and tuple(dims.displayed) == (dims.ndim - 2, dims.ndim - 1))


def point_on(layer: Image | Labels, dims: Any) -> np.ndarray:
    """Where napari's sliders are, in the units of a layer: the world has the smallest unit of all layers.

    Where all layers of as many axes were removed, there are too few sliders: at the first pixel of the layer then.
    """
    if dims.ndim < layer.ndim:
        return np.asarray(layer.data_to_world((0,) * layer.ndim))
    point = np.array(dims.point, float)
    point[-layer.ndim :] *= _units_of_world(layer, dims)
    return point


def to_world(layer: Image | Labels, dims: Any, place: Point) -> np.ndarray:
    """A place in the units of a layer, one number for each of its axes, in those of napari's world."""
    return np.asarray(place / _units_of_world(layer, dims))


def _units_of_world(layer: Image | Labels, dims: Any) -> np.ndarray:
    """Units of napari's world over those of a layer; 1 where the layers have no units in common."""
    world = getattr(dims, "units", None)  # since napari 0.9
    if world is None:
        return np.ones(layer.ndim)
    pairs = zip(world[-layer.ndim :], layer.units, strict=True)
    return np.array([1.0 if a == b else float((1 * a).to(b).magnitude) for a, b in pairs])


def units_beside(layer: Image | Labels, layers: Sequence[Any]) -> str:
    """What follows from the units of other images for a layer, in one sentence; "" where all have the same."""
    own = layer.units[-1]
    for other in layers:
        unit = other.units[-1] if is_image(other) else own
        if _micrometers(own) is None and _micrometers(unit) is not None:
            return f"beside {other.name!r} napari takes its scale to be in {unit}s"
        if _micrometers(own) not in (None, _micrometers(unit)) and _micrometers(unit) is not None:
            return f"{other.name!r} is in {unit}s, this layer in {own}s: give both one unit, or napari's brush misses"
    return ""


def move_sliders(dims: Any, chosen: ChosenVolume, z: float, y: float | None = None, x: float | None = None) -> Point:
    """Show the plane of a voxel, by default of the middle of plane ``z``. Returns the voxel's place in the world."""
    place: Point = to_world(chosen.layer, dims, chosen.point_of(z, y, x))
    for axis, value in enumerate(place[:-2], dims.ndim - len(place)):
        dims.set_point(axis, value)
    return place


def show_whole(viewer: Any, chosen: ChosenVolume) -> None:
    """Show a plane of a volume if none is on screen, and all of the plane."""
    dims = viewer.dims
    if not is_at(chosen.layer, point_on(chosen.layer, dims), dims.displayed):
        move_sliders(dims, chosen, chosen.plane_on(dims))
    if not shows_planes(dims) or not hasattr(viewer, "canvas"):  # an older napari does not tell its size
        viewer.fit_to_view()
        return
    # napari's own fit to a layer fails beside layers of more axes
    low, high = to_world(chosen.layer, dims, chosen.layer.extent.world)[:, -2:]
    camera = camera_of(viewer)
    camera.center = (0, *(low + high) / 2)
    camera.zoom = _FILLED * float(np.min(viewer.canvas.size / np.maximum(high - low, np.finfo(float).tiny)))


def take_units(layers: Sequence[Any], image: Image) -> None:
    """Give hidden layers of the dock the units of an image: they would keep napari from one unit for all layers."""
    for layer in layers:
        if has_mark(layer, ANNOTATIONS, PREVIEW, OBJECT) and not layer.visible:
            units = (*layer.units[: -image.ndim], *image.units)[-layer.ndim :]
            if units != layer.units:
                layer.units = units


def finest_shape(layer: Image | Labels) -> tuple[int, ...]:
    """Shape of the array of a layer, of the finest if there are several, with colors."""
    return tuple(layer.level_shapes[0] if layer.multiscale else layer.data.shape)


def _labeled_axes(layer: Image | Labels) -> str:
    """The letters that the layer's axis labels are; "" where they are others."""
    words = {name: letter for letter, name in LEAD_NAMES.items()}
    letters = [words.get(str(label).lower(), str(label).lower()) for label in layer.axis_labels]
    return "".join(letters) if _are_axes(letters) else ""


def _axes_in_file(layer: Image | Labels) -> str:
    """The axes that the file of a layer states for an array of this shape; "" where it states none."""
    path = layer.source.path
    if path is None or not Path(path).exists() or layer.ndim < 3:
        return ""
    shape = tuple(int(n) for n in (layer.data[0] if layer.multiscale else layer.data).shape)
    try:
        sizes = _file_axes(str(path), Path(path).stat().st_mtime_ns)
    except core.DistillFSSError:  # a file that only napari reads, or one that is damaged: reading it gives the error
        return ""
    longer = {a: n for a, n in sizes.items() if n > 1}
    stated = next((s for s in (sizes, longer) if tuple(s.values()) == shape), {})
    letters = "".join(a for a in stated if not (_is_rgb(layer) and a == "c"))
    return letters if len(letters) == layer.ndim and _are_axes(letters) else ""


@lru_cache(maxsize=32)
def _file_axes(path: str, modified: int) -> dict[str, int]:
    """The axes of the first image of a file, that napari shows; `modified` tells versions of a file apart."""
    return core.axis_sizes(path, series=0)


def _are_axes(letters: Sequence[str]) -> bool:
    return len(set(letters)) == len(letters) and set(letters) <= set("tczyx") and {"y", "x"} <= set(letters)


def choose_layer(
    layer: Image, *, lead: Mapping[str, int] | None = None, level: int = 0, replace_nan: float | None = None
) -> ChosenVolume:
    """Open the volume that an image layer shows; parts of three planes are read at most.

    Where the layer still shows what is in its file, the volume is that of the file.

    Parameters
    ----------
    layer : napari Image layer
        2-D to 5-D, also RGB, multiscale, dask, zarr.
    lead : mapping of letter to index, optional
        Time point ("t") and channel ("c") where the layer has such axes; 0 by default.
    level : int
        Resolution of a multiscale layer, 0 is the finest.
    replace_nan : float, optional
        What pixels that are not finite are read as, where the layer itself has no choice.

    Raises
    ------
    core.DistillFSSError
        If it cannot be segmented, in one sentence.
    """
    if type(layer).__name__ != "Image":
        raise core.ImageError(f"layer {layer.name!r} is no image; choose an image layer")
    axes = layer_axes(layer)
    chosen = {a: (lead or {}).get(a, 0) for a in axes if a in LEAD_NAMES}
    levels = list(layer.data) if layer.multiscale else [layer.data]
    if not 0 <= level < len(levels):
        raise core.SettingsError(f"layer {layer.name!r} has no level {level}; its levels are 0 to {len(levels) - 1}")
    ratio = {a: fine / coarse for a, fine, coarse in zip(axes, levels[0].shape, levels[level].shape, strict=False)}
    factors = (ratio.get("z", 1.0), ratio["y"], ratio["x"])
    own = layer.metadata.get(REPLACE_NAN)
    volume, opening = _open(layer, levels[level], axes, chosen, level, replace_nan if own is None else own)
    _, unit = _scale(layer, axes, factors)
    result = ChosenVolume(layer, volume, chosen, factors, opening, axes)
    return _placed(result) if unit or volume.unit is None else result  # a file may know its scale better than the layer


def choose_labels(layer: Labels, point: Sequence[float]) -> ChosenVolume:
    """Open the labels that a layer shows, as they are in napari now; nothing is read.

    Parameters
    ----------
    layer : napari Labels layer
        2-D to 5-D, also multiscale, dask, zarr.
    point : sequence of float
        Of napari's world: the time point and channel there are chosen.

    Raises
    ------
    core.DistillFSSError
        If it has axes that cannot be used.
    """
    axes, chosen = layer_axes(layer), lead_at(layer, point)
    array = layer.data[0] if layer.multiscale else layer.data
    volume = core.open_volume(array, axes=axes, time=chosen.get("t"), channel=chosen.get("c"))
    return _placed(ChosenVolume(layer, volume, chosen, axes=axes))


def volumes_over_time(
    layer: Image, point: Sequence[float], *, all_times: bool, replace_nan: float | None = None
) -> list[tuple[int | None, Any]]:
    """The volumes of an image layer with their time points; None where it has no axis of time.

    Parameters
    ----------
    layer : napari Image layer
    point : sequence of float
        Of napari's world: the channel there is chosen, and the time point unless all are wanted.
    all_times : bool
    replace_nan : float, optional
        As for `choose_layer`.

    Raises
    ------
    core.DistillFSSError
        As `choose_layer`.
    """
    lead = lead_at(layer, point)
    if "t" not in lead:
        return [(None, choose_layer(layer, lead=lead, replace_nan=replace_nan).volume)]
    times = range(finest_shape(layer)[layer_axes(layer).index("t")]) if all_times else [lead["t"]]
    return [(t, choose_layer(layer, lead={**lead, "t": t}, replace_nan=replace_nan).volume) for t in times]


def _placed(chosen: ChosenVolume) -> ChosenVolume:
    """The volume with name, scale and place of its layer."""
    scale, unit = _scale(chosen.layer, chosen.axes, chosen.factors)
    origin = _origin(chosen) if any(scale) else (0.0, 0.0, 0.0)
    return replace(chosen, volume=replace(chosen.volume, name=chosen.name, scale=scale, unit=unit, origin=origin))


def _open(
    layer: Image, array: Any, axes: str, chosen: Mapping[str, int], level: int, replace_nan: float | None
) -> tuple[Any, Mapping[str, Any]]:
    channel = "all" if layer.rgb else chosen.get("c")
    replaced: dict[str, Any] = {} if replace_nan is None else {"replace_nan": replace_nan}
    options: dict[str, Any] = {"level": level, "time": chosen.get("t"), "channel": channel, **replaced}
    from_array = core.open_volume(array, axes=axes + "c" * layer.rgb, time=options["time"], channel=channel, **replaced)
    remembered = layer.metadata.get(FROM_FILE)
    if remembered and remembered["shown"][level : level + 1] != [getattr(array, "name", "")]:
        return from_array, replaced  # another array was put into the layer since
    path = remembered["path"] if remembered else layer.source.path
    if path is None or not (remembered or Path(path).exists()):
        return from_array, replaced
    options |= remembered["opening"] if remembered else {}
    options = {name: value for name, value in options.items() if value is not None}
    with suppress(core.DistillFSSError):  # a file that only napari understands stays an array
        from_file = core.open_volume(path, **options)
        same = (from_file.shape, from_file.dtype) == (from_array.shape, from_array.dtype)
        if same and (remembered or _alike(from_file, from_array)):
            return from_file, options
    return from_array, replaced


def _alike(a: Any, b: Any) -> bool:
    """Whether the middles of three planes agree with the file; a layer may have been modified since it was read."""
    last = a.shape[0] - 1
    y, x = (slice(max(0, n // 2 - _SAMPLE), n // 2 + _SAMPLE) for n in a.shape[1:3])
    return all(np.array_equal(a[z, y, x], b[z, y, x], equal_nan=True) for z in {0, last // 2, last})


def _scale(layer: Image | Labels, axes: str, factors: Sequence[float]) -> tuple[tuple[float | None, ...], str | None]:
    """Size of a voxel (z, y, x), in micrometers where the layer's units are lengths; None where nothing is known."""
    spatial = [a for a in "zyx" if a in axes]
    step = {a: abs(float(layer.scale[axes.index(a)])) for a in spatial}
    lengths = {a: _micrometers(layer.units[axes.index(a)]) for a in spatial}
    has_scale = lengths["y"] is not None and lengths["x"] is not None
    if not has_scale and all(s == 1 for s in step.values()):
        return (None, None, None), None
    sizes = [step[a] * (lengths[a] or 1.0) * f if a in step else None for a, f in zip("zyx", factors, strict=True)]
    return tuple(sizes), "micrometer" if has_scale else None


def _origin(chosen: ChosenVolume) -> tuple[float, float, float]:
    """Where the first voxel (z, y, x) lies in napari's world, in micrometers where the layer's units are lengths."""
    layer = chosen.layer
    world = np.broadcast_to(chosen.point_of(0, 0, 0), layer.ndim)
    units = dict(zip(chosen.axes, layer.units, strict=True))
    place = dict(zip(chosen.axes, world, strict=True))
    z, y, x = (float(place[a]) * (_micrometers(units[a]) or 1.0) if a in place else 0.0 for a in "zyx")
    return z, y, x


def _micrometers(unit: pint.Unit) -> float | None:
    try:
        return float((1 * unit).to("micrometer").magnitude)
    except pint.DimensionalityError:
        return None


def layer_of_file(path: str | Path, **opening: Any) -> tuple[list[Any], dict[str, Any]]:
    """Lazy pyramid levels of a file (finest first) and keywords of its image layer, with all time points and channels.

    Parameters
    ----------
    path : path
    opening
        time, channel, axes and series, as for `core.open_volume`; a time or channel that is given is the only one.

    Raises
    ------
    core.DistillFSSError
    """
    import dask.array as da

    opening = {name: value for name, value in opening.items() if value is not None}
    of_file = {name: value for name, value in opening.items() if name in ("axes", "series")}
    counts = {a: n for a, n in core.count_choices(path, **of_file).items() if LEAD_NAMES[a] not in opening}

    def lazy(level: int, letters: str, chosen: dict[str, Any]) -> Any:
        if letters:
            each = (chosen | {LEAD_NAMES[letters[0]]: n} for n in range(counts[letters[0]]))
            return da.stack([lazy(level, letters[1:], part) for part in each])
        v = core.open_volume(path, level=level, **opening, **chosen)
        empty = np.empty((0,) * v.ndim, v.dtype)
        return da.from_array(v, chunks=(1, *v.shape[1:]), asarray=False, fancy=False, meta=empty)

    first: dict[str, Any] = {LEAD_NAMES[a]: 0 for a in counts}
    volume = core.open_volume(path, **opening, **first)
    levels = [lazy(level, "".join(counts), {}) for level in range(len(volume.levels))]
    lead = len(counts)
    options: dict[str, Any] = {
        "name": Path(path).name,
        "scale": [1.0] * lead + [s or 1.0 for s in volume.scale],
        "translate": [0.0] * lead + list(volume.origin),
        "axis_labels": (*counts, "z", "y", "x"),
        "rgb": volume.ndim == 4 and volume.shape[3] in (3, 4),
        "multiscale": len(levels) > 1,
        "metadata": {
            FROM_FILE: {
                "path": volume.address or str(Path(path).absolute()),
                "opening": opening,
                "shown": [level.name for level in levels],
                "channels": [c.name for c in core.read_channels(path, **of_file)] if "c" in counts else [],
            }
        },
    }
    if volume.unit:
        options["units"] = ("pixel",) * lead + (volume.unit,) * 3
    return levels, options


def look_of_channel(channels: Sequence[core.Channel], number: int, name: str) -> dict[str, Any]:
    """Keywords of the layer of one channel, added to the light of the others.

    Parameters
    ----------
    channels : sequence of core.Channel
        All of the file. Where none has a color they get those of napari's own split of channels.
    number : int
    name : str
        Of the file.
    """
    channel = channels[number]
    palette = ("gray",) if any(c.color for c in channels) else _TWO_COLORS if len(channels) == 2 else _COLORS
    color = channel.color or palette[number % len(palette)]
    look: dict[str, Any] = {
        "name": f"{name}: {channel.name or f'channel {number}'}",
        "colormap": "gray" if color == "#ffffff" else color,
        "blending": "additive",
    }
    return look | ({"contrast_limits": channel.window} if channel.window else {})


def names_of_channels(layer: Image | Labels) -> list[str]:
    """Names of the channels along axis "c" of a layer, or their numbers, as its file states them; empty without any.

    Raises
    ------
    core.ImageError
        As `layer_axes` does.
    """
    if "c" not in lead_axes(layer):
        return []
    remembered, path = layer.metadata.get(FROM_FILE), layer.source.path
    names: Sequence[str] = ()
    if remembered:
        names = remembered.get("channels", ())
    elif path is not None and Path(path).exists():
        with suppress(core.DistillFSSError):  # a file that only napari reads
            names = _file_channels(str(path), Path(path).stat().st_mtime_ns)
    count = finest_shape(layer)[layer_axes(layer).index("c")]
    return [name or str(number) for number, name in enumerate(names)] if any(names) and len(names) == count else []


@lru_cache(maxsize=32)
def _file_channels(path: str, modified: int) -> tuple[str, ...]:
    """Names of the channels of the first image of a file; `modified` tells versions of a file apart."""
    return tuple(channel.name for channel in core.read_channels(path, series=0))


def hold_shown(levels: Sequence[Any], options: Mapping[str, Any], point: Sequence[float] | None) -> list[Any]:
    """Read the planes that napari shows first, so that it finds them in memory when the layer is added.

    napari reads them in the thread of the window, which would wait for the disk or the server.

    Parameters
    ----------
    levels : sequence of dask arrays
        Of `layer_of_file`, finest first, a plane a chunk.
    options : mapping
        Of `layer_of_file`.
    point : sequence of float, optional
        Of napari's sliders; None where there is no layer yet, so that napari shows the middle.

    Returns
    -------
    list of dask arrays
        With the same names. Of a pyramid the coarse levels are held, up to one that fills a canvas.
    """
    import dask.array as da

    axes = len(options["axis_labels"]) - 2
    sizes = np.array(levels[0].shape[:axes])
    place = (sizes - 1) / 2
    if point is not None and len(point) >= axes + 2:
        world = np.array(point)[-axes - 2 : -2]
        place = (world - np.array(options["translate"])[:axes]) / np.array(options["scale"])[:axes]
    held = list(levels)
    for number in reversed(range(len(levels))):
        level = levels[number]
        shape = np.array(level.shape[:axes])
        index = np.clip(np.round(place * shape / sizes), 0, shape - 1).astype(int).tolist()
        key = (level.name, *index, *(0,) * (level.ndim - axes))
        plane = np.asarray(level[tuple(slice(i, i + 1) for i in index)])
        held[number] = da.Array({**level.dask, key: plane}, level.name, level.chunks, meta=level)
        if min(level.shape[axes : axes + 2]) >= _CANVAS:
            break
    return held


class OnGrid:
    """View of an array (z, y, x) with the axes of a layer: length 1 for time and channel, or without z for a plane.

    The plane that was read last is in memory until `renew`: napari reads each plane several times.

    Parameters
    ----------
    array : zarr array (z, y, x)
    axes : str
        Letters of the layer's axes, e.g. "tzyx".
    """

    def __init__(self, array: Any, axes: str) -> None:
        self._array, self._axes = array, axes
        self._may_hold = math.prod(array.shape[1:3]) <= _HELD
        self._held: Mapping[int, np.ndarray] = {}
        self.dtype, self.ndim = array.dtype, len(axes)
        self.planes = int(array.shape[0])
        size = {**dict.fromkeys("tc", 1), **dict(zip("zyx", array.shape, strict=True))}
        self.shape = tuple(int(size[a]) for a in self._axes)
        self.size = math.prod(self.shape)

    def __getitem__(self, key: Any) -> Any:
        """Values; of several planes a `_Window` of them, which is read when its values are needed."""
        key = key if isinstance(key, tuple) else (key,)
        key = (*key, *(slice(None),) * (self.ndim - len(key)))
        z = key[self._axes.index("z")] if "z" in self._axes else 0
        if isinstance(z, slice) and len(range(self.planes)[z]) > 1:
            return _Window(self, key)
        return self.read(key)

    def read(self, key: tuple[Any, ...]) -> np.ndarray:
        """Values of a key that has a part for each axis."""
        parts = dict(zip(self._axes, key, strict=True))
        values = self._read(tuple(parts.get(a, 0) for a in "zyx"))
        position = 0
        for a, part in parts.items():
            if a in LEAD_NAMES:
                values = np.expand_dims(values, position)[(slice(None),) * position + (part,)]
            position += isinstance(part, slice)
        return values

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        z, *inside = key
        if not self._may_hold or not isinstance(z, (int, np.integer)):
            return np.asarray(self._array[key])
        plane = self._held.get(int(z))
        if plane is None:
            plane = np.asarray(self._array[z])
            self._held = {int(z): plane}
        return np.array(plane[tuple(inside)])

    def hold(self, planes: Collection[int]) -> None:
        """Read planes, unless they are too large, and hold no others."""
        self._held = {z: np.asarray(self._array[z]) for z in planes} if self._may_hold else {}

    def renew(self) -> None:
        """Read what is held anew, in any thread: the array has changed."""
        self.hold(self._held)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read((slice(None),) * self.ndim), dtype)


class _Window:
    """Part of a grid that spans several planes.

    napari cuts what is on screen out of all planes of a pyramid, and then takes one plane of it.
    """

    def __init__(self, grid: OnGrid, key: tuple[Any, ...]) -> None:
        self._grid, self._key = grid, key
        places = [range(n)[part] for part, n in zip(key, grid.shape, strict=True)]
        self._places = [p for p in places if isinstance(p, range)]
        self.dtype, self.shape = grid.dtype, tuple(len(p) for p in self._places)
        self.ndim, self.size = len(self.shape), math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        key = iter((*(key if isinstance(key, tuple) else (key,)), *(slice(None),) * self.ndim))
        places = iter(self._places)
        return self._grid[tuple(_part(next(places)[next(key)]) if isinstance(k, slice) else k for k in self._key)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._grid.read(self._key), dtype)


def _part(places: int | range) -> int | slice:
    return slice(places.start, places.stop, places.step) if isinstance(places, range) else places


def move_layer(viewer: Any, layer: Any, array: Any, place: Mapping[str, Any]) -> None:
    """Show another array in a layer, at another place. What is as before is left alone, as napari draws after each.

    A layer that stays is safe; napari may crash when layers are removed and added
    (docs/decisions/napari.md).

    Parameters
    ----------
    viewer : napari viewer
        Which has the layer.
    layer : napari Image or Labels layer
    array : array
        Of any number of axes.
    place : mapping
        Keywords of `ChosenVolume.place`.
    """
    axes = layer.ndim
    if layer.data is not array:
        layer.data = array
    for name, value in place.items():
        present = getattr(layer, name)
        if not (present == value if isinstance(present, tuple) else np.array_equal(present, value)):
            setattr(layer, name, value)
    if layer.ndim != axes:  # napari shows the first index of the new ones, until a slider is moved
        viewer._update_layers(layers=[layer])


def lift(layers: Any, layer: Any, image: Any) -> None:
    """Put a layer above an image that would cover it, in the list of layers of a viewer."""
    if image in layers and layers.index(layer) < layers.index(image):
        layers.move(layers.index(layer), layers.index(image) + 1)


def covers_of(layers: Any, layer: Any, image: Any) -> list[Any]:
    """Images above a layer in the list of layers of a viewer that hide an image, or half of it or more.

    Such an image is visible and opaque. Where it lies along the axes that are not displayed is not asked.

    Parameters
    ----------
    layers : napari LayerList
    layer : napari layer
        The image itself, or a layer that should be seen on it.
    image : napari Image layer
    """
    if layer not in layers or image not in layers:
        return []
    low, high = image.extent.world[:, -2:]
    area = np.prod(high - low)
    found = []
    for other in list(layers)[layers.index(layer) + 1 :]:  # a part of napari's list is a new list with contexts
        if is_image(other) and other.visible and other.opacity >= _OPAQUE and str(other.blending) in _COVERING:
            first, last = other.extent.world[:, -2:]
            if np.prod(np.clip(np.minimum(high, last) - np.maximum(low, first), 0, None)) >= area / 2:
                found.append(other)
    return found


def hide_covers(layers: Any, layer: Any, image: Any) -> list[Any]:
    """Hide the images of `covers_of`, and return them. They stay where they are in the list."""
    covers = covers_of(layers, layer, image)
    for cover in covers:
        cover.visible = False
    return covers


def camera_of(viewer: Any) -> Any:
    """Camera of a viewer; since napari 0.9 it belongs to the scene."""
    return getattr(viewer, "scene", viewer).camera
