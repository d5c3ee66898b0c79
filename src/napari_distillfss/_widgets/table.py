"""A table of object measures; a chosen row shows its object."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtCore import QAbstractTableModel, QModelIndex, Qt, Signal
from qtpy.QtWidgets import QAbstractItemView, QTableView, QVBoxLayout, QWidget

_UNITS = {"um": "µm", "um3": "µm³"}
"""How a heading has the unit at the end of a column's name."""

_WHOLE = 1e5  # from which on a measure is shown without decimals, never as a power of ten

_MEASURED_ROWS = 8  # whose texts decide the width of a column


class ObjectTable(QWidget):
    """Shows a table of measures. ``chosen`` emits the label of a row and its box, ((z0, z1), (y0, y1), (x0, x1))."""

    chosen = Signal(int, tuple)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.model = _Measures()
        self._quiet = False  # while rows change without the user
        self.view = QTableView()
        self.view.setToolTip("Choose a row to see the object; click a heading to sort")
        self.view.setAccessibleName("Objects")
        self.view.setSortingEnabled(True)
        self.view.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.view.setMinimumHeight(160)
        self.view.setModel(self.model)
        for headings in (self.view.horizontalHeader(), self.view.verticalHeader()):
            assert headings is not None
            headings.setResizeContentsPrecision(_MEASURED_ROWS)
        self.view.clicked.connect(self._on_view_clicked)
        rows = self.view.selectionModel()
        assert rows is not None  # the view has a model
        rows.currentRowChanged.connect(self._on_row_changed)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.view)

    def read(self, path: Path) -> None:
        """Show a table that the core has written (.csv)."""
        with open(path, newline="") as file:
            columns, *objects = list(csv.reader(file))
        self._quiet = True
        self.model.show(columns, np.array(objects, float).reshape(len(objects), len(columns)))
        self.view.sortByColumn(0, Qt.SortOrder.AscendingOrder)
        self._quiet = False
        self.view.resizeColumnsToContents()

    def features(self) -> dict[str, np.ndarray]:
        """Columns of the table as features of a Labels layer; "index" holds the labels."""
        columns = dict(zip(self.model.columns, self.model.values.T, strict=True))
        whole = {name: c.astype(np.int64) for name, c in columns.items() if np.array_equal(c, np.floor(c))}
        return {"index": columns["label"].astype(np.int64), **columns, **whole}

    def select(self, label: int) -> None:
        """Select the row of an object."""
        rows = np.flatnonzero(self.model.values[:, 0] == label)
        if len(rows):
            self._quiet = True
            self.view.selectRow(int(np.flatnonzero(self.model.order == rows[0])[0]))
            self._quiet = False

    def choose(self, row: int) -> None:
        """Choose the row of the file with this number."""
        measures = dict(zip(self.model.columns, self.model.values[row], strict=True))
        box = tuple((int(measures[f"box_{a}0"]), int(measures[f"box_{a}1"])) for a in "zyx")
        self.chosen.emit(int(measures["label"]), box)

    def _on_row_changed(self, index: QModelIndex, _: QModelIndex) -> None:
        if index.isValid() and not self._quiet:
            self._on_view_clicked(index)

    def _on_view_clicked(self, index: QModelIndex) -> None:
        self.choose(int(self.model.order[index.row()]))


class _Measures(QAbstractTableModel):
    """Rows of a file in the order of a column. ``order[row]`` is the row of the file that a row of the table shows.

    It sorts whole columns: Qt would compare cell by cell, which takes seconds for many thousands of objects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.show([], np.empty((0, 1)))

    def show(self, columns: list[str], values: np.ndarray) -> None:
        """Show another table, in the order of the file."""
        self.beginResetModel()
        self.columns, self.values, self.order = columns, values, np.arange(len(values))
        self.endResetModel()

    def sort(self, column: int, order: Qt.SortOrder = Qt.SortOrder.AscendingOrder) -> None:
        """Sort rows by a column; equal ones, and those without a number at the end, stay in the order of the file."""
        if not 0 <= column < len(self.columns):
            return
        key = self.values[:, column] * (1 if order == Qt.SortOrder.AscendingOrder else -1)
        self.layoutAboutToBeChanged.emit()
        before, after = self.order, np.argsort(key, kind="stable")
        place = np.argsort(after)  # of a row of the file
        kept = self.persistentIndexList()
        self.order = after
        self.changePersistentIndexList(kept, [self.index(int(place[before[i.row()]]), i.column()) for i in kept])
        self.layoutChanged.emit()

    def rowCount(self, parent: QModelIndex | None = None) -> int:
        return len(self.values)

    def columnCount(self, parent: QModelIndex | None = None) -> int:
        return len(self.columns)

    def data(self, index: QModelIndex, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if role != Qt.ItemDataRole.DisplayRole:
            return None
        value = float(self.values[self.order[index.row()], index.column()])
        return f"{value:.0f}" if value.is_integer() or abs(value) >= _WHOLE else f"{value:.6g}"

    def headerData(self, section: int, side: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if role != Qt.ItemDataRole.DisplayRole or side != Qt.Orientation.Horizontal:
            return None
        name, _, unit = self.columns[section].rpartition("_")
        heading = f"{name} ({_UNITS[unit]})" if name and unit in _UNITS else self.columns[section]
        return heading.replace("_", " ")
