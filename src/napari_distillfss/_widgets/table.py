"""A table of object measures; a chosen row shows its object."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtCore import QAbstractTableModel, QModelIndex, QSortFilterProxyModel, Qt, Signal
from qtpy.QtWidgets import QAbstractItemView, QTableView, QVBoxLayout, QWidget

_UNITS = {"um": "µm", "um3": "µm³"}
"""How a heading has the unit at the end of a column's name."""

_WHOLE = 1e5  # from which on a measure is shown without decimals, never as a power of ten

_ROLES = (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.UserRole)


class ObjectTable(QWidget):
    """Shows a table of measures. ``chosen`` emits the label of a row and its box, ((z0, z1), (y0, y1), (x0, x1))."""

    chosen = Signal(int, tuple)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.model = _Measures([], np.empty((0, 1)))
        self._quiet = False  # while rows change without the user
        self._sorted = QSortFilterProxyModel(self)
        self._sorted.setSortRole(Qt.ItemDataRole.UserRole)
        self.view = QTableView()
        self.view.setToolTip("Choose a row to see the object; click a heading to sort")
        self.view.setAccessibleName("Objects")
        self.view.setSortingEnabled(True)
        self.view.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.view.setMinimumHeight(160)
        self.view.setModel(self._sorted)
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
        self.model = _Measures(columns, np.array(objects, float).reshape(len(objects), len(columns)))
        self._quiet = True
        self._sorted.setSourceModel(self.model)
        self._sorted.sort(0)
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
            self.view.selectRow(self._sorted.mapFromSource(self.model.index(int(rows[0]), 0)).row())
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
        self.choose(self._sorted.mapToSource(index).row())


class _Measures(QAbstractTableModel):
    def __init__(self, columns: list[str], values: np.ndarray) -> None:
        super().__init__()
        self.columns, self.values = columns, values

    def rowCount(self, parent: QModelIndex | None = None) -> int:
        return len(self.values)

    def columnCount(self, parent: QModelIndex | None = None) -> int:
        return len(self.columns)

    def data(self, index: QModelIndex, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if role not in _ROLES:
            return None
        value = float(self.values[index.row(), index.column()])
        if role != Qt.ItemDataRole.DisplayRole:
            return value
        return f"{value:.0f}" if value.is_integer() or abs(value) >= _WHOLE else f"{value:.6g}"

    def headerData(self, section: int, side: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if role != Qt.ItemDataRole.DisplayRole or side != Qt.Orientation.Horizontal:
            return None
        name, _, unit = self.columns[section].rpartition("_")
        heading = f"{name} ({_UNITS[unit]})" if name and unit in _UNITS else self.columns[section]
        return heading.replace("_", " ")
