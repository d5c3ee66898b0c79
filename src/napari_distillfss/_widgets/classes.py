"""The list of classes: names, colors, and the class of the brush."""

from __future__ import annotations

from collections.abc import Sequence

from qtpy.QtCore import QSize, Qt, Signal
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import QColorDialog, QListWidget, QListWidgetItem, QWidget

from napari_distillfss._annotations import BACKGROUND, BACKGROUND_COLOR, COLORS, FIRST_CLASS, Class
from napari_distillfss._widgets._common import allow, button, column, fit_rows, row

_MOST_ROWS = 5
_BACKGROUND = "background"
_UNLABELED = ("eraser (not labeled)", "#00000000")


class ClassList(QWidget):
    """Edits the classes. `brushChanged` emits the label of the brush: 0 not labeled, 1 background, 2.. classes.

    ``refused`` emits why a name was not taken.
    """

    valueChanged = Signal(tuple)
    brushChanged = Signal(int)
    refused = Signal(str)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._value: tuple[Class, ...] = ()
        self.list = QListWidget()
        self.list.setToolTip("Click to paint with it; double-click a class to rename it")
        self.list.setIconSize(QSize(14, 14))
        self.list.setAccessibleName("Classes")
        self.add = button("Add class", "Add a class of objects", self._on_add_clicked)
        self.remove = button("Remove class", "Remove the last class; its painted pixels are kept", self._on_remove)
        self.color = button("Color…", "Choose another color for the class", self._on_color_clicked)
        column(self, self.list, row(self.add, self.remove, self.color), margin=0)
        self.list.currentRowChanged.connect(self.brushChanged.emit)
        self.list.currentRowChanged.connect(self._on_row_changed)
        self.list.itemChanged.connect(self._on_item_changed)
        self.setValue((Class("object", COLORS[0]),))

    def value(self) -> tuple[Class, ...]:
        return self._value

    def setValue(self, value: Sequence[Class]) -> None:
        if tuple(value) == self._value:
            return
        brush = self.brush()
        self._value = tuple(value)
        self.list.blockSignals(True)
        self.list.clear()
        fixed = (_UNLABELED, (_BACKGROUND, BACKGROUND_COLOR))
        for number, (name, color) in enumerate([*fixed, *((c.name, c.color) for c in self._value)]):
            item = QListWidgetItem(_swatch(color), name)
            if number >= FIRST_CLASS:
                item.setFlags(item.flags() | Qt.ItemFlag.ItemIsEditable)
            self.list.addItem(item)
        allow(self.remove, "" if len(self._value) > 1 else "there has to be one class")
        self.list.setCurrentRow(min(brush, self.list.count() - 1))
        self.list.blockSignals(False)
        fit_rows(self.list, _MOST_ROWS)
        self._on_row_changed()
        self.valueChanged.emit(self._value)
        if self.brush() != brush:  # its class was removed
            self.brushChanged.emit(self.brush())

    def brush(self) -> int:
        """Label of the brush."""
        return self.list.currentRow() if self.list.currentRow() >= 0 else FIRST_CLASS

    def setBrush(self, label: int) -> None:
        self.list.setCurrentRow(label)

    def _on_add_clicked(self) -> None:
        names = {c.name for c in self._value}
        number = next(n for n in range(len(names) + 1, 255) if f"class {n}" not in names)
        self.setValue((*self._value, Class(f"class {number}", COLORS[len(names) % len(COLORS)])))
        self.setBrush(len(self._value) + BACKGROUND)

    def _on_remove(self) -> None:
        self.setValue(self._value[:-1])

    def _on_row_changed(self) -> None:
        allow(self.color, "" if self.brush() >= FIRST_CLASS else "background and eraser have their colors")

    def _on_color_clicked(self) -> None:
        row = self.brush() - FIRST_CLASS
        color = QColorDialog.getColor(QColor(self._value[row].color), self)
        if color.isValid():
            value = list(self._value)
            value[row] = Class(value[row].name, color.name())
            self.setValue(value)

    def _on_item_changed(self, item: QListWidgetItem) -> None:
        position = self.list.row(item) - FIRST_CLASS
        value, name = list(self._value), item.text().strip()
        others = [_BACKGROUND, *(c.name for c in value[:position] + value[position + 1 :])]
        if name.casefold() in (other.casefold() for other in others):
            self.refused.emit(f"there is a class {name!r} already; give another name")
            name = ""
        value[position] = Class(name or value[position].name, value[position].color)
        self._value = ()
        self.setValue(value)


def _swatch(color: str) -> QIcon:
    picture = QPixmap(14, 14)
    picture.fill(QColor(color) if len(color) == 7 else QColor(0, 0, 0, 0))
    icon = QIcon(picture)
    icon.addPixmap(picture, QIcon.Mode.Selected)  # Qt would tint it
    return icon
