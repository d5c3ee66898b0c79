"""A form for the settings of a training, drawn from what the core says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QComboBox, QDoubleSpinBox, QFormLayout, QLineEdit, QSpinBox, QWidget

import distillfss_core as core
from napari_distillfss._presets import EXPLAINED, PRESETS, preset_of
from napari_distillfss._widgets._common import column, combo, row

DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in fields(core.DistillSettings)}
OWN = "own settings"


_Box = QComboBox | QSpinBox | QDoubleSpinBox | QLineEdit


class SettingsForm(QWidget):
    """Edits DistillSettings, each by a box with its limits and its help; what is impossible is said by `error`."""

    valueChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.boxes: dict[str, _Box] = {}
        form = QFormLayout(self)
        form.setContentsMargins(0, 0, 0, 0)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        for setting in fields(core.DistillSettings):
            box = self.boxes[setting.name] = _box(setting)
            box.setToolTip(f"<p>{setting.metadata['help']}</p><p>Default: {setting.default}</p>")
            form.addRow(setting.metadata["label"], box)
            _edited(box).connect(self._on_box_edited)
        self._value = core.DistillSettings()
        self.error = ""

    def value(self) -> core.DistillSettings:
        """The last possible settings; while ``error`` is not empty, the boxes show others."""
        return self._value

    def setValue(self, value: core.DistillSettings) -> None:
        for name, number in asdict(value).items():
            self.boxes[name].blockSignals(True)
            _show(self.boxes[name], number)
            self.boxes[name].blockSignals(False)
        self._on_box_edited()

    def _on_box_edited(self, *_: object) -> None:
        try:
            self._value = core.DistillSettings(**{name: _read(box) for name, box in self.boxes.items()})
        except core.SettingsError as error:
            self.error = str(error)
        else:
            self.error = ""
        self.valueChanged.emit(self._value)


class PresetPicker(QWidget):
    """Chooses how thorough a training is; ``form`` shows what that means and takes changes."""

    valueChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.form = SettingsForm()
        self.preset = combo("<br>".join(f"<b>{name}</b>: {text}" for name, text in EXPLAINED.items()), (*PRESETS, OWN))
        self.more = combo("Every option of the training, for those who know what they want", ("usual", "all options"))
        column(self, row("Thoroughness", self.preset), row("Options", self.more), self.form, margin=0)
        self.form.hide()
        self.preset.activated.connect(self._on_preset_activated)
        self.more.currentIndexChanged.connect(self.form.setVisible)
        self.form.valueChanged.connect(self._on_form_changed)
        self.setPreset("balanced")

    @property
    def error(self) -> str:
        return self.form.error

    def value(self) -> core.DistillSettings:
        return self.form.value()

    def setValue(self, value: core.DistillSettings) -> None:
        self.form.setValue(value)

    def setPreset(self, name: str) -> None:
        """Take the settings of a preset; everything else goes back to its default."""
        self.form.setValue(core.DistillSettings(**PRESETS[name]))

    def _on_preset_activated(self, _: int) -> None:
        name = self.preset.currentText()
        if name in PRESETS:
            self.setPreset(name)
        else:
            self.more.setCurrentIndex(1)

    def _on_form_changed(self, value: core.DistillSettings) -> None:
        self.preset.setCurrentText(preset_of(asdict(value), DEFAULTS) or OWN)
        self.valueChanged.emit(value)


def _box(setting: Any) -> _Box:
    details, kind = setting.metadata, str(setting.type)
    if "choices" in details:
        return combo("", details["choices"])
    if kind == "int":
        whole = QSpinBox()
        whole.setRange(details["low"], details["high"])
        whole.setValue(setting.default)
        return whole
    if kind == "float":
        number = QDoubleSpinBox()
        number.setDecimals(6)
        number.setRange(details["low"], details["high"])
        number.setSingleStep(setting.default / 2)
        number.setValue(setting.default)
        return number
    return QLineEdit(str(setting.default))


def _edited(box: _Box) -> Any:
    if isinstance(box, QComboBox):
        return box.currentTextChanged
    return box.editingFinished if isinstance(box, QLineEdit) else box.valueChanged


def _read(box: _Box) -> Any:
    if isinstance(box, QComboBox):
        return box.currentText()
    return box.text().strip() if isinstance(box, QLineEdit) else box.value()


def _show(box: _Box, value: Any) -> None:
    if isinstance(box, QComboBox):
        box.setCurrentText(value)
    elif isinstance(box, QLineEdit):
        box.setText(value)
    else:
        box.setValue(value)
