"""Choice of other volumes whose annotated slices are used too."""

from __future__ import annotations

from collections.abc import Sequence

from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import QDialog, QDialogButtonBox, QLabel, QListWidgetItem, QVBoxLayout, QWidget

from napari_distillfss import _format as fmt
from napari_distillfss._sources import OtherSlices
from napari_distillfss._widgets._colors import MUTED_IN_LIST
from napari_distillfss._widgets._common import ToneList


class SourceList(QWidget):
    """Lists volumes with check marks. ``value`` has the keys of those that are checked; the rest cannot be used.

    Parameters
    ----------
    others : sequence of (OtherSlices, str)
        With the reason why they cannot be used; "" where they can.
    """

    valueChanged = Signal(tuple)

    def __init__(self, others: Sequence[tuple[OtherSlices, str]], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.list = ToneList()
        self.list.setAccessibleName("Other volumes with annotated slices")
        self.list.setWordWrap(True)
        for other, problem in others:
            count = fmt.count(len(other.labels.enabled()), "slice")
            item = QListWidgetItem(f"{other.name}: {count}, {', '.join(other.class_names)}")
            item.setData(Qt.ItemDataRole.UserRole, other.key)
            item.setToolTip(str(other.record.get("location") or other.folder))
            item.setFlags(Qt.ItemFlag.ItemIsUserCheckable | Qt.ItemFlag.ItemIsEnabled)
            item.setCheckState(Qt.CheckState.Unchecked)
            if problem:
                item.setText(f"{item.text()}\nit {problem}")
                self.list.set_tone(item, MUTED_IN_LIST)
            self.list.addItem(item)
        self._problems = {other.key: problem for other, problem in others}
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.list)
        self.list.itemChanged.connect(self._on_item_changed)

    def value(self) -> tuple[str, ...]:
        return tuple(item.data(Qt.ItemDataRole.UserRole) for item in self._items() if _is_checked(item))

    def setValue(self, keys: Sequence[str]) -> None:
        self.list.blockSignals(True)
        for item in self._items():
            is_on = item.data(Qt.ItemDataRole.UserRole) in keys
            item.setCheckState(Qt.CheckState.Checked if is_on else Qt.CheckState.Unchecked)
        self.list.blockSignals(False)
        self.valueChanged.emit(self.value())

    def _items(self) -> list[QListWidgetItem]:
        items = [self.list.item(row) for row in range(self.list.count())]
        return [item for item in items if item is not None]

    def _on_item_changed(self, item: QListWidgetItem) -> None:
        if self._problems[item.data(Qt.ItemDataRole.UserRole)] and _is_checked(item):
            self.list.blockSignals(True)
            item.setCheckState(Qt.CheckState.Unchecked)
            self.list.blockSignals(False)
        self.valueChanged.emit(self.value())


def ask_for_sources(
    parent: QWidget, others: Sequence[tuple[OtherSlices, str]], used: Sequence[str]
) -> tuple[str, ...] | None:
    """Ask which other volumes to use slices of. Returns their keys, or None if nothing was chosen."""
    dialog = QDialog(parent)
    dialog.setWindowTitle("Also use slices of")
    choice = SourceList(others, dialog)
    choice.setValue(used)
    yes_no = QDialogButtonBox(QDialogButtonBox.StandardButton.Ok | QDialogButtonBox.StandardButton.Cancel)
    yes_no.accepted.connect(dialog.accept)
    yes_no.rejected.connect(dialog.reject)
    layout = QVBoxLayout(dialog)
    layout.addWidget(QLabel("Volumes that you annotated before. Their slices stay where they are."))
    layout.addWidget(choice)
    layout.addWidget(yes_no)
    dialog.resize(460, 320)
    return choice.value() if dialog.exec() == QDialog.DialogCode.Accepted else None


def _is_checked(item: QListWidgetItem) -> bool:
    return item.checkState() == Qt.CheckState.Checked
