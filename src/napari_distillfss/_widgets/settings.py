"""A form for the settings of a training, drawn by magicgui from the declaration in the core."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from magicgui.widgets import ComboBox, Container, FloatSpinBox, LineEdit, SpinBox
from magicgui.widgets.bases import ValueWidget
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QWidget

import distillfss_core as core
from napari_distillfss._presets import EXPLAINED, OWN, PRESETS, preset_of
from napari_distillfss._widgets._common import WheelGuard, column, combo, row


class SettingsForm(QWidget):
    """A magicgui form for DistillSettings. `error` is the reason why the values of the boxes are not valid.

    Its boxes are made when they are first asked for: a hundred widgets take a third of a second.
    """

    valueChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._value = core.DistillSettings()
        self._boxes: Container[ValueWidget[Any]] | None = None
        self._guard = WheelGuard(self)
        self.error = ""

    @property
    def boxes(self) -> Container[ValueWidget[Any]]:
        """An editor for each setting."""
        if self._boxes is None:
            self._boxes = Container()
            self._boxes.extend(_box(setting) for setting in fields(core.DistillSettings))
            self._boxes.margins = (0, 0, 0, 0)
            self._fill(self._boxes)
            self._boxes.changed.connect(self._on_boxes_changed)
            column(self, self._boxes.native, margin=0)
            self._guard.protect(self)
        return self._boxes

    def setVisible(self, visible: bool) -> None:
        if visible:
            _ = self.boxes
        super().setVisible(visible)

    def value(self) -> core.DistillSettings:
        """The last valid settings; while ``error`` is not empty, the boxes show other values."""
        return self._value

    def setValue(self, value: core.DistillSettings) -> None:
        self._value, self.error = value, ""
        if self._boxes is not None:
            with self._boxes.changed.blocked():
                self._fill(self._boxes)
        self.valueChanged.emit(value)

    def _fill(self, boxes: Container[ValueWidget[Any]]) -> None:
        texts = self._value.to_text()
        for box in boxes:
            box.value = texts[box.name] if isinstance(box, LineEdit) else getattr(self._value, box.name)

    def _on_boxes_changed(self) -> None:
        values: dict[str, Any] = {
            box.name: box.value.strip() if isinstance(box, LineEdit) else box.value for box in self.boxes
        }
        try:
            self._value = core.DistillSettings.from_json(values)
        except core.SettingsError as error:
            self.error = str(error)
        else:
            self.error = ""
        self.valueChanged.emit(self._value)


class PresetPicker(QWidget):
    """Chooses a preset of the training; ``form`` shows its settings and takes changes."""

    valueChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.form = SettingsForm()
        self.preset = combo("<br>".join(f"<b>{name}</b>: {text}" for name, text in EXPLAINED.items()), (*PRESETS, OWN))
        self.more = combo("Advanced shows every setting of the training", ("basic", "advanced"))
        column(self, row("Training preset", self.preset), row("Settings", self.more), self.form, margin=0)
        self.form.hide()
        self.preset.activated.connect(self._on_preset_activated)
        self.more.currentIndexChanged.connect(self.form.setVisible)
        self.form.valueChanged.connect(self._on_form_changed)
        self.setPreset("default")

    @property
    def error(self) -> str:
        return self.form.error

    def value(self) -> core.DistillSettings:
        return self.form.value()

    def setValue(self, value: core.DistillSettings) -> None:
        self.form.setValue(value)

    def setPreset(self, name: str) -> None:
        """Set a preset; all other settings return to their defaults."""
        self.form.setValue(core.DistillSettings(**PRESETS[name]))

    def _on_preset_activated(self, _: int) -> None:
        name = self.preset.currentText()
        if name in PRESETS:
            self.setPreset(name)
        else:
            self.more.setCurrentIndex(1)

    def _on_form_changed(self, value: core.DistillSettings) -> None:
        self.preset.setCurrentText(preset_of(value.changed()) or OWN)
        self.valueChanged.emit(value)


def _box(setting: Any) -> ValueWidget[Any]:
    """A magicgui widget for one declared setting, named for assistive technology."""
    box = _editor(setting)
    box.native.setAccessibleName(setting.metadata["label"])
    return box


def _editor(setting: Any) -> ValueWidget[Any]:
    """A magicgui widget for one declared setting; values such as auto or 1/2 are edited as text."""
    details, kind, default = setting.metadata, str(setting.type), core.DistillSettings().to_text()[setting.name]
    help_and_default = f"<p>{details['help']}</p><p>Default: {default}</p>"
    common: dict[str, Any] = {"name": setting.name, "label": details["label"], "tooltip": help_and_default}
    if "choices" in details:
        return ComboBox(choices=details["choices"], value=setting.default, **common)
    if kind == "int":
        return SpinBox(min=details["low"], max=details["high"], value=setting.default, **common)
    if kind == "float":
        number = FloatSpinBox(min=details["low"], max=details["high"], step=1e-7, value=setting.default, **common)
        number.native.setSingleStep(setting.default / 2)  # as ``step`` it would round the values, too
        return number
    return LineEdit(value=default, **common)
