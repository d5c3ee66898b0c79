"""The dock, whose sections follow the order of work from top to bottom."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import QEvent, QSize, Qt
from qtpy.QtWidgets import QApplication, QFrame, QScrollArea, QVBoxLayout, QWidget

import distillfss_core as core
from napari_distillfss._layers import ChosenVolume, take_units
from napari_distillfss._session import Session
from napari_distillfss._widgets._common import Section, WheelGuard
from napari_distillfss._widgets.apply import ApplyWidget, ObjectsWidget
from napari_distillfss._widgets.distill import DistillWidget
from napari_distillfss._widgets.model import ModelWidget
from napari_distillfss._widgets.notices import show_notices
from napari_distillfss._widgets.preview import MODEL, PreviewWidget
from napari_distillfss._widgets.removal import guard_removals
from napari_distillfss._widgets.reopening import leave, take_up
from napari_distillfss._widgets.shortcuts import bind_shortcuts
from napari_distillfss._widgets.support import SupportWidget
from napari_distillfss._widgets.volume import VolumePicker

if TYPE_CHECKING:
    import napari

_WIDTH = 380  # so that half of a small screen is left for the image


class DistillDock(QScrollArea):
    """Sections: Volume, Training slices, Train, Preview, Apply, Objects, Model.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        (The name is what napari asks for.)
    folder : path, optional
        Where annotations and students are kept; by default the user's data folder.
    """

    def __init__(self, napari_viewer: napari.viewer.Viewer, folder: Path | None = None) -> None:
        super().__init__()
        self._is_docked = False
        session = self.session = Session(folder, lambda: tuple(napari_viewer.layers))
        self.volume = VolumePicker(session, napari_viewer)
        self.support = SupportWidget(session, napari_viewer)
        self.distill = DistillWidget(session)
        self.preview = PreviewWidget(session, napari_viewer)
        self.apply = ApplyWidget(session, napari_viewer)
        self.objects = ObjectsWidget(session, napari_viewer)
        self.model = ModelWidget(session)
        sections = [
            Section("1  Volume", self.volume, tooltip="What to segment"),
            Section("2  Training slices", self.support, tooltip="Slices that you annotate: the support"),
            Section("3  Train", self.distill, tooltip="Distillation of a student, a small model, from your slices"),
            Section("4  Preview", self.preview, tooltip="Output of the model for the plane on screen"),
            Section("5  Apply", self.apply, tooltip="The whole volume into OME-Zarr", unfolded=False),
            Section("6  Objects", self.objects, tooltip="Count and measure what was segmented", unfolded=False),
            Section(
                "7  Model",
                self.model,
                tooltip="The model as a file, earlier models, and the session as a script",
                unfolded=False,
            ),
        ]
        self.sections = {section.content: section for section in sections}
        content = QWidget()
        layout = QVBoxLayout(content)
        layout.setContentsMargins(2, 2, 2, 2)
        layout.setSpacing(2)
        for section in sections:
            layout.addWidget(section)
        layout.addStretch()
        self.setWidget(content)
        WheelGuard(self).protect(content)
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setMinimumWidth(_WIDTH)
        self.volume.valueChanged.connect(self._on_volume_chosen)
        self.preview.correct.connect(self.support.put_into_plane)
        self.support.outline.evidence_of = self.preview.evidence_of
        session.model_changed.connect(self._on_model_changed)
        session.labels_changed.connect(self._on_labels_changed)
        session.closed.connect(bind_shortcuts(self, napari_viewer))
        session.closed.connect(show_notices())
        session.closed.connect(guard_removals(self, napari_viewer))
        self.destroyed.connect(session.close)
        application = QApplication.instance()
        assert application is not None  # no widget is made without one
        application.aboutToQuit.connect(session.close)
        if not take_up(self):
            self._on_volume_chosen(self.volume.value())

    def sizeHint(self) -> QSize:
        return QSize(_WIDTH, 700)

    def event(self, event: QEvent | None) -> bool:
        """End the session once the dock is taken out of the window: it may live on until Python collects it.

        The next dock of the window goes on with it.
        """
        is_handled = super().event(event)
        if event is not None and event.type() == QEvent.Type.ParentChange:
            if self._is_docked and self.parent() is None:
                leave(self)
                self.session.close()
            self._is_docked = self.parent() is not None
        return is_handled

    def unfold(self, content: QWidget) -> None:
        """Unfold a section and scroll to it."""
        section = self.sections[content]
        section.heading.setChecked(True)
        self.ensureWidgetVisible(section)

    def _on_volume_chosen(self, chosen: ChosenVolume | None) -> None:
        with suppress(core.OutputError, core.InputFileError):  # the training slices say it; all else goes on
            self.session.choose_volume(chosen)
        if chosen is not None:
            take_units(self.session.layers(), chosen.layer)

    def _on_model_changed(self) -> None:
        for widget in (self.apply, self.model):
            self.sections[widget].heading.setChecked(True)

    def _on_labels_changed(self) -> None:
        self.sections[self.objects].heading.setChecked(True)


class ApplyDock(DistillDock):
    """A dock for a student that exists already: load, preview, apply, count; nothing is annotated or trained."""

    def __init__(self, napari_viewer: napari.viewer.Viewer, folder: Path | None = None) -> None:
        super().__init__(napari_viewer, folder)
        content = self.widget()
        layout = content.layout() if content is not None else None
        assert isinstance(layout, QVBoxLayout)  # as the base class has made it
        self.sections[self.support].hide()
        self.sections[self.distill].hide()
        self.preview.source.setCurrentText(MODEL)
        parts = (self.volume, self.model, self.preview, self.apply, self.objects)
        for row, widget in enumerate(parts):
            section = self.sections[widget]
            layout.removeWidget(section)
            layout.insertWidget(row, section)
            section.heading.setText(f"{row + 1}  {section.heading.text().split(maxsplit=1)[1]}")
            section.heading.setChecked(widget is not self.objects)
