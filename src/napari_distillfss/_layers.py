"""Conversion between napari's image layers and volumes of the core; axes, scale, units and position are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pint

import distillfss_core as core

if TYPE_CHECKING:
    from napari.layers import Image

_SAMPLE = 128  # pixels around the middle of a plane, by which a file and an array are compared

FROM_FILE = "distillfss"
"""Key of a layer's metadata under which the file it shows, and how that was opened, are kept."""

LEAD_NAMES = {"t": "time", "c": "channel"}

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


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
    factors : (z, y, x)
        How many voxels of the layer's finest level one of the volume's covers.
    opening : mapping
        What `core.open_volume` was told beside the source: level, time, channel, axes.
    """

    layer: Image
    volume: Any
    lead: Mapping[str, int] = field(default_factory=dict)
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    opening: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.layer.name)

    @property
    def planes(self) -> int:
        return int(self.volume.shape[0])

    @property
    def plane_shape(self) -> tuple[int, int]:
        return int(self.volume.shape[1]), int(self.volume.shape[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an array on this grid with the axes of the layer; chosen time and channel axes have length 1."""
        spatial = self.volume.shape[:3] if self.layer.ndim > 2 else self.volume.shape[1:3]
        return (*(1 for _ in self.lead), *(int(n) for n in spatial))

    @property
    def pixel_size(self) -> tuple[float, float] | None:
        """Size of a pixel (y, x) in micrometers, if the layer's units are lengths."""
        _, y, x = self.volume.scale
        return (y, x) if self.volume.unit and y and x else None

    def index(self, z: int) -> tuple[Any, ...]:
        """Index of plane ``z`` in an array of `shape`."""
        return (*(0 for _ in self.lead), z) if self.layer.ndim > 2 else ()

    def place(self, z: int = 0) -> dict[str, Any]:
        """Keywords of a layer whose array lies on this grid and starts at plane ``z``."""
        layer, factors = self.layer, self._factors()
        offset = np.array([*self.lead.values(), *((f - 1) / 2 for f in factors[len(self.lead) :])], float)
        if layer.ndim > 2:
            offset[-3] += z * factors[-3]
        return {
            "scale": layer.scale * factors,
            "translate": layer.affine.inverse(layer.data_to_world(offset)),
            "rotate": layer.rotate,
            "shear": layer.shear,
            "affine": layer.affine,
            "units": layer.units,
            "axis_labels": layer.axis_labels,
        }

    def plane_at(self, point: Sequence[float]) -> int:
        """Plane at a point of the world; the nearest plane for a point outside the volume."""
        if self.layer.ndim < 3:
            return 0
        f = self.factors[0]
        z = (self.layer.world_to_data(point)[-3] - (f - 1) / 2) / f
        return int(np.clip(math.floor(z + 0.5), 0, self.planes - 1))

    def point_of(self, z: float, y: float | None = None, x: float | None = None) -> np.ndarray:
        """World coordinates of a voxel, one number for each axis of the layer; by default the middle of plane ``z``."""
        rows, columns = self.plane_shape
        voxel = (z, rows / 2 if y is None else y, columns / 2 if x is None else x)
        inside = [v * f + (f - 1) / 2 for v, f in zip(voxel, self.factors, strict=True)]
        spatial = inside if self.layer.ndim > 2 else inside[1:]
        return np.asarray(self.layer.data_to_world([*self.lead.values(), *spatial]))

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

    def _factors(self) -> np.ndarray:
        spatial = self.factors if self.layer.ndim > 2 else self.factors[1:]
        return np.array([*(1.0 for _ in self.lead), *spatial])


def lead_axes(layer: Image) -> str:
    """Letters of the axes before z y x: "", "t", "c" or "tc". Axis labels of the layer take precedence.

    Raises
    ------
    core.ImageError
        If the layer is none that can be segmented, in one sentence.
    """
    if type(layer).__name__ != "Image":
        raise core.ImageError(f"layer {layer.name!r} is no image; choose an image layer")
    extra = layer.ndim - 3
    if layer.ndim < 2 or extra > (1 if layer.rgb else 2):
        raise core.ImageError(
            f"layer {layer.name!r} has {layer.ndim} dimensions{' and colors' if layer.rgb else ''}; planes and "
            "stacks, with time and channels at most, can be segmented"
        )
    if extra == 1 and not layer.rgb and str(layer.axis_labels[0]).lower() in ("c", "channel"):
        return "c"
    return "tc"[: max(0, extra)]


