"""Segmentation of the volume, or a region of it, into OME-Zarr; count and measurement of its objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QCheckBox, QDoubleSpinBox, QFileDialog, QLineEdit, QWidget

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._annotations import FIRST_CLASS
from napari_distillfss._layers import ChosenVolume, camera_of, move_layer
from napari_distillfss._session import Applied, Counted, Session
from napari_distillfss._tasks import Written, iter_applying, iter_counting, open_levels
from napari_distillfss._threads import Job
from napari_distillfss._widgets._common import JobBar, Message, attempt, button, column, combo, row, spin
from napari_distillfss._widgets.region import RegionEdit
from napari_distillfss._widgets.support import colors_of
from napari_distillfss._widgets.table import ObjectTable

MODES = {"planewise": "planewise", "smoothed along z": "smoothed", "consensus of 3 directions": "consensus"}
_LOOK_AGAIN = 500  # milliseconds
_NO_LABELS = "Apply a model first"
_READY_TO_COUNT = "Ready to count the objects of {}"
_NO_MODEL = "Train or load a model first"
_READY = "Ready. You can stop and resume at any time"
_SPECK = 9  # pixels; fewer are no object but a stroke
_WIDEST_RADIUS = 15.0  # pixels that the watershed takes


class ApplyWidget(QWidget):
    """Writes labels with the student; their layer appears as soon as the first labels are written."""

    def __init__(self, session: Session, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session, self._viewer = session, viewer
        self._running: Applied | None = None
        self._written = False
        self._active: Any = None  # the layer that was chosen when Apply was pressed
        self._shown: Path | None = None  # whose labels the layer shows; None while it is empty
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
        self.job = Job(session, "segmenting", self)
        self.message = Message(_NO_MODEL)
        column(
            self,
            row(self.region, self.on_screen),
            row("Mode", self.mode),
            row("Save to", self.out, self.browse),
            self.replace,
            self.apply,
            JobBar(
                self.job,
                cancel="Stop; what is written is kept, and Apply goes on from there",
                instead_of=self.message,
            ),
            self.message,
        )
        self._soon = QTimer(self)  # looking again takes the window a moment: not after every piece
        self._soon.setSingleShot(True)
        self._soon.setInterval(_LOOK_AGAIN)
        self._soon.timeout.connect(self._on_soon)
        self.job.stepped.connect(self._on_job_stepped)
        self.job.done.connect(self._on_job_done)
        self.job.failed.connect(self._on_job_failed)
        self.job.ended.connect(self._on_job_ended)
        session.volume_changed.connect(self._on_volume_changed)
        session.volume_changed.connect(self._on_state_changed)
        session.model_changed.connect(self._on_state_changed)
        session.busy_changed.connect(self._on_state_changed)
        self._on_state_changed()

    def start(self) -> None:
        """Segment the volume, or continue a stopped run."""

        def start() -> None:
            chosen, model = self._session.volume, self._session.model
            if chosen is None:
                raise core.SettingsError("no volume is chosen; choose an image layer first")
            if model is None:
                raise core.SettingsError("there is no model yet; train or load one first")
            out = Path(self.out.text().strip() or ".").expanduser().absolute()
            if ".zarr" not in out.suffixes and out.parent.name != "labels":
                raise core.OutputError(f"{out}: labels are OME-Zarr; end the name in .ome.zarr")
            region, mode = self.region.value(), MODES[self.mode.currentText()]
            options = {"region": region, "mode": mode, "overwrite": self.replace.isChecked()}
            self.job.check_free()
            by = (self._session.model_path, tuple(model.class_names))
            self._running, self._written = Applied(chosen, out, mode, region, *by), False
            self._active = self._viewer.layers.selection.active
            self._prepare_layer(self._running)
            self.job.start(lambda stop: iter_applying(chosen.volume, model, out, stop, **options))
            self.message.tell("")

        attempt(self.message, start)

    def _on_job_stepped(self, step: Any) -> None:
        if isinstance(step, Written):
            self._written = True
            self._show(step.levels)
        elif getattr(step, "level", None) == 0 and not self._soon.isActive():
            self._soon.start()

    def _on_soon(self) -> None:
        if self.layer is not None:
            self.layer.refresh()

    def _on_job_ended(self) -> None:
        self._on_soon()
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

    def _on_job_failed(self, message: str) -> None:
        begun = re.fullmatch(r"(.*): was begun with another (.*); .*", message)
        if begun is not None:
            message = (
                f"{Path(begun[1]).name}: holds results of another {begun[2]}. Tick “{self.replace.text()}” or choose "
                "another name"
            )
        self.message.warn(message)

    def _show(self, levels: list[Any]) -> None:
        """Show labels (z, y, x): the finest level during the run, the pyramid after it."""
        if self._running is None:
            return
        applied, chosen = self._running, self._running.volume
        self._prepare_layer(applied)
        data = chosen.pyramid(levels)
        move_layer(self.layer, data, chosen.place())
        classes = self._session.annotations.classes if self._session.annotations else ()
        if len(classes) == len(applied.classes):
            self.layer.colormap = colors_of(classes, first=1)
        if self._shown is None:
            self.layer.name, self.layer.visible = applied.out.name.partition(".")[0], True
        self._shown = applied.out

    def _prepare_layer(self, applied: Applied) -> None:
        """Add an empty layer, unless there is one that is empty or shows the same labels.

        napari takes a moment to make a layer: better when *Apply* is pressed than while work goes on.
        """
        chosen = applied.volume
        ndim = chosen.layer.ndim
        if self.layer in self._viewer.layers and self._shown in (None, applied.out) and self.layer.ndim == ndim:
            return
        nothing = np.broadcast_to(np.uint8(0), (chosen.planes, *chosen.plane_shape))
        self._shown = None
        self.layer = self._viewer.add_labels(
            chosen.pyramid([nothing]),
            name="segmentation",
            multiscale=True,
            opacity=0.5,
            **chosen.place(),
        )

    def _on_volume_changed(self) -> None:
        chosen = self._session.volume
        if not self.job.running:
            self.message.tell(_READY if self._session.model is not None else _NO_MODEL)
        if chosen is not None:
            z, y, x = chosen.volume.shape[:3]
            self.region.setShape((z, y, x))
            path = chosen.volume.path
            folder = path.parent if path else Path.home()
            stem = (path.name if path else chosen.name.replace("/", "_")).partition(".")[0].strip()
            self.out.setText(str(folder / f"{stem}-labels.ome.zarr"))
            self._take_earlier(chosen, Path(self.out.text()))

    def _take_earlier(self, chosen: ChosenVolume, out: Path) -> None:
        """Take labels of this volume that an earlier session has written, so that objects can be counted."""
        annotations = self._session.annotations
        if not (out / "0").is_dir() or (self._session.applied is not None and self._session.applied.out == out):
            return
        with suppress(core.DistillFSSError, OSError, ValueError):
            levels = open_levels(out)
            if levels and tuple(levels[0].shape) == tuple(chosen.volume.shape[:3]):
                classes = annotations.class_names if annotations else ("object",)
                self._session.set_applied(Applied(chosen, out, "", None, None, classes, is_earlier=True))

    def _on_screen_clicked(self) -> None:
        chosen = self._session.volume
        if chosen is not None:
            self.region.setValue(((0, chosen.planes), *chosen.on_screen()))

    def _on_browse_clicked(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Write labels to", self.out.text(), "OME-Zarr (*.ome.zarr)")
        if path:
            self.out.setText(path if ".zarr" in Path(path).suffixes else f"{path}.ome.zarr")

    def _on_state_changed(self) -> None:
        has_both = self._session.model is not None and self._session.volume is not None
        self.apply.setEnabled(not self._session.busy and has_both)
        self.on_screen.setEnabled(self._session.volume is not None)
        if self._session.model is not None and self.message.text() == _NO_MODEL:
            self.message.tell(_READY)


def object_radius(planes: Sequence[np.ndarray], default: float = 8.0) -> float:
    """Median radius, in pixels, of the connected objects in painted planes "y x"; ``default`` without any."""
    from skimage.measure import label, regionprops

    areas = [p.area for plane in planes for p in regionprops(label(plane >= FIRST_CLASS)) if p.area >= _SPECK]
    return float(np.sqrt(np.median(areas) / np.pi)) if areas else default


class ObjectsWidget(QWidget):
    """Numbers the objects of the written labels and shows their measures."""

    def __init__(self, session: Session, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session, self._viewer = session, viewer
        self._running: tuple[ChosenVolume, Counted] | None = None
        self._suited: Applied | None = None  # labels that the radius was chosen for
        self._levels: list[Any] = []
        self._shown: Path | None = None  # whose objects the layer shows
        self.layer: Any = None
        self.method = combo(
            "connected: each connected piece is one object; watershed: touching objects are separated where they "
            "are narrow",
            ("connected", "watershed"),
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
        self.job = Job(session, "counting", self)
        self.table = ObjectTable()
        self.message = Message(_NO_LABELS)
        column(
            self,
            row(self.method, "Radius", self.radius),
            row("Class", self.of_class),
            row("Min. size (voxels)", self.smallest),
            self.count,
            JobBar(self.job, cancel="Stop; Count objects begins again", instead_of=self.message),
            self.message,
            self.table,
        )
        self.table.hide()
        self.radius.setEnabled(False)
        self.method.currentIndexChanged.connect(self.radius.setEnabled)
        self.table.chosen.connect(self._on_object_chosen)
        self.job.stepped.connect(self._on_job_stepped)
        self.job.done.connect(self._on_job_done)
        self.job.failed.connect(self.message.warn)
        session.labels_changed.connect(self._on_labels_changed)
        session.volume_changed.connect(self._on_volume_changed)
        session.busy_changed.connect(self._on_state_changed)
        self._on_state_changed()

    def start(self) -> None:
        """Number and measure the objects."""

        def start() -> None:
            applied = self._session.applied
            if applied is None:
                raise core.SettingsError("there are no labels yet; apply a model first")
            chosen = applied.volume
            out = applied.out.with_name(f"{applied.out.name.partition('.')[0]}-objects.ome.zarr")
            options: dict[str, Any] = {
                "class_id": self.of_class.currentIndex() + 1,
                "min_voxels": self.smallest.value(),
            }
            if self.method.currentIndex() == 1:
                options |= {"method": "watershed", "radius": self.radius.value()}
            image = {"image": chosen.volume} if chosen.volume.ndim == 3 else {}
            table = out.with_name(f"{out.name.partition('.')[0]}.csv")
            self.job.start(
                lambda stop: iter_counting(
                    applied.out, out, stop, table=table, overwrite=out.exists(), **image, **options
                )
            )
            self._running = (chosen, Counted(out, table, options))
            self.message.tell("")

        attempt(self.message, start)

    def _suit_radius(self, chosen: ChosenVolume) -> None:
        """Set the radius to that of the annotated objects, within what the watershed takes."""
        annotations = self._session.annotations
        planes = [annotations.plane(z) for z in annotations.planes()] if annotations else []
        steps = [s for s in chosen.volume.scale if s] or [1.0]
        self.radius.setSuffix(" µm" if chosen.pixel_size else " pixels" if not chosen.volume.scale[2] else "")
        radius = object_radius(planes) * (chosen.volume.scale[2] or 1.0)
        self.radius.setValue(min(radius, _WIDEST_RADIUS * min(steps)))

    def _on_job_stepped(self, step: Any) -> None:
        if isinstance(step, Written):
            self._levels = step.levels

    def _on_job_done(self, report: Any) -> None:
        if report is None or self._running is None:
            self.message.tell("Stopped; Count objects begins again")
            return
        chosen, counted = self._running
        self._session.counted = counted
        self._show(chosen, counted.out)
        self.table.read(counted.table)
        self.table.show()
        small = f", {report.too_small} smaller ones left out" if report.too_small else ""
        self.message.tell(
            f"{fmt.count(report.objects, 'object')}{small}; measures in {counted.table.name}, beside the labels"
        )

    def _show(self, chosen: ChosenVolume, out: Path) -> None:
        data = chosen.pyramid(self._levels)
        if self.layer in self._viewer.layers and self._shown == out and self.layer.ndim == chosen.layer.ndim:
            move_layer(self.layer, data, chosen.place())
            self.layer.visible = True
            return
        if self.layer is not None:
            self.layer.events.selected_label.disconnect(self._on_label_selected)
        name = out.name.partition(".")[0]
        self.layer = self._viewer.add_labels(data, name=name, multiscale=True, **chosen.place())
        self.layer.events.selected_label.connect(self._on_label_selected)
        self._shown = out

    def _on_object_chosen(self, label: int, box: tuple[float, float, float]) -> None:
        """Move to an object: ``box`` is its middle (z, y, x) in voxels."""
        if self._running is None or self.layer not in self._viewer.layers:
            return
        chosen = self._running[0]
        place = chosen.point_of(*box)
        dims = self._viewer.dims
        for axis, value in enumerate(place[:-2], dims.ndim - len(place)):
            dims.set_point(axis, value)
        camera_of(self._viewer).center = (0, *place[-2:])
        self.layer.selected_label = label

    def _on_label_selected(self) -> None:
        self.table.select(int(self.layer.selected_label))

    def _on_labels_changed(self) -> None:
        self._forget_table()
        self._on_state_changed()

    def _on_volume_changed(self) -> None:
        chosen = self._session.volume
        if chosen is not None and self._running is not None and chosen.volume is not self._running[0].volume:
            self._forget_table()

    def _forget_table(self) -> None:
        """Hide the table of other labels; its file stays."""
        if not self.job.running and not self.table.isHidden():
            self.table.hide()
            applied = self._session.applied
            self.message.tell(_READY_TO_COUNT.format(applied.out.name) if applied is not None else _NO_LABELS)

    def _on_state_changed(self) -> None:
        applied = self._session.applied
        if applied is not None and applied is not self._suited:
            self._suited = applied
            self._suit_radius(applied.volume)
        self.count.setEnabled(applied is not None and not self._session.busy)
        if applied is not None:
            if [self.of_class.itemText(i) for i in range(self.of_class.count())] != list(applied.classes):
                self.of_class.clear()
                self.of_class.addItems(applied.classes)
            if self.message.text() == _NO_LABELS:
                self.message.tell(_READY_TO_COUNT.format(applied.out.name))
