"""A region of the volume: start and stop along z, y and x."""

from __future__ import annotations

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QWidget

from napari_distillfss._layers import Box
from napari_distillfss._widgets._common import column, combo, row, spin


class RegionEdit(QWidget):
    """Edits a region: ((z0, z1), (y0, y1), (x0, x1)), or None for the whole volume."""

    valueChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._quiet = False
        self.which = combo(
            "Region to segment. The labels always have the size of the volume; the rest stays 0 and can be segmented "
            "later",
            ("whole volume", "a region"),
        )
        self.which.setAccessibleName("Region to segment")
        self.ends = [
            (
                spin(0, 0, 0, f"First voxel along {axis}"),
                spin(1, 1, 1, f"Voxel along {axis} before which the region ends"),
            )
            for axis in "zyx"
        ]
        self._rows = QWidget()
        column(self._rows, *(row(axis, *pair) for axis, pair in zip("zyx", self.ends, strict=True)), margin=0)
        column(self, self.which, self._rows, margin=0)
        self._rows.hide()
        self.which.currentIndexChanged.connect(self._on_edited)
        for pair in self.ends:
            for box in pair:
                box.valueChanged.connect(self._on_edited)

    def setShape(self, shape: tuple[int, int, int]) -> None:
        """Set the size of the volume; the region becomes the whole volume."""
        for (start, stop), n in zip(self.ends, shape, strict=True):
            start.setRange(0, n - 1)
            stop.setRange(1, n)
            stop.setValue(n)
            start.setValue(0)
        self.setValue(None)

    def value(self) -> Box | None:
        if self.which.currentIndex() == 0:
            return None
        z, y, x = ((start.value(), stop.value()) for start, stop in self.ends)
        return z, y, x

    def setValue(self, value: Box | None) -> None:
        self._quiet = True
        self.which.setCurrentIndex(0 if value is None else 1)
        for (start, stop), span in zip(self.ends, value or (), strict=False):
            start.setValue(span[0])
            stop.setValue(span[1])
        self._quiet = False
        self._on_edited()

    def _on_edited(self, *_: object) -> None:
        self._rows.setVisible(self.which.currentIndex() == 1)
        if not self._quiet:
            self.valueChanged.emit(self.value())