def choose_layer(layer: Image, *, lead: Mapping[str, int] | None = None, level: int = 0) -> ChosenVolume:
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

    Raises
    ------
    core.DistillFSSError
        If it cannot be segmented, in one sentence.
    """
    letters = lead_axes(layer)
    chosen = {letter: (lead or {}).get(letter, 0) for letter in letters}
    levels = list(layer.data) if layer.multiscale else [layer.data]
    if not 0 <= level < len(levels):
        raise core.SettingsError(f"layer {layer.name!r} has no level {level}; its levels are 0 to {len(levels) - 1}")
    spatial = slice(len(letters), layer.ndim)
    ratio = tuple(a / b for a, b in zip(levels[0].shape[spatial], levels[level].shape[spatial], strict=True))
    factors = (ratio[-3] if len(ratio) == 3 else 1.0, ratio[-2], ratio[-1])
    volume, opening = _open(layer, levels[level], letters, chosen, level)
    scale, unit = _scale(layer, factors)
    if unit or volume.unit is None:  # a file that knows better than the layer keeps its scale
        volume = replace(volume, name=str(layer.name), scale=scale, unit=unit)
    return ChosenVolume(layer, volume, chosen, factors, opening)


def _open(
    layer: Image, array: Any, letters: str, chosen: Mapping[str, int], level: int
) -> tuple[Any, Mapping[str, Any]]:
    axes = letters + "zyx"[-(layer.ndim - len(letters)) :] + ("c" if layer.rgb else "")
    channel = "all" if layer.rgb else chosen.get("c")
    options: dict[str, Any] = {"level": level, "time": chosen.get("t"), "channel": channel}
    from_array = core.open_volume(array, axes=axes, time=options["time"], channel=channel)
    remembered = layer.metadata.get(FROM_FILE)
    if remembered and remembered["shown"][level : level + 1] != [getattr(array, "name", "")]:
        return from_array, {}  # another array was put into the layer since
    path = remembered["path"] if remembered else layer.source.path
    if path is None or not (remembered or Path(path).exists()):
        return from_array, {}
    options |= remembered["opening"] if remembered else {}
    options = {name: value for name, value in options.items() if value is not None}
    with suppress(core.DistillFSSError):  # a file that only napari understands stays an array
        from_file = core.open_volume(path, **options)
        same = (from_file.shape, from_file.dtype) == (from_array.shape, from_array.dtype)
        if same and (remembered or _alike(from_file, from_array)):
            return from_file, options
    return from_array, {}


def _alike(a: Any, b: Any) -> bool:
    """Whether the middles of three planes agree with the file; a layer may have been modified since it was read."""
    last = a.shape[0] - 1
    y, x = (slice(max(0, n // 2 - _SAMPLE), n // 2 + _SAMPLE) for n in a.shape[1:3])
    return all(np.array_equal(a[z, y, x], b[z, y, x], equal_nan=True) for z in {0, last // 2, last})


def _scale(layer: Image, factors: Sequence[float]) -> tuple[tuple[float | None, ...], str | None]:
    """Size of a voxel (z, y, x), in micrometers if the layer's units are lengths; None where it is not known."""
    step = [abs(float(s)) for s in layer.scale[-3:]]
    lengths = [_micrometers(u) for u in layer.units[-3:]]
    has_scale = all(length is not None for length in lengths[-2:])
    if not has_scale and all(s == 1 for s in step):
        return (None, None, None), None
    sizes: list[float | None] = [
        s * (length or 1.0) * f for s, length, f in zip(step, lengths, factors[-len(step) :], strict=True)
    ]
    return (*(None for _ in range(3 - len(sizes))), *sizes), "micrometer" if has_scale else None


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
            }
        },
    }
    if volume.unit:
        options["units"] = ("pixel",) * lead + (volume.unit,) * 3
    return levels, options


class OnGrid:
    """View of an array (z, y, x) with the axes of a layer: axes of length 1 before it, or without z for a plane.

    It is looked up anew each time, so what is written meanwhile is seen.
    """

    def __init__(self, array: Any, lead: int, ndim: int) -> None:
        self._array, self._lead = array, lead
        self.dtype, self.ndim = array.dtype, ndim
        self.shape = (*(1,) * lead, *array.shape) if ndim > 2 else tuple(array.shape[1:])

    def look_at(self, array: Any) -> None:
        """Replace the array by another one of the same shape and dtype."""
        self._array = array

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        if self.ndim == 2:
            return np.asarray(self._array[(0, *key)])
        values = np.asarray(self._array[key[self._lead :]])
        for part in reversed(key[: self._lead]):
            values = values[None][part] if isinstance(part, slice) else values
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * self.ndim], dtype)


def camera_of(viewer: Any) -> Any:
    """Camera of a viewer; since napari 0.9 it belongs to the scene."""
    return getattr(viewer, "scene", viewer).camera
