"""Shapes of a napari layer as labels in planes of a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import distillfss_core as core
from napari_distillfss._annotations import FIRST_CLASS
from napari_distillfss._layers import ChosenVolume

_CORNERS = 128  # of a polygon in place of an ellipse
_OPEN = ("line", "path")
_FEATURE = "class"


@dataclass(frozen=True, eq=False)
class Outline:
    """A shape in a plane.

    Parameters
    ----------
    plane : int
    label : int
        As painted: 1 background, 2.. classes.
    points : array (n, 2)
        Corners y x in pixels of the volume, whose centers are whole numbers.
    width : float or None
        Of a line or path, in pixels; None for a shape with an inside.
    """

    plane: int
    label: int
    points: npt.NDArray[np.float64]
    width: float | None

    def pixels(self, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.intp], ...]:
        """Pixels of the shape within a plane of this shape; of a closed one, those whose center is inside."""
        from skimage.draw import polygon

        if self.width is None:
            rows, columns = polygon(self.points[:, 0], self.points[:, 1], shape=shape)
            return rows, columns
        inside = np.zeros(shape, bool)
        low = np.maximum(np.floor(self.points.min(0) - self.width).astype(int), 0)
        high = np.minimum(np.ceil(self.points.max(0) + self.width).astype(int) + 1, shape)
        if (low >= high).any():
            return np.nonzero(inside)
        y, x = np.mgrid[low[0] : high[0], low[1] : high[1]]
        grid = np.stack((y, x), -1).astype(float)
        near = inside[low[0] : high[0], low[1] : high[1]]
        for a, b in zip(self.points[:-1], self.points[1:], strict=True):
            along = b - a
            at = np.clip((grid - a) @ along / max(float(along @ along), 1e-12), 0, 1)
            near |= ((grid - a - at[..., None] * along) ** 2).sum(-1) <= max(self.width / 2, 0.5) ** 2
        return np.nonzero(inside)


def outlines_of(
    layer: Any, chosen: ChosenVolume, point: Sequence[float], names: Sequence[str], label: int
) -> list[Outline]:
    """Shapes of a layer in the planes of a volume.

    Parameters
    ----------
    layer : napari Shapes layer
        Its features may have a column "class", with names of classes or their numbers from 1; 0 is background.
    chosen : ChosenVolume
        Shapes at other time points and channels are left out.
    point : sequence of float
        Of napari's world: planar shapes without z belong to the plane there.
    names : sequence of str
        Names of the classes.
    label : int
        Of shapes without a class, as painted.

    Raises
    ------
    core.DistillFSSError
        If there is no shape, or one does not lie in one plane of the volume, or has no class that there is.
    """
    if not len(layer.data):
        raise core.SupportSetError(f"layer {layer.name!r} holds no shape; draw one")
    classes = list(layer.features[_FEATURE]) if _FEATURE in layer.features else [None] * len(layer.data)
    outlines = []
    for number, vertices in enumerate(layer.data):
        where = f"layer {layer.name!r}, shape {number}:"
        voxels = _voxels(layer, np.asarray(vertices, float), chosen, point)
        lead = [a for a in chosen.axes if a in chosen.lead]
        if any(np.any(np.rint(voxels[:, chosen.axes.index(a)]) != chosen.lead[a]) for a in lead):
            continue
        z = np.rint(_in_volume(voxels, chosen, "z")) if "z" in chosen.axes else np.zeros(len(voxels))
        if np.ptp(z) > 0:
            raise core.ImageError(f"{where} spans planes {z.min():.0f} to {z.max():.0f}; draw shapes in planes y x")
        points = np.stack([_in_volume(voxels, chosen, a) for a in "yx"], -1)
        rows, columns = chosen.plane_shape
        outside = (points.max(0) < -0.5).any() or (points.min(0) > (rows - 0.5, columns - 0.5)).any()
        if outside or not 0 <= z[0] < chosen.planes:
            raise core.ImageError(
                f"{where} lies outside of {chosen.name!r}, which has planes 0 to {chosen.planes - 1} of {rows} × "
                f"{columns} pixels; move it there, or remove it"
            )
        kind = layer.shape_type[number] if isinstance(layer.shape_type, list) else layer.shape_type
        width = None
        if kind == "ellipse":
            points = _ellipse(points)
        elif kind in _OPEN:
            step = np.linalg.norm(np.diff(points, axis=0), axis=1).sum()
            drawn = np.linalg.norm(np.diff(np.asarray(vertices, float)[:, -2:], axis=0), axis=1).sum()
            width = float(layer.edge_width[number]) * (step / drawn if drawn else 1.0)
        outlines.append(Outline(int(z[0]), _label_of(classes[number], names, label, where), points, width))
    if not outlines:
        raise core.SupportSetError(f"layer {layer.name!r} holds no shape at the time point and channel that are chosen")
    return outlines


def _voxels(layer: Any, vertices: np.ndarray, chosen: ChosenVolume, point: Sequence[float]) -> np.ndarray:
    """Vertices in pixels of the volume's layer; what axes a shape lacks, it has at the point."""
    ndim = chosen.layer.ndim
    world = np.array([layer.data_to_world(v) for v in vertices])[:, -ndim:]
    whole = np.tile(np.asarray(point, float)[-ndim:], (len(world), 1))
    whole[:, ndim - world.shape[1] :] = world
    return np.array([chosen.layer.world_to_data(w) for w in whole])


def _in_volume(voxels: np.ndarray, chosen: ChosenVolume, axis: str) -> np.ndarray:
    """Positions along an axis in voxels of the chosen level."""
    factor = chosen.factors["zyx".index(axis)]
    positions: np.ndarray = (voxels[:, chosen.axes.index(axis)] - (factor - 1) / 2) / factor
    return positions


def _ellipse(corners: np.ndarray) -> np.ndarray:
    """Points of the ellipse in a box with these corners."""
    middle, a, b = corners.mean(0), (corners[1] - corners[0]) / 2, (corners[3] - corners[0]) / 2
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)[:, None]
    points: np.ndarray = middle + np.cos(angles) * a + np.sin(angles) * b
    return points


def _label_of(value: Any, names: Sequence[str], default: int, where: str) -> int:
    """The label of a class that a shape states, as painted."""
    if value is None or value != value or value == "":
        return default
    if value in names:
        return FIRST_CLASS + list(names).index(value)
    text = str(value).removesuffix(".0")
    if text.isdecimal() and int(text) <= len(names):
        return int(text) + FIRST_CLASS - 1
    raise core.ImageError(f"{where} has the class {value!r}, which is none of {', '.join(names)}; add it first")
