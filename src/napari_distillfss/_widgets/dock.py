"""The dock, whose sections follow the order of work from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar, Self
from weakref import ref

from napari.utils.notifications import show_info
from qtpy.QtCore import QEvent, QSize, Qt, QTimer
from qtpy.QtWidgets import QApplication, QFrame, QMainWindow, QScrollArea, QVBoxLayout, QWidget

import distillfss_core as core
from napari_distillfss._layers import ChosenVolume, take_units
from napari_distillfss._process import rare_collections
from napari_distillfss._session import Session
from napari_distillfss._widgets._common import ReplaceOffer, Section, WheelGuard
from napari_distillfss._widgets.apply import ApplyWidget, ObjectsWidget
from napari_distillfss._widgets.distill import DistillWidget
from napari_distillfss._widgets.model import ModelWidget
from napari_distillfss._widgets.notices import show_notices
from napari_distillfss._widgets.preview import PreviewWidget
from napari_distillfss._widgets.removal import guard_removals
from napari_distillfss._widgets.reopening import leave, take_up
from napari_distillfss._widgets.shortcuts import bind_shortcuts
from napari_distillfss._widgets.support import SupportWidget
from napari_distillfss._widgets.volume import VolumePicker

if TYPE_CHECKING:
    import napari

_WIDTH = 380  # so that half of a small screen is left for the image


_going_on: dict[int, DistillDock] = {}
"""Closed docks by their `id`, whose jobs have not ended."""


class DistillDock(QScrollArea):
    """Sections: Volume, Training slices, Train, Preview, Apply, Objects, Model.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        (The name is what napari asks for.)
    folder : path, optional
        Where annotations and students are kept; by default the user's data folder.

    Attributes
    ----------
    annotates : bool
        Whether slices are annotated and models trained in it.

    Notes
    -----
    A dock that is closed while a job runs goes on until the job has ended. A new one for its viewer is that dock.
    """

    annotates: ClassVar[bool] = True

    def __new__(cls, napari_viewer: Any, folder: Path | None = None) -> Self:
        for dock in _going_on.values():
            is_same = type(dock) is cls and dock.viewer is _bare(napari_viewer)
            if is_same and isinstance(dock, cls) and folder in (None, dock.session.folder):
                return dock
        return super().__new__(cls)

    def __init__(self, napari_viewer: napari.viewer.Viewer, folder: Path | None = None) -> None:
        if _going_on.pop(id(self), None) is not None:
            return
        super().__init__()
        Thread(target=getattr, args=(core, "open_volume"), name="distillfss readers").start()  # imports them
        self.viewer = _bare(napari_viewer)
        self._is_docked = False
        self._window: Callable[[], QMainWindow | None] = lambda: None  # that showed it last
        session = self.session = Session(folder, lambda: tuple(napari_viewer.layers), annotates=self.annotates)
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
        self._connect_sections()
        self.support.outline.evidence_of = self.preview.evidence_of
        session.model_changed.connect(self._on_model_changed)
        session.labels_changed.connect(self._on_labels_changed)
        session.closed.connect(bind_shortcuts(self))
        session.closed.connect(show_notices())
        session.closed.connect(guard_removals(self, napari_viewer))
        self._while_open = ExitStack()
        self._while_open.enter_context(rare_collections)
        session.closed.connect(self._while_open.close)
        self.destroyed.connect(session.close)
        application = QApplication.instance()
        assert application is not None  # no widget is made without one
        application.aboutToQuit.connect(session.close)
        session.busy_changed.connect(self._on_busy_changed)
        number = id(self)
        session.closed.connect(lambda: _forget(number))
        self.destroyed.connect(lambda: _forget(number))
        if not take_up(self):
            self._on_volume_chosen(self.volume.value())

    def _connect_sections(self) -> None:
        self.preview.correct.connect(self.support.correct)
        self.apply.appeared.connect(self.preview.give_way)
        self.preview.on.toggled.connect(self._on_preview_toggled)
        for part in (self.support, self.distill, self.preview, self.apply, self.model.history):
            part.offer.clicked.connect(lambda _, offer=part.offer: self._read_as_zero(offer))
        self.preview.offer.clicked.connect(lambda: self.preview.on.setChecked(True))  # the error has switched it off

    def _read_as_zero(self, offer: ReplaceOffer) -> None:
        """Read pixels that are not finite as 0, of the chosen volume or of another one whose slices are used."""
        if not offer.key:
            self.volume.replace_nan(0.0)
            return
        offer.hide()
        self.session.keep_replacement_at(offer.key, 0.0)
        self.session.slices_changed.emit()

    def sizeHint(self) -> QSize:
        return QSize(_WIDTH, 700)

    def event(self, event: QEvent | None) -> bool:
        """End the session once the dock is taken out of the window: it may live on until Python collects it.

        The next dock of the window goes on with it. A job that runs goes on to its end before.
        """
        is_handled = super().event(event)
        if event is not None and event.type() == QEvent.Type.ParentChange:
            if self._is_docked and self.parent() is None:
                if self.session.busy:
                    self._go_on()
                else:
                    self._end()
            self._is_docked = self.parent() is not None
        elif event is not None and event.type() == QEvent.Type.Show:
            window = _main_window_of(self)
            self._window = ref(window) if window is not None else self._window
        return is_handled

    def _go_on(self) -> None:
        _going_on[id(self)] = self
        window = self._window()
        if window is not None:  # napari may be closed before
            window.destroyed.connect(self.session.close)
        show_info(f"DistillFSS: {self.session.busy} goes on; open the dock again to see it")

    def _on_busy_changed(self) -> None:
        if id(self) in _going_on and not self.session.busy:
            QTimer.singleShot(0, self._end_unless_opened)  # its result is taken before

    def _end_unless_opened(self) -> None:
        if id(self) in _going_on and not self.session.busy:
            self._end()

    def _end(self) -> None:
        leave(self)
        self.session.close()

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

    def _on_preview_toggled(self, on: bool) -> None:
        if on:  # both would be twice as dense
            self.apply.hide_labels()

    def _on_model_changed(self) -> None:
        for widget in (self.apply, self.model):
            self.sections[widget].heading.setChecked(True)

    def _on_labels_changed(self) -> None:
        self.sections[self.objects].heading.setChecked(True)


class ApplyDock(DistillDock):
    """A dock for a student that exists already: load, preview, apply, count; nothing is annotated or trained."""

    annotates = False

    def __init__(self, napari_viewer: napari.viewer.Viewer, folder: Path | None = None) -> None:
        super().__init__(napari_viewer, folder)
        content = self.widget()
        layout = content.layout() if content is not None else None
        assert isinstance(layout, QVBoxLayout)  # as the base class has made it
        self.sections[self.support].hide()
        self.sections[self.distill].hide()
        parts = (self.volume, self.model, self.preview, self.apply, self.objects)
        for row, widget in enumerate(parts):
            section = self.sections[widget]
            layout.removeWidget(section)
            layout.insertWidget(row, section)
            section.heading.setText(f"{row + 1}  {section.heading.text().split(maxsplit=1)[1]}")
            section.heading.setChecked(widget is not self.objects)


def _forget(number: int) -> None:
    _going_on.pop(number, None)


def _bare(viewer: Any) -> Any:
    """A viewer without the proxy that napari may give to plugins."""
    return getattr(viewer, "__wrapped__", viewer)


def _main_window_of(widget: QWidget) -> QMainWindow | None:
    holder: QWidget | None = widget
    while holder is not None and not isinstance(holder, QMainWindow):
        holder = holder.parentWidget()
    return holder
