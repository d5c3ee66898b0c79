"""A ring around the chosen object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from napari_distillfss._layers import OBJECT, Box, ChosenVolume, leave, lift, move_layer, take_up

_PART = "chosen object"
_COLOR = "#ffe119"
_MARGIN = 1.2  # of the ring's diameter over that of the object's box
_SMALLEST = 8  # voxels, so that a ring around a single voxel is seen


def middle_of(box: Box) -> tuple[int, float, float]:
    """The middle (z, y, x) of a box of voxels, in a plane; of two planes in the middle, the first."""
    z, y, x = ((start + stop - 1) / 2 for start, stop in box)
    return int(z), y, x


class ObjectMark:
    """Marks one object by a ring in a Points layer, which is moved and hidden but never removed."""

    def __init__(self, viewer: Any) -> None:
        self._viewer = viewer
        self.layer: Any = None

    def show(self, chosen: ChosenVolume, box: Box) -> None:
        """Put the ring around a box of voxels, in its middle plane."""
        middle = dict(zip("zyx", middle_of(box), strict=True))
        point = np.array([[middle.get(a, 0) for a in chosen.axes]], float)
        height, width = (b - a for a, b in box[1:])
        size = max(_SMALLEST, _MARGIN * math.hypot(height, width))
        if self.layer not in self._viewer.layers:
            self.layer = take_up(self._viewer.layers, _PART)
        if self.layer is None or self.layer.ndim != len(chosen.axes):
            self.hide()
            self.layer = self._add(point, chosen.place())
        else:
            move_layer(self._viewer, self.layer, point, chosen.place())
            lift(self._viewer.layers, self.layer, chosen.layer)
        self.layer.selected_data = set()
        self.layer.size = size
        self.layer.visible = True

    def hide(self) -> None:
        if self.layer in self._viewer.layers:
            self.layer.visible = False

    def leave(self) -> None:
        """Hide it, and leave it to the next dock."""
        if self.layer in self._viewer.layers:
            leave(self.layer, _PART)
        self.layer = None

    def _add(self, point: np.ndarray, place: Mapping[str, Any]) -> Any:
        active = self._viewer.layers.selection.active
        layer = self._viewer.add_points(
            point,
            name=_PART,
            face_color="transparent",
            border_color=_COLOR,
            border_width=0.06,
            metadata={OBJECT: True},
            **place,
        )
        layer.editable = False
        if active is not None:
            self._viewer.layers.selection.active = active
        return layer
