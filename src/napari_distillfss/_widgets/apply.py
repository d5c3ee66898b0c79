"""Segmentation of the volume, or a region of it, into OME-Zarr; count and measurement of its objects."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QCheckBox, QDoubleSpinBox, QFileDialog, QLineEdit, QWidget
from superqt.utils import qthrottled

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._annotations import FIRST_CLASS, Class, model_classes
from napari_distillfss._layers import (
    ANNOTATIONS,
    LABELS,
    PREVIEW,
    Box,
    ChosenVolume,
    OnGrid,
    camera_of,
    choose_labels,
    has_mark,
    move_layer,
    move_sliders,
)
from napari_distillfss._scripts import free_name
from napari_distillfss._session import Applied, Counted, Session
from napari_distillfss._tasks import Seen, Written, iter_applying, iter_counting, iter_exporting, open_levels
from napari_distillfss._threads import Job, LatestJob
from napari_distillfss._widgets._common import (
    JobBar,
    Message,
    ReplaceOffer,
    Section,
    allow,
    attempt,
    button,
    choose_output,
    column,
    combo,
    row,
    spin,
    until_closed,
)
from napari_distillfss._widgets.batch import BatchWidget
from napari_distillfss._widgets.mark import ObjectMark, middle_of
from napari_distillfss._widgets.region import RegionEdit
from napari_distillfss._widgets.support import colors_of
from napari_distillfss._widgets.table import ObjectTable

MODES = {"planewise": "planewise", "smoothed along z": "smoothed", "consensus of 3 directions": "consensus"}
_LOOK_AGAIN = 500  # milliseconds
_NO_LABELS = "Apply a model first, or open a labels layer"
NUMBERED = "numbered"
METHODS = ("connected", "watershed", NUMBERED)
_LABELS_OF_LAYER = ("any label", "selected label")
_READY_TO_COUNT = "Ready to count the objects of {}"
_NO_MODEL, _LOAD_FIRST = "Train or load a model first", "Load a model first"
_READY = "Ready. You can stop and resume at any time"
_MEASURED = 5  # annotated planes, at most, whose objects are measured
_SPECK = 9  # pixels; fewer are no object but a stroke
_WIDEST_RADIUS = 15.0  # pixels that the watershed takes


class ApplyWidget(QWidget):
    """Writes labels with the student; their layer appears as soon as the first labels are written.

    ``appeared`` is emitted when the labels of the chosen volume are finished and seen.
    """

    appeared = Signal()

    def __init__(self, session: Session, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session, self._viewer = session, viewer
        self._no_model = _NO_MODEL if session.annotates else _LOAD_FIRST
        self._running: Applied | None = None
        self._written = False
        self._levels: Sequence[OnGrid] = ()  # that the layer shows
        self._is_behind = False  # whether labels were written that the layer does not show yet
        self._active: Any = None  # the layer that was chosen when Apply was pressed
        self._shown: Path | None = None  # whose labels the layer shows; None while it is empty
        self._of: Any = None  # the grid of voxels, and the labels of before, that path and region were chosen for
        self._colored: tuple[Class, ...] = ()  # classes that its colors are of
        self.layer: Any = None
        self.region = RegionEdit()
        self.on_screen = button(
            "What is on screen", "Restrict the region to the visible part of the planes", self._on_screen_clicked
        )
        self.mode = combo(
            "planewise: each plane alone; smoothed: with its neighbors along z, which removes flicker; consensus: "
            "three directions, for nearly cubic voxels (ten times slower)",
            tuple(MODES),
        )
        self.tta = QCheckBox("Test-time augmentation")
        self.tta.setToolTip(
            "Mean of eight turned and mirrored copies: better labels of most data, but eight times as slow. "
            "The preview does without it"
        )
        self.out = QLineEdit()
        self.out.setToolTip("Folder of the labels, ending in .ome.zarr; an unfinished one is continued")
        self.out.setPlaceholderText("NAME.ome.zarr")
        self.browse = button("…", "Choose where to write", self._on_browse_clicked)
        self.browse.setMaximumWidth(32)
        self.browse.setAccessibleName("Choose where to write")
        self.replace = QCheckBox("Replace existing labels")
        self.replace.setToolTip("Replace labels that this plugin has written; other files are never replaced")
        self.apply = button(
            "Apply", "Segment into OME-Zarr. After a cancel or crash, Apply continues the run", self.start
        )
        self.job = Job(session, "Segmentation", self, in_turn=True)
        self.message = Message(self._no_model)
        self.offer = ReplaceOffer(session, self.job)
        self.anew = button("Replace labels", "Replace the labels that are there, and begin anew", self.start_anew)
        self._offer_anew(False)
        told = row(self.message, self.offer, self.anew, first=3)
        self.batch = BatchWidget(session, viewer, lambda: MODES[self.mode.currentText()], self.tta.isChecked)
        column(
            self,
            row(self.region, self.on_screen),
            row("Mode", self.mode),
            row("Save to", self.out, self.browse),
            self.tta,
            self.replace,
            self.apply,
            JobBar(
                self.job,
                cancel="Stop; what is written is kept, and Apply goes on from there",
                instead_of=told,
                is_patient=lambda: self._written,
            ),
            told,
            Section("Many volumes", self.batch, tooltip="Folders of files, open layers, time points", unfolded=False),
        )
        self._soon = until_closed(session, qthrottled(self._show_again, timeout=_LOOK_AGAIN, leading=False))
        self._reading = LatestJob(self)
        self._reading.answered.connect(self._on_read)
        session.closed.connect(self._reading.cancel)
        self.job.stepped.connect(self._on_job_stepped)
        self.job.done.connect(self._on_job_done)
        self.job.failed.connect(self._on_job_failed)
        self.job.ended.connect(self._on_job_ended)
        session.volume_changed.connect(self._on_volume_changed)
        session.volume_changed.connect(self._on_state_changed)
        session.classes_changed.connect(self._on_classes_changed)
        session.labels_changed.connect(self._on_classes_changed)  # those of a closed dock are taken up
        session.model_changed.connect(self._on_state_changed)
        session.busy_changed.connect(self._on_state_changed)
        for changed in (session.busy_changed, session.volume_changed, self.out.textChanged):
            changed.connect(lambda *_: self._offer_anew(False))
        self._on_state_changed()

    def start(self) -> None:
        """Segment the volume, or continue a stopped run."""
        self._start(overwrite=self.replace.isChecked())

    def start_anew(self) -> None:
        """Segment the volume in place of the labels that are there."""
        self._start(overwrite=True)

    def _offer_anew(self, is_offered: bool) -> None:
        self.anew.setVisible(is_offered)
        self.anew.setEnabled(is_offered)

    def _start(self, *, overwrite: bool) -> None:
        def start() -> None:
            chosen, model = self._session.volume, self._session.model
            if chosen is None:
                raise core.SettingsError("no volume is chosen; choose an image layer first")
            if model is None:
                raise core.SettingsError(self._session.no_model)
            out = Path(self.out.text().strip() or ".").expanduser().absolute()
            if ".zarr" not in out.suffixes and out.parent.name != "labels":
                raise core.OutputError(f"{out}: labels are OME-Zarr; end the name in .ome.zarr")
            region, mode = self.region.value(), MODES[self.mode.currentText()]
            options = {"region": region, "mode": mode, "overwrite": overwrite}
            segmenter = model.with_tta(self.tta.isChecked())
            self.job.check_free()
            by = (self._session.model_path, tuple(model.class_names))
            self._running, self._written = Applied(chosen, out, mode, region, *by, tta=segmenter.tta), False
            self._active = self._viewer.layers.selection.active
            self._prepare_layer(self._running)
            see = _seen_in(chosen, self._viewer.dims)
            self.job.start(lambda stop: iter_applying(chosen.volume, segmenter, out, stop, see=see, **options))
            self.message.tell("")

        attempt(self.message, start)

    def shown(self) -> tuple[Any, Path | None]:
        """The layer of results, and the path of the labels that it shows."""
        return self.layer, self._shown

    def setShown(self, layer: Any, out: Path | None) -> None:
        """Go on with a layer of results."""
        if layer in self._viewer.layers:
            self.layer, self._shown = layer, out

    def _on_job_stepped(self, step: Any) -> None:
        if isinstance(step, Written):
            self._show(step.levels)
            if not self._written:
                self._written = self.layer.visible = True
        elif getattr(step, "level", None) == 0:
            self._is_behind = True
            self._soon()

    def _show_again(self) -> None:
        """Read the labels on screen again, in another thread; napari draws them then, so not after every piece."""
        if self.layer is not None and self._is_behind:
            self._is_behind = False
            levels = self._levels

            def read(_: Event) -> Generator[Sequence[OnGrid], None, None]:
                for level in levels:
                    level.renew()
                yield levels

            self._reading.ask(read)

    def _on_read(self, levels: Sequence[OnGrid]) -> None:
        if levels is self._levels:
            self.layer.refresh()

    def _on_job_ended(self) -> None:
        self._soon.cancel()
        self._show_again()
        if not self._written:
            if self._shown is None and self.layer is not None:
                self.layer.visible = False
            if self._active in self._viewer.layers:
                self._viewer.layers.selection.active = self._active

    def _on_job_done(self, report: Any) -> None:
        if self._running is None:
            return
        if report is None:
            self.message.tell("Stopped; what is written is kept, and Apply goes on from there")
            return
        self._session.set_applied(self._running)
        finished = f", {report.finished} found finished" if report.finished else ""
        text = f"Done in {fmt.duration(report.seconds)}: {fmt.count(report.computed, 'piece')} computed{finished}"
        if report.warning:
            self.message.warn(f"{text}; {report.path.name}, but {report.warning}")
        else:
            self.message.tell(f"{text}; {report.path.name}")
        self._show_finished()

    def _on_job_failed(self, message: str) -> None:
        begun = re.fullmatch(r"(.*): was begun with another (.*); .*", message)
        if begun is not None:
            what = f"results of another {begun[2]}"
            read = re.fullmatch(r"replace_nan \((.*), not (.*)\)", begun[2])
            if read is not None:
                what = f"results with NaN and infinite pixels {_as_read(read[1])}, not {_as_read(read[2])}"
            message = (
                f"{Path(begun[1]).name}: holds {what}. Press “{self.anew.text()}”, tick “{self.replace.text()}”, or "
                "choose another name"
            )
        self.message.warn(message)
        self._offer_anew(begun is not None)

    def _show(self, data: Any) -> None:
        """Show labels as they are seen in napari: the finest level during the run, the pyramid after it."""
        if self._running is None:
            return
        applied, chosen = self._running, self._running.volume
        self._prepare_layer(applied)
        self._levels = data
        move_layer(self._viewer, self.layer, data, chosen.place())
        self._color(applied)
        if self._shown is None:
            self.layer.name = applied.out.name.partition(".")[0]
            self.layer.metadata[LABELS] = str(applied.out)
        self._shown, self._is_behind = applied.out, False

    def _color(self, applied: Applied) -> None:
        """Give the labels the colors of their classes; those of another volume on screen do not change them."""
        chosen, annotations = self._session.volume, self._session.annotations
        is_here = chosen is not None and annotations is not None and chosen.layer is applied.volume.layer
        if self._colored and not is_here:
            return
        classes = model_classes(applied.classes, annotations.classes if is_here and annotations else ())
        if classes != self._colored:  # napari draws after each change
            self.layer.colormap, self._colored = colors_of(classes, first=1), classes

    def _on_classes_changed(self) -> None:
        for applied in (self._running, self._session.applied):
            if applied is not None and applied.out == self._shown and self.layer in self._viewer.layers:
                self._color(applied)
                return

    def _show_finished(self) -> None:
        if self.layer in self._viewer.layers:
            self.layer.visible = True
            if self._running is not None and self._running.volume is self._session.volume:
                self.appeared.emit()

    def hide_labels(self) -> None:
        """Hide the labels, as the preview of the same objects is seen from now on."""
        chosen, of = self._session.volume, self._running.volume if self._running is not None else None
        if of is not None and (chosen is None or chosen.layer is not of.layer):
            return  # they are of another volume
        if self.layer in self._viewer.layers and self._shown is not None and self.layer.visible:
            self.layer.visible = False
            self.message.tell(f"Hidden while the preview is on; the eye of {self.layer.name!r} shows the labels")

    def _prepare_layer(self, applied: Applied) -> None:
        """Add an empty layer, unless there is one that is empty or shows the same labels.

        napari takes a moment to make a layer: better when *Apply* is pressed than while work goes on.
        """
        chosen = applied.volume
        ndim = chosen.layer.ndim
        if self.layer in self._viewer.layers and self._shown in (None, applied.out) and self.layer.ndim == ndim:
            return
        nothing = np.broadcast_to(np.uint8(0), (chosen.planes, *chosen.plane_shape))
        self._shown, self._colored = None, ()
        self.layer = self._viewer.add_labels(
            chosen.pyramid([nothing]),
            name="segmentation",
            multiscale=True,
            opacity=0.5,
            metadata={LABELS: True},
            **chosen.place(),
        )

    def _on_volume_changed(self) -> None:
        chosen = self._session.volume
        if not self.job.running:
            self.message.tell(_READY if self._session.model is not None else self._no_model)
        earlier = self._session.annotations.written if self._session.annotations else None
        before, self._of = self._of, (chosen.layer, chosen.lead, chosen.factors, earlier) if chosen else None
        if chosen is not None and self._of != before:  # where NaN is read as another number they stay
            z, y, x = chosen.volume.shape[:3]
            self.region.setShape((z, y, x))
            path = chosen.volume.path
            folder = path.parent if path and os.access(path.parent, os.W_OK) else Path.home()
            stem = (path.name if path else chosen.name.replace("/", "_")).partition(".")[0].strip()
            is_there = earlier is not None and earlier.is_dir()
            self.out.setText(str(earlier if is_there else folder / f"{stem}-labels.ome.zarr"))
            self._take_earlier(chosen, Path(self.out.text()))

    def _take_earlier(self, chosen: ChosenVolume, out: Path) -> None:
        """Take labels of this volume that an earlier session has written: they can be counted, and a layer has them."""
        annotations = self._session.annotations
        if not (out / "0").is_dir() or (self._session.applied is not None and self._session.applied.out == out):
            return
        with suppress(core.DistillFSSError, OSError, ValueError):
            levels = open_levels(out)
            if levels and tuple(levels[0].shape) == tuple(chosen.volume.shape[:3]):
                classes = annotations.class_names if annotations else ("object",)
                applied = Applied(chosen, out, "", None, None, classes, is_earlier=True)
                self._session.set_applied(applied)
                if self._session.is_another_image and not self.job.running:
                    self._show_hidden(applied, levels)

    def _show_hidden(self, applied: Applied, levels: list[Any]) -> None:
        """Add a hidden layer of labels that were written before, unless a layer has them."""
        if any(layer.metadata.get(LABELS) == str(applied.out) for layer in self._viewer.layers):
            return
        selection = self._viewer.layers.selection
        active, self._running = selection.active, applied
        self._prepare_layer(applied)
        self.layer.visible = False  # before it has the labels, so that none are read until they are seen
        self._show(applied.volume.pyramid(levels))
        selection.active = active
        self.message.tell(f"Labels of before are in the hidden layer {self.layer.name!r}")

    def _on_screen_clicked(self) -> None:
        chosen = self._session.volume
        if chosen is not None:
            self.region.setValue(((0, chosen.planes), *chosen.on_screen()))

    def _on_browse_clicked(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Write labels to", self.out.text(), "OME-Zarr (*.ome.zarr)")
        if path:
            self.out.setText(path if ".zarr" in Path(path).suffixes else f"{path}.ome.zarr")

    def _on_state_changed(self) -> None:
        no_model = "" if self._session.model is not None else self._session.no_model
        no_volume = "" if self._session.volume is not None else "no volume is chosen; choose an image layer first"
        allow(self.apply, self._session.no_job or no_volume or no_model)
        allow(self.on_screen, no_volume)
        if self._session.model is not None and self.message.text() in (self._no_model, self._session.no_model):
            self.message.tell(_READY)


def _as_read(number: str) -> str:
    """What is read in place of pixels that are not finite, as a phrase."""
    return "as they are" if number == "None" else f"read as {float(number):g}"


def _seen_in(chosen: ChosenVolume, dims: Any) -> Seen:
    """Makes a pyramid of levels; the plane on screen is in memory, so that napari does not wait for the disk."""
    return lambda levels: chosen.pyramid(levels, shown=[chosen.plane_on(dims)])


def object_radius(planes: Sequence[np.ndarray], default: float = 8.0) -> float:
    """Median radius, in pixels, of the connected objects in painted planes "y x"; ``default`` without any."""
    from scipy import ndimage

    sizes = [np.bincount(ndimage.label(plane >= FIRST_CLASS, np.ones((3, 3)))[0].ravel())[1:] for plane in planes]
    areas = np.concatenate([np.zeros(0, int), *sizes])
    areas = areas[areas >= _SPECK]
    return float(np.sqrt(np.median(areas) / np.pi)) if len(areas) else default


@dataclass(frozen=True)
class _Count:
    """Objects being counted: the labels, what is written, and whether *Apply* has written the labels."""

    chosen: ChosenVolume
    counted: Counted
    is_of_applied: bool


class ObjectsWidget(QWidget):
    """Numbers the objects of labels, written ones or those of any Labels layer, and shows their measures."""

    def __init__(self, session: Session, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session, self._viewer = session, viewer
        self._running: _Count | None = None
        self._suited: Any = None  # labels that the radius was chosen for
        self._data: Any = None  # what the layer will show of the objects
        self._listed: Applied | None = None  # the written labels in the list
        self._own: dict[Path, Path] = {}  # objects written in this session, the only ones that are replaced
        self._shown: Path | None = None  # whose objects the layer shows
        self.layer: Any = None
        self.mark = ObjectMark(viewer)
        self.labels = combo("Labels whose objects are counted: those that Apply has written, or any labels layer")
        self.method = combo(
            "connected: each connected piece is one object; watershed: touching objects are separated where they "
            "are narrow; numbered: each number is an object already",
            METHODS,
        )
        self.method.setAccessibleName("Method")
        self.of_class = combo("Class of the objects")
        self.radius = QDoubleSpinBox()
        self.radius.setDecimals(4)
        self.radius.setRange(0.0001, 1e6)
        self.radius.setValue(5)
        self.radius.setToolTip("Radius of a typical object, in the unit of the pixel size, for the watershed")
        self.smallest = spin(1, 10**9, 20, "Objects of fewer voxels are left out")
        self.count = button("Count objects", "Number and measure the objects of the labels", self.start)
        self.job = Job(session, "Object count", self, in_turn=True)
        self.table = ObjectTable()
        self.save_labels = button(
            "Labels as TIFF…",
            "Write the labels chosen above; counted objects are among them",
            self.ask_to_export_labels,
        )
        self.save_table = button("Table as CSV…", "Write the measures of the counted objects", self._on_save_table)
        self.exporting = Job(session, "Label export", self)
        self._measuring = LatestJob(self)
        self.message = Message(_NO_LABELS)
        column(
            self,
            row("Labels", self.labels),
            row(self.method, "Radius", self.radius),
            row("Class", self.of_class),
            row("Min. size (voxels)", self.smallest),
            self.count,
            JobBar(
                self.job,
                cancel="Stop; Count objects begins again",
                instead_of=self.message,
                is_patient=lambda: False,
            ),
            row(self.save_labels, self.save_table),
            JobBar(
                self.exporting,
                cancel="Stop; nothing is written",
                starting="Writing labels",
                instead_of=self.message,
            ),
            self.message,
            self.table,
        )
        self.table.hide()
        self.radius.setEnabled(False)
        self._connect(session, viewer)
        self._on_layers_changed()

    def _connect(self, session: Session, viewer: Any) -> None:
        self.labels.currentIndexChanged.connect(self._on_state_changed)
        self.method.currentIndexChanged.connect(self._on_state_changed)
        self.table.chosen.connect(self._on_object_chosen)
        self.job.stepped.connect(self._on_job_stepped)
        self.job.done.connect(self._on_job_done)
        self.job.failed.connect(self.message.warn)
        self._measuring.answered.connect(self.radius.setValue)
        self._measuring.idle.connect(self._on_state_changed)
        self.exporting.done.connect(self._on_exported)
        self.exporting.failed.connect(self.message.warn)
        session.labels_changed.connect(self._on_labels_changed)
        session.volume_changed.connect(self._on_volume_changed)
        session.busy_changed.connect(self._on_state_changed)
        session.closed.connect(self._forget_viewer)
        events = viewer.layers.events
        for event in (events.inserted, events.removed, events.renamed):
            event.connect(self._on_layers_changed)

    def shown(self) -> tuple[Any, Any, Path | None, dict[Path, Path]] | None:
        """What was counted, the layer of the objects, their path and all that this session has written."""
        return None if self.table.isHidden() else (self._running, self.layer, self._shown, self._own)

    def setShown(self, shown: tuple[Any, Any, Path | None, dict[Path, Path]] | None) -> None:
        """Go on with the table and the layer of a closed dock, if both are still there."""
        if shown is None or shown[1] not in self._viewer.layers:
            return
        with suppress(OSError, ValueError):  # the table was removed, or written anew by another program
            self.table.read(shown[0].counted.table)
            self._running, self.layer, self._shown, self._own = shown
            self.layer.events.selected_label.connect(self._on_label_selected)
            self.table.show()
            self._on_state_changed()
            count = fmt.count(len(self.table.model.values), "object")
            self.message.tell(f"{count}, counted before the dock was closed; measures in {shown[0].counted.table}")

    def start(self) -> None:
        """Number and measure the objects."""

        def start() -> None:
            self.job.check_free()
            source = self._source()
            is_of_applied = isinstance(source, Applied)
            chosen, labels = self._open(source)
            first = self._first_output(source)
            out = self._own.get(first) or _free_output(first)
            table = _table_of(out)
            options = self._options(source)
            image = self._image_on(chosen) if not is_of_applied else chosen.volume
            measured = {"image": image} if image is not None and image.ndim == 3 else {}
            overwrite = first in self._own
            written: dict[str, Any] = {"table": table, "overwrite": overwrite, **measured, **options}
            see: Seen = lambda levels: chosen.pyramid(levels, shown=[0, chosen.plane_on(self._viewer.dims)])  # noqa: E731
            self.job.start(lambda stop: iter_counting(labels, out, stop, see=see, **written))
            self._own[first] = out
            self._running = _Count(chosen, Counted(out, table, options), is_of_applied)
            self.message.tell("")

        attempt(self.message, start)

    def export_labels(self, path: Path) -> None:
        """Write the chosen labels as TIFF; a file that is there is replaced."""

        def start() -> None:
            _, labels = self._open(self._source())
            self.exporting.start(lambda stop: iter_exporting(labels, path, stop))

        attempt(self.message, start)

    def export_table(self, path: Path) -> None:
        """Write the table of the counted objects as CSV; a file that is there is replaced."""
        if self._running is None or self.table.isHidden():
            self.message.warn("nothing is counted yet; press Count objects first")
            return
        table = self._running.counted.table
        try:
            with suppress(shutil.SameFileError):
                temporary = shutil.copyfile(table, path.with_name(f"{path.name}.partial"))
                temporary.replace(path)
        except OSError as error:
            self.message.warn(f"cannot write {path}: {error.strerror or error}; choose another place")
            return
        self.message.tell(f"The table is in {path}")

    def _source(self) -> Any:
        """The chosen labels: an `Applied` or a Labels layer.

        Raises
        ------
        core.SettingsError
            If there are none.
        """
        source = self.labels.currentData()
        if source is None:
            raise core.SettingsError("there are no labels yet; apply a model, or open a labels layer")
        return source

    def _open(self, source: Any) -> tuple[ChosenVolume, Any]:
        """Where the labels lie in napari, and what the core opens: a path or a volume."""
        if isinstance(source, Applied):
            return source.volume, source.out
        chosen = choose_labels(source, self._viewer.dims.point)
        return chosen, chosen.volume

    def _first_output(self, source: Any) -> Path:
        """Where the numbered objects of labels are written unless something is there."""
        if isinstance(source, Applied):
            folder, stem = source.out.parent, source.out.name.partition(".")[0]
        else:
            folder, stem = self._session.folder / "objects", "".join(c if c.isalnum() else "_" for c in source.name)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise core.OutputError(
                    f"cannot make {folder}: {error.strerror}; make room or let it be written, or save the layer "
                    "as a file and count that"
                ) from error
        return folder / f"{stem}-objects.ome.zarr"

    def _options(self, source: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"min_voxels": self.smallest.value()}
        method = self.method.currentText()
        if method == NUMBERED:
            return {**options, "method": "numbered"}
        if isinstance(source, Applied):
            options = {"class_id": self.of_class.currentIndex() + 1, **options}
        elif self.of_class.currentIndex() == 1:
            options = {"class_id": int(source.selected_label), **options}
        return {**options, "method": "watershed", "radius": self.radius.value()} if method == "watershed" else options

    def _image_on(self, chosen: ChosenVolume) -> Any:
        """Volume of the image, if it lies on the grid of these labels."""
        image = self._session.volume
        if image is None or image.volume.shape != chosen.volume.shape:
            return None
        same = np.allclose(image.point_of(0, 0, 0)[-2:], chosen.point_of(0, 0, 0)[-2:])
        return image.volume if same and np.allclose(image.layer.scale[-2:], chosen.layer.scale[-2:]) else None

    def _suit_radius(self, chosen: ChosenVolume) -> None:
        """Set the radius to that of the annotated objects, within what the watershed takes; planes are read later."""
        annotations, scale = self._session.annotations, chosen.volume.scale
        numbers = annotations.planes() if annotations is not None else []
        some = [partial(annotations.plane, z) for z in numbers[:: len(numbers) // _MEASURED + 1]] if annotations else []
        pixel, widest = scale[2] or 1.0, _WIDEST_RADIUS * min([s for s in scale if s] or [1.0])
        self.radius.setSuffix(" µm" if chosen.pixel_size else " pixels" if not scale[2] else "")

        def measure(_: Event) -> Generator[float, None, None]:
            yield min(object_radius([read() for read in some]) * pixel, widest)

        self._measuring.ask(measure)

    def _on_job_stepped(self, step: Any) -> None:
        if isinstance(step, Written):
            self._data = step.levels

    def _on_job_done(self, report: Any) -> None:
        if report is None or self._running is None:
            self.message.tell("Stopped; Count objects begins again")
            return
        chosen, counted = self._running.chosen, self._running.counted
        if self._running.is_of_applied:
            self._session.counted = counted
        self.mark.hide()
        self.table.read(counted.table)
        self._show(chosen, counted.out)
        if self._running.is_of_applied:
            for layer in self._viewer.layers:
                if has_mark(layer, LABELS):  # under the objects, it would hide the image with them
                    layer.visible = False
        self.layer.features = self.table.features()
        self.table.show()
        self._on_state_changed()
        small = f", {report.too_small} smaller ones left out" if report.too_small else ""
        self.message.tell(
            f"{fmt.count(report.objects, 'object')}{small}; measures in "
            + (f"{counted.table.name}, beside the labels" if self._running.is_of_applied else str(counted.table))
        )

    def _show(self, chosen: ChosenVolume, out: Path) -> None:
        data = self._data
        if self.layer in self._viewer.layers and self._shown == out and self.layer.ndim == chosen.layer.ndim:
            move_layer(self._viewer, self.layer, data, chosen.place())
            self.layer.visible = True
            return
        if self.layer is not None:
            self.layer.events.selected_label.disconnect(self._on_label_selected)
        name = out.name.partition(".")[0]
        self.layer = self._viewer.add_labels(data, name=name, multiscale=True, **chosen.place())
        self.layer.events.selected_label.connect(self._on_label_selected)
        self._shown = out

    def _on_object_chosen(self, label: int, box: Box) -> None:
        """Move to an object and mark it."""
        if self._running is None or self.layer not in self._viewer.layers:
            return
        chosen = self._running.chosen
        place = move_sliders(self._viewer.dims, chosen, *middle_of(box))
        camera_of(self._viewer).center = (0, *place[-2:])
        self.layer.selected_label = label
        self.mark.show(chosen, box)

    def _on_label_selected(self) -> None:
        self.table.select(int(self.layer.selected_label))

    def _on_labels_changed(self) -> None:
        if self._running is not None and self._running.is_of_applied:
            self._forget_table()
        self._on_layers_changed()

    def _on_volume_changed(self) -> None:
        chosen, running = self._session.volume, self._running
        if chosen is not None and running is not None and chosen.volume is not running.chosen.volume:
            if running.is_of_applied:
                self._forget_table()
            self.mark.hide()

    def _forget_table(self) -> None:
        """Hide the table of other labels; its file stays."""
        if not self.job.running and not self.table.isHidden():
            self.table.hide()
            self.mark.hide()
            applied = self._session.applied
            self.message.tell(_READY_TO_COUNT.format(applied.out.name) if applied is not None else _NO_LABELS)

    def _on_layers_changed(self) -> None:
        """List the labels: written ones first, then the layers."""
        applied, before = self._session.applied, self.labels.currentData()
        sources: list[tuple[str, Any]] = [] if applied is None else [(f"applied: {applied.out.name}", applied)]
        sources += [(layer.name, layer) for layer in self._viewer.layers if _is_of_user(layer)]
        self.labels.blockSignals(True)
        self.labels.clear()
        for name, source in sources:
            self.labels.addItem(name, source)
        kept = [k for k, (_, source) in enumerate(sources) if source is before and not isinstance(source, Applied)]
        is_new = applied is not self._listed and applied is not None  # labels that were just written are the ones meant
        self._listed = applied
        self.labels.setCurrentIndex(kept[0] if kept and not is_new else 0 if sources else -1)
        self.labels.blockSignals(False)
        self._on_state_changed()

    def _on_state_changed(self) -> None:
        source, method = self.labels.currentData(), self.method.currentText()
        if source is not None and method == "watershed" and source is not self._suited:
            self._suited = source
            with suppress(core.DistillFSSError):  # said when it is counted
                self._suit_radius(self._open(source)[0])
        reason = self._session.no_job or (_NO_LABELS if source is None else "")
        allow(self.count, reason or ("the radius is being measured" if self._measuring.busy else ""))
        allow(self.save_labels, reason)
        allow(self.save_table, "count objects first" if self.table.isHidden() else "")
        self.radius.setEnabled(method == "watershed" and not self._measuring.busy)
        self.of_class.setEnabled(method != NUMBERED)
        if source is not None:
            names = source.classes if isinstance(source, Applied) else _LABELS_OF_LAYER
            if [self.of_class.itemText(i) for i in range(self.of_class.count())] != list(names):
                self.of_class.clear()
                self.of_class.addItems(names)
            if self.message.text() == _NO_LABELS:
                name = source.out.name if isinstance(source, Applied) else source.name
                self.message.tell(_READY_TO_COUNT.format(name))
        elif self.message.text().startswith(_READY_TO_COUNT.partition("{")[0]):
            self.message.tell(_NO_LABELS)

    def ask_to_export_labels(self) -> None:
        """Ask where to write the chosen labels as TIFF, and write them."""
        if not attempt(self.message, self._source):
            return
        path = choose_output(self, "Write labels", self._beside("labels.tif"), (".tif", ".tiff"))
        if path is not None:
            self.export_labels(path)

    def _on_save_table(self) -> None:
        path = choose_output(self, "Write the table", self._beside("objects.csv"), (".csv",))
        if path is not None:
            self.export_table(path)

    def _beside(self, name: str) -> Path:
        volume = self._session.volume
        path = volume.volume.path if volume is not None else None
        return (path.parent if path is not None else Path.home()) / name

    def _on_exported(self, path: Path | None) -> None:
        self.message.tell(f"The labels are in {path}" if path is not None else "Stopped; nothing was written")

    def _forget_viewer(self) -> None:
        self._measuring.cancel()
        events = self._viewer.layers.events
        for event in (events.inserted, events.removed, events.renamed):
            event.disconnect(self._on_layers_changed)
        if self.layer is not None:
            self.layer.events.selected_label.disconnect(self._on_label_selected)
        self.mark.leave()


def _is_of_user(layer: Any) -> bool:
    """Whether objects of a layer may be counted: labels but those that the dock shows for other ends."""
    return type(layer).__name__ == "Labels" and not has_mark(layer, ANNOTATIONS, LABELS, PREVIEW)


def _free_output(out: Path) -> Path:
    """The path, or one beside it where neither objects nor a table are."""
    free = free_name(out)
    while _table_of(free).exists():
        free = free_name(free.with_name(f"{free.name.partition('.')[0]}-again.ome.zarr"))
    return free


def _table_of(out: Path) -> Path:
    return out.with_name(f"{out.name.partition('.')[0]}.csv")
