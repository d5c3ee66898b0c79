"""The list of slices: what is labeled on each, with a thumbnail, and whether it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from qtpy.QtCore import QSize, Qt, Signal
from qtpy.QtGui import QIcon, QImage, QPixmap
from qtpy.QtWidgets import QListWidgetItem, QWidget

from napari_distillfss._annotations import PaintedLabels, PaintedSlice
from napari_distillfss._tasks import THUMBNAIL, iter_thumbnails, pick
from napari_distillfss._threads import LatestJob
from napari_distillfss._widgets._colors import ERROR_IN_LIST
from napari_distillfss._widgets._common import ToneList, fit_rows

_MOST_ROWS = 1.6  # that are shown at a time: with the line below them they leave Train in sight
_Place = tuple[str, int]
"""Name of the folder of the annotations, and the plane."""


@dataclass(frozen=True, eq=False)
class SliceRow:
    """A row of the list.

    Parameters
    ----------
    text : str
    tooltip : str
    plane : int, optional
        Of the volume on screen; None for a row of another volume.
    labels : PaintedLabels, optional
        Of the volume of the slice; None where the row is no slice, or has no label.
    painted : PaintedSlice, optional
        The slice in them.
    colors : mapping of label to color
        Colors ("#rrggbb") of the classes, by their painted labels.
    open : function, optional
        Opens the volume (core.Volume) of the slice, in another thread.
    is_used : bool
        Whether the slice is ticked.
    is_problem : bool
    """

    text: str
    tooltip: str = ""
    plane: int | None = None
    labels: PaintedLabels | None = None
    painted: PaintedSlice | None = None
    colors: Mapping[int, str] = field(default_factory=dict)
    open: Callable[[], Any] | None = None
    is_used: bool = True
    is_problem: bool = False

    @property
    def place(self) -> _Place | None:
        return (self.labels.folder.name, self.painted.plane) if self.labels and self.painted else None


def _wrappable(text: str) -> str:
    """A text whose long names, such as those of files, may be wrapped too: with zero-width spaces in them."""
    return re.sub(r"(?<=\w)([_.-])(?=\w)", "\\1\u200b", text)


class SliceList(ToneList):
    """Lists slices. ``toggled`` emits the `SliceRow` of a slice that the user ticks or unticks, and its state.

    The rows have the width of the dock: their text is wrapped.
    """

    toggled = Signal(object, bool)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._rows: list[SliceRow] = []
        self._pictures: dict[_Place, np.ndarray | None] = {}  # None where the volume cannot be read
        self._painted: dict[_Place, tuple[Any, np.ndarray]] = {}  # stamps and thumbnails of labels
        self._thumbnails = LatestJob(self)
        self._thumbnails.answered.connect(self._on_picture)
        self.setToolTip("Click to go there; untick to leave a slice out of the training")
        self.setIconSize(QSize(THUMBNAIL, THUMBNAIL))
        self.setAccessibleName("Annotated slices")
        self.setWordWrap(True)
        self.setResizeMode(ToneList.ResizeMode.Adjust)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setVerticalScrollMode(ToneList.ScrollMode.ScrollPerPixel)
        self.itemChanged.connect(self._on_item_changed)
        self.hide()

    @property
    def busy(self) -> bool:
        """Whether thumbnails are being made."""
        return self._thumbnails.busy

    def row_of(self, item: QListWidgetItem | None) -> SliceRow | None:
        """What an item shows; None for no item."""
        return self._rows[self.row(item)] if item is not None else None

    def ticked(self) -> list[tuple[PaintedSlice, tuple[str, ...]]]:
        """The slices that are ticked, each with the names of its classes."""
        items = (self.item(n) for n in range(self.count()))
        return [
            (row.painted, row.labels.class_names)
            for row, item in zip(self._rows, items, strict=True)
            if row.painted and row.labels and item and item.checkState() == Qt.CheckState.Checked
        ]

    def setRows(self, rows: Sequence[SliceRow]) -> None:
        """Show these rows. Thumbnails that are missing follow."""
        chosen, self._rows = self.currentRow(), list(rows)
        self.blockSignals(True)
        self.clear()
        for row in self._rows:
            item = QListWidgetItem(self._icon(row), _wrappable(row.text))
            item.setData(Qt.ItemDataRole.AccessibleTextRole, row.text)
            item.setToolTip(row.tooltip)
            if row.labels is not None:
                item.setFlags(item.flags() | Qt.ItemFlag.ItemIsUserCheckable)
                item.setCheckState(Qt.CheckState.Checked if row.is_used else Qt.CheckState.Unchecked)
            if row.is_problem:
                self.set_tone(item, ERROR_IN_LIST)
            self.addItem(item)
        self.setCurrentRow(min(chosen, self.count() - 1))
        self.blockSignals(False)
        self.setVisible(bool(self.count()))
        fit_rows(self, _MOST_ROWS)
        self._ask_for_pictures()

    def try_again(self) -> None:
        """Ask again for the thumbnails of volumes that could not be read."""
        self._pictures = {place: picture for place, picture in self._pictures.items() if picture is not None}

    def cancel(self) -> None:
        """Make no more thumbnails."""
        self._thumbnails.cancel()

    def _ask_for_pictures(self) -> None:
        wanted: dict[str, tuple[Callable[[], Any], list[int]]] = {}
        for row in self._rows:
            if row.place is not None and row.open is not None and row.place not in self._pictures:
                wanted.setdefault(row.place[0], (row.open, []))[1].append(row.place[1])
        if wanted:
            self._thumbnails.ask(lambda stop: iter_thumbnails(wanted, stop))

    def _on_picture(self, thumbnail: tuple[_Place, np.ndarray | None]) -> None:
        place, self._pictures[place] = thumbnail
        for index, row in enumerate(self._rows):
            item = self.item(index)
            if item is not None and row.place == place:
                self.blockSignals(True)
                item.setIcon(self._icon(row))
                self.blockSignals(False)

    def _on_item_changed(self, item: QListWidgetItem) -> None:
        self.toggled.emit(self.row_of(item), item.checkState() == Qt.CheckState.Checked)

    def _icon(self, row: SliceRow) -> QIcon:
        gray = self._pictures.get(row.place) if row.place is not None else None
        if gray is None or row.labels is None or row.place is None:
            return QIcon()
        picture = np.repeat(gray[..., None], 3, -1).astype(np.float32)
        labels = self._thumbnail_of_labels(row.labels, row.place)
        for number, color in row.colors.items():
            rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            picture[labels == number] = 0.4 * picture[labels == number] + 0.6 * np.array(rgb)
        pixels = np.ascontiguousarray(picture.astype(np.uint8))
        image = QImage(pixels.tobytes(), THUMBNAIL, THUMBNAIL, 3 * THUMBNAIL, QImage.Format.Format_RGB888)
        return QIcon(QPixmap.fromImage(image.copy()))

    def _thumbnail_of_labels(self, labels: PaintedLabels, place: _Place) -> np.ndarray:
        stamp = labels.stamp(place[1])
        if place not in self._painted or self._painted[place][0] != stamp:
            self._painted[place] = stamp, pick(labels.plane(place[1]))
        return self._painted[place][1]
