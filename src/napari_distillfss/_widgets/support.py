"""The annotated slices: suggestion, painting, list and import."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from napari.utils.notifications import show_warning
from qtpy.QtWidgets import QFileDialog, QInputDialog, QListWidgetItem, QMessageBox, QWidget
from superqt.utils import qdebounced

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._annotations import (
    BACKGROUND,
    BACKGROUND_COLOR,
    FIRST_CLASS,
    KINDS,
    UNLABELED,
    Annotations,
    Class,
    is_set_aside,
    unwritten,
)
from napari_distillfss._layers import (
    ANNOTATIONS,
    PREVIEW,
    ChosenVolume,
    choose_labels,
    has_mark,
    hide_covers,
    is_at,
    lift,
    move_layer,
    move_sliders,
)
from napari_distillfss._painted import PaintedArray
from napari_distillfss._session import Session
from napari_distillfss._shapes import outlines_of
from napari_distillfss._tasks import (
    Work,
    iter_different,
    iter_disputed,
    iter_drawing,
    iter_import,
    iter_least_sure,
)
from napari_distillfss._threads import Job
from napari_distillfss._widgets._common import (
    JobBar,
    Message,
    ReplaceOffer,
    allow,
    attempt,
    button,
    column,
    combo,
    row,
    spin,
    until_closed,
)
from napari_distillfss._widgets.classes import ClassList
from napari_distillfss._widgets.outline import OutlineTool
from napari_distillfss._widgets.slices import SliceList, SliceRow
from napari_distillfss._widgets.sources import ask_for_sources

DIFFERENT, EVENLY, LEAST_SURE, DISPUTED = ("different", "evenly", "least sure", "disputed")

KIND_NAMES = dict(zip(("binary mask", "class numbers", "scribbles"), KINDS, strict=True))

_HISTORIES = ("_undo_history", "_redo_history")  # of a Labels layer; napari 0.10 may hide them from plugins
_LEFT = "left"  # by a dock that is closed
_MOST_LOOKED_AT = 24  # planes, where the student is least sure
_WAIT = 300  # milliseconds without a stroke before its plane is counted
_RESTORE = "Take up annotations that Start over has set aside, or that were painted in a second window"
_SUGGESTION, _IMPORT = "Slice suggestion", "Label import"


@dataclass(frozen=True, eq=False)
class _Question:
    """Selection of the planes of a volume that differ most from one another and from the painted ones."""

    chosen: ChosenVolume
    count: int
    painted: set[int]
    stamps: list[Any]  # of the painted planes


class SupportWidget(QWidget):
    """Suggests planes, keeps the annotation layer, and lists the painted planes."""

    def __init__(self, session: Session, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session, self._viewer = session, viewer
        self.layer: Any = None  # shows the annotations of the volume; None while it needs none
        self._kept: Any = None  # the layer once it was made: it is moved and hidden, never removed
        self.suggested: list[int] = []
        self._image: Any = None  # the layer of the volume whose annotations are shown
        self._colored: tuple[Class, ...] = ()  # classes that the colors of the layer are of
        self._is_unsaved = False  # whether the latest strokes could not be written
        self.count = spin(1, 100, 5, "How many slices to suggest")
        self.way = combo(
            "different: planes that represent all others best in brightness, texture and position; evenly: both "
            "ends, then midpoints; least sure: planes with the largest uncertainty of the model; disputed: planes on "
            "which two quick models of what is annotated so far disagree most",
            (DIFFERENT, EVENLY, LEAST_SURE, DISPUTED),
        )
        self.suggest = button("Suggest slices", "Suggest slices to paint", self.suggest_slices)
        self.classes = ClassList()
        self.paint = button("Paint", "Show the annotation layer and take the brush", self.take_brush)
        self.rest = button(
            "Fill rest as background", "Label all unlabeled pixels of this slice as background (Ctrl+Z undoes it)",
            self.fill_rest,
        )  # fmt: skip
        self.list = SliceList()
        self.total = Message(lines=2)  # of the ticked slices
        self.total.hide()
        self.way.setAccessibleName("Way of choosing slices")
        self.count.setAccessibleName("Number of slices")
        self.remove = button(
            "Remove slice", "Remove all labels of the chosen slice (Ctrl+Z undoes it)", self._on_remove_clicked
        )
        self.kind = combo(
            "What numbers of a label file mean. binary mask: 0 background, others the first class; class numbers: 0 "
            "background, 1.. classes; scribbles: 0 not labeled, 1 background, 2.. classes",
            tuple(KIND_NAMES),
        )
        self.import_file = button("Import…", "Import labels of a file", self._on_import_clicked)
        self.import_layer = button(
            "From layer…",
            "Import a layer of labels, or of shapes: shapes get the class of the brush, or that of their feature "
            "“class”; for scribbles the rest of their planes stays, else it is background",
            self._on_import_layer_clicked,
        )
        self.also = button(
            "Other volumes…", "Also train on slices of other volumes, that you annotated before", self._on_also_clicked
        )
        self.anew = button(
            "Start over…", "Set these annotations aside (they stay on disk) and start with none", self._on_anew_clicked
        )
        self.restore = button("Restore…", _RESTORE, self._on_restore_clicked)
        self.message = Message("Choose a volume first")
        self.job = Job(session, _SUGGESTION, self)
        self.outline = OutlineTool(session, viewer, self._layer_to_paint, self.classes, self.message, self)
        self.selecting = Job(name=_SUGGESTION, parent=self)
        self._question: _Question | None = None
        self._then: tuple[Annotations | None, Callable[[Any], None]] = (None, self._show_suggested)
        self._answered_question: _Question | None = None
        self._soon = until_closed(session, qdebounced(self._on_painted, timeout=_WAIT))
        self.offer = ReplaceOffer(session, self.job, self.selecting, self.outline.job)
        told = row(self.message, self.offer, first=3)
        importing = QWidget()
        column(importing, row(self.import_file, self.import_layer, self.also), row("Import as", self.kind), margin=0)
        column(
            self,
            row(self.suggest, self.count, self.way),
            self.classes,
            row(self.paint, self.outline.on, self.rest),
            self.list,
            self.total,
            row(self.remove, self.anew, self.restore),
            JobBar(
                self.selecting,
                cancel="Stop looking; take them evenly",
                starting="Looking for slices that differ",
                instead_of=importing,
                is_low=True,
            ),
            importing,
            JobBar(
                self.job,
                cancel="Stop looking",
                instead_of=told,
                is_patient=lambda: self.job.name == _IMPORT,  # which changes annotations
            ),
            told,
        )
        self._connect(session, viewer)

    def _connect(self, session: Session, viewer: Any) -> None:
        self.job.done.connect(self._on_job_done)
        self.job.failed.connect(self.message.warn)
        self.selecting.done.connect(self._on_selected)
        self.selecting.failed.connect(self.message.warn)
        self.selecting.ended.connect(self._on_selection_ended)
        self.classes.valueChanged.connect(self._on_classes_edited)
        self.classes.brushChanged.connect(self._on_brush_changed)
        self.classes.refused.connect(self.message.warn)
        self.list.itemClicked.connect(self._on_item_clicked)
        self.list.toggled.connect(self._on_slice_toggled)
        self.list.currentRowChanged.connect(self._on_state_changed)
        session.volume_changed.connect(self._on_volume_changed)
        session.classes_changed.connect(self._on_classes_changed)
        session.slices_changed.connect(self._on_slices_changed)
        session.slices_changed.connect(self._on_restorable_changed)
        session.closed.connect(self._forget_viewer)
        viewer.layers.events.removed.connect(self._on_layer_removed)
        viewer.layers.events.removed.connect(self._on_layers_changed)
        viewer.layers.events.inserted.connect(self._on_layers_changed)
        viewer.mouse_drag_callbacks.append(self._on_canvas_pressed)
        self._take_up_left_layer()

    # what the user does

    def suggest_slices(self) -> None:
        """Suggest planes and move to the first. Even ones are shown until the chosen ones are known."""
        chosen = self._session.volume
        if not self._show_layer() or chosen is None:
            return
        count = min(self.count.value(), chosen.planes)
        self.selecting.cancel()
        annotations = self._session.annotations
        painted = set(annotations.planes()) if annotations else set()
        if self.way.currentText() in (EVENLY, DIFFERENT):
            self._show_suggested(core.suggest_planes(chosen.planes, count))
            self._question = None
            if self.way.currentText() == DIFFERENT and chosen.planes > count:
                stamps = [annotations.stamp(z) for z in sorted(painted)] if annotations else []
                self._question = _Question(chosen, count, painted, stamps)
                self._select_slices()
            return
        if self.way.currentText() == DISPUTED:
            attempt(self.message, lambda: self._suggest_disputed(chosen, count, painted))
            return
        model = self._session.model
        if model is None:
            self.message.warn("there is no model yet; train one first, or choose disputed, which needs none")
            return
        looked_at = core.suggest_planes(chosen.planes, min(_MOST_LOOKED_AT, chosen.planes))
        planes = [z for z in looked_at if z not in painted]
        self._suggest_by(lambda stop: iter_least_sure(chosen.volume, model, planes, count, stop))

    def _suggest_disputed(self, chosen: Any, count: int, painted: set[int]) -> None:
        make_support = self._session.support_maker()
        self._suggest_by(lambda stop: iter_disputed(chosen.volume, make_support, count, painted, stop))

    def _suggest_by(self, work: Work) -> None:
        """Suggest what the work chooses; the view stays if the user goes on meanwhile."""
        before = self._work()
        self._start(_SUGGESTION, work, lambda planes: self._show_suggested(planes, stay=self._work() != before))

    def _work(self) -> tuple[int, list[Any]]:
        """The plane on screen and the state of what is painted, which differ once the user goes on."""
        annotations = self._session.annotations
        stamps = [(z, annotations.stamp(z)) for z in annotations.planes()] if annotations else []
        return self.plane(), stamps

    def fill_rest(self) -> None:
        """Label all unlabeled pixels of the current plane as background."""
        self.put_into_plane(None)

    def put_into_plane(self, labels: np.ndarray | None) -> None:
        """Put labels (as painted, "y x"; by default background) where the current plane has none; this can be
        undone.
        """
        annotations = self._session.annotations
        if not self._show_layer() or annotations is None:
            return
        z = self.plane()
        before = annotations.plane(z)
        after = np.where(before == UNLABELED, BACKGROUND if labels is None else labels, before).astype(np.uint8)
        annotations.put(z, after)
        self._show_replaced([(z, before, after)])

    def _show_replaced(self, planes: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """Show replaced labels of whole planes and make the change undoable."""
        annotations = self._session.annotations
        if self._show_layer() and annotations is not None:
            with self.layer.block_history():  # one step of the history
                for z, before, after in planes:  # as `data_setitem` does; by pixels zarr takes a second for a million
                    self.layer._save_history((annotations.index(z), before, after))
            self.layer.refresh()
        self._save()
        self._session.painted()

    def correct(self, labels: np.ndarray) -> None:
        """Put labels into the current plane as `put_into_plane` does, and take the brush to correct them."""
        self.put_into_plane(labels)
        if not self.outline.on.isChecked():
            self.take_brush()

    def go_to(self, z: int) -> None:
        """Move to a plane."""
        chosen = self._session.volume
        if chosen is not None:
            move_sliders(self._viewer.dims, chosen, z)

    def go_to_next(self) -> None:
        """Move to the next suggested plane that has no label."""
        painted = set(self._session.annotations.planes()) if self._session.annotations else set()
        left = sorted(z for z in self.suggested if z not in painted)
        if left:
            self.go_to(next((z for z in left if z > self.plane()), left[0]))
        else:
            self.message.tell("No suggested slice is left; suggest slices first")

    def go_to_annotated(self, direction: int) -> None:
        """Move to the nearest painted plane after (1) or before (-1) this one, and round from the end to the start."""
        planes = self._session.annotations.planes() if self._session.annotations else []
        if not planes:
            self.message.tell("No slice is annotated yet; suggest slices, and paint in them")
            return
        order = sorted(planes, key=lambda z: direction * z)
        self.go_to(next((z for z in order if direction * (z - self.plane()) > 0), order[0]))

    def add_plane(self) -> None:
        """Put the plane on screen among the slices to annotate, and take the brush."""
        z = self.plane()
        if not self._show_layer() or self._session.annotations is None:
            return
        if z not in self.suggested and z not in self._session.annotations.planes():
            self.suggested = sorted([*self.suggested, z])
            self._on_slices_changed()
        self.take_brush()
        self.message.tell(f"Paint in plane {z}: some background and every class, in scribbles or whole")

    def plane(self) -> int:
        """The plane on screen."""
        chosen = self._session.volume
        return chosen.plane_on(self._viewer.dims) if chosen else 0

    def import_labels(self, path: Path, kind: str = "masks") -> None:
        """Import the labels of a file."""
        chosen, annotations = self._session.volume, self._session.annotations
        if chosen is None or annotations is None:
            self.message.warn(self._session.no_annotations)
            return
        z, shape = self.plane(), tuple(chosen.volume.shape[:3])
        work: Work = lambda stop: iter_import(annotations, path, shape, z, kind, stop)  # noqa: E731
        self._start(_IMPORT, work, self._show_imported)

    def import_from(self, layer: Any, kind: str = "masks") -> None:
        """Import the labels or shapes of a layer."""
        chosen, annotations = self._session.volume, self._session.annotations
        if chosen is None or annotations is None:
            self.message.warn(self._session.no_annotations)
            return
        z, shape, point = self.plane(), tuple(chosen.volume.shape[:3]), self._viewer.dims.point

        def start() -> None:
            if type(layer).__name__ == "Labels":
                labels = choose_labels(layer, point).volume
                if not _lie_on_each_other(layer, chosen.layer):
                    show_warning(
                        f"DistillFSS: layer {layer.name!r} does not lie on {chosen.name!r}; its rows and columns are "
                        "taken over as they are"
                    )
                work: Work = lambda stop: iter_import(annotations, labels, shape, z, kind, stop)  # noqa: E731
            else:
                label = self.classes.brush()
                if label == UNLABELED:
                    raise core.SettingsError("the eraser is chosen; choose the class of the shapes")
                outlines = outlines_of(layer, chosen, point, annotations.class_names, label)
                work = lambda stop: iter_drawing(annotations, outlines, kind, stop)  # noqa: E731
            self._start(_IMPORT, work, self._show_imported)

        attempt(self.message, start)

    # what happens

    def _on_volume_changed(self) -> None:
        self.selecting.cancel()
        self._question = None
        self.list.cancel()
        self.suggested = []
        annotations, chosen = self._session.annotations, self._session.volume
        image = None if chosen is None or annotations is None else chosen.layer
        stays = self.layer is not None and image is not None and image is self._image
        if stays:  # another time or channel: the brush stays in the hand
            self._show_annotations()
        else:
            self._put_layer_away()
        self._is_unsaved = False
        for folder in unwritten():
            show_warning(
                f"DistillFSS: what was painted in {folder.name} is in memory only; make room, and choose that volume "
                "again before napari is closed"
            )
        if annotations is None:
            if chosen is None:
                self.message.tell("choose a volume first")
            else:
                self.message.warn(self._session.no_annotations)
            return
        count = len(annotations.planes())
        if count:
            self._show_layer()
        first = self._session.first_window
        if first is not None:
            self.message.warn(
                f"this image is open in another window (process {first.pid}, since {fmt.moment(first.since)}). What "
                f"you paint here is kept apart, and Restore… offers it later: {annotations.folder}"
            )
        elif self._session.has_slices_of_second_window:
            here = f"{fmt.count(count, 'slice')} painted earlier" if count else "No slice"
            verb = "are" if count > 1 else "is"
            self.message.tell(f"{here} {verb} here. Others were painted in a second window: Restore… has them")
        elif count:
            is_back = "is back" if count == 1 else "are back"
            self.message.tell(f"{fmt.count(count, 'slice')} of this volume, painted earlier, {is_back}")
        else:
            self.message.tell(
                "Suggest slices, then paint some background and objects in each. Strokes are saved at once"
            )

    def _on_classes_changed(self) -> None:
        annotations = self._session.annotations
        if annotations is not None:
            self.classes.setValue(annotations.classes)
        self._color_layer()
        self._on_slices_changed()  # its rows name the classes

    def _on_classes_edited(self, classes: tuple[Class, ...]) -> None:
        self._session.set_classes(classes)
        self._save()

    def _on_brush_changed(self, label: int) -> None:
        if self.layer is not None and label >= 0:
            self.layer.selected_label = label
        self.outline.brush_changed()

    def _on_layer_label_changed(self) -> None:
        self.classes.setBrush(min(int(self._kept.selected_label), len(self.classes.value()) + BACKGROUND))

    def _on_canvas_pressed(self, viewer: Any, event: Any) -> None:
        """Take the brush away where the volume has no pixels: napari would paint in its last plane, or fail."""
        layer = self.layer
        is_shown = layer is None or is_at(layer, event.position, event.dims_displayed)
        if not is_shown and viewer.layers.selection.active is layer and layer.mode not in ("pan_zoom", "transform"):
            layer.mode = "pan_zoom"
            self.message.warn("this volume is not on screen; move the sliders to one of its planes, then press Paint")

    def _save(self) -> None:
        """Write what is painted. Where that fails it is said, and that it is kept once it was possible again."""
        annotations, was_unsaved = self._session.annotations, self._is_unsaved
        if annotations is not None:
            self._is_unsaved = not attempt(self.message, annotations.save)
            if was_unsaved and not self._is_unsaved:
                self.message.tell("what you painted is on disk again")

    def _on_stroke(self) -> None:
        self._save()
        self._session.stroked.emit()
        self._soon()

    def _on_painted(self) -> None:
        self._session.painted()

    def _on_slices_changed(self) -> None:
        chosen, annotations = self._session.volume, self._session.annotations
        rows: list[SliceRow] = []
        painted: set[int] = set()
        if annotations is not None and chosen is not None:
            volume, names = chosen.volume, annotations.class_names
            colors = dict(enumerate((c.color for c in annotations.classes), FIRST_CLASS))
            for s in annotations.slices():
                painted.add(s.plane)
                rows.append(
                    SliceRow(
                        fmt.painted(s, names),
                        plane=s.plane,
                        labels=annotations,
                        painted=s,
                        colors=colors,
                        open=lambda: volume,
                        is_used=s.enabled,
                    )
                )
            left = [z for z in self.suggested if z not in painted]
            rows += [SliceRow(f"plane {z}: suggested, not painted yet", plane=z) for z in left]
            rows += self._rows_of_others(annotations)
        if self.suggested and painted >= set(self.suggested) and self.message.text().startswith("Paint in"):
            self.message.tell("Every suggested slice has labels. Press Train, or label more of them")
        self.list.setRows(rows)
        self._show_total()
        self._on_state_changed()

    def _show_total(self) -> None:
        """Sum up what is labeled in the ticked slices, of other volumes too."""
        slices = self.list.ticked()
        self.total.setVisible(bool(slices))
        self.total.tell(fmt.total(slices) if slices else "")

    def _rows_of_others(self, annotations: Annotations) -> list[SliceRow]:
        """Slices of other volumes that are used, or why they cannot be."""
        used, missing = self._session.used()
        layers = tuple(self._session.layers())
        lost = [f"{key}: no longer in the folder of annotations" for key in missing]
        rows = [SliceRow(text, tooltip=text, is_problem=True) for text in lost]
        color_of = {c.name: c.color for c in annotations.classes}
        for other in used:
            problem = other.problem(annotations.class_names, layers)
            if problem:
                text = f"{other.name}: {fmt.count(len(other.planes), 'slice')} cannot be used\nit {problem}"
                rows.append(SliceRow(text, tooltip=text, is_problem=True))
                continue
            colors = {n: color_of[name] for n, name in enumerate(other.class_names, FIRST_CLASS)}
            rows += [
                SliceRow(
                    fmt.painted(s, other.class_names, other.name),
                    tooltip="Of another volume; choose that volume to paint in it",
                    labels=other.labels,
                    painted=s,
                    colors=colors,
                    open=partial(other.open, layers),
                    is_used=s.plane not in other.left_out,
                )
                for s in other.labels.slices()
                if s.enabled
            ]
        return rows

    def _on_item_clicked(self, item: QListWidgetItem) -> None:
        row = self.list.row_of(item)
        if row is None or row.plane is None:
            self.message.tell(f"{item.text().splitlines()[0]}. It is of another volume: choose that one to paint in it")
        else:
            self.go_to(row.plane)

    def _on_also_clicked(self) -> None:
        annotations = self._session.annotations
        if annotations is None:
            self.message.warn(self._session.no_annotations)
            return
        layers = self._session.layers()
        others = self._session.others()
        if not others and not annotations.also:
            self.message.tell("No other volume is annotated yet; choose another layer or time point, and paint in it")
            return
        is_empty = not annotations.array.is_on_disk  # it takes over the classes
        names = [other.class_names if is_empty else annotations.class_names for other in others]
        problems = [other.problem(n, layers) for other, n in zip(others, names, strict=True)]
        keys = ask_for_sources(self, list(zip(others, problems, strict=True)), annotations.also)
        if keys is not None:
            self._session.use_also(keys)
            self.message.tell(f"slices of {fmt.count(len(keys), 'other volume')} are used too" if keys else "")

    def _on_state_changed(self) -> None:
        has_volume, annotations = self._session.volume is not None, self._session.annotations
        parts = (self.suggest, self.paint, self.outline.on, self.rest, self.import_file, self.import_layer, self.also)
        for part in parts:
            allow(part, "" if has_volume else self._session.no_annotations)
        allow(self.anew, "" if annotations is not None and annotations.planes() else "nothing is annotated yet")
        row = self.list.row_of(self.list.currentItem())
        allow(self.remove, "" if row is not None and row.plane is not None else "click a slice in the list first")

    def _on_restorable_changed(self) -> None:
        allow(self.restore, "" if self._session.restorable() else "there are none of this volume")

    def _on_slice_toggled(self, row: SliceRow, on: bool) -> None:
        annotations = self._session.annotations
        if annotations is None or row.labels is None or row.painted is None:
            return
        number = row.painted.plane
        if row.labels is annotations:
            annotations.enable(number, on)
        else:
            self._session.leave_out(row.labels.folder.name, number, not on)
        self._show_total()
        self._save()
        self._session.stroked.emit()

    def take_brush(self) -> None:
        """Show the annotation layer and take the brush."""
        if self._show_layer():
            self._viewer.layers.selection.active = self.layer
            self.layer.mode = "paint"
            hidden = hide_covers(self._viewer.layers, self.layer, self._image)
            if hidden:
                self.message.tell(f"{hidden[-1].name!r} covered this volume, and is hidden")

    def _on_remove_clicked(self) -> None:
        row = self.list.row_of(self.list.currentItem())
        if row is None or row.plane is None or self._session.annotations is None:
            self.message.warn("no slice of this volume is chosen; click one in the list")
            return
        z = row.plane
        self.suggested = [s for s in self.suggested if s != z]
        before = self._session.annotations.plane(z)
        self._session.annotations.remove(z)
        self._show_replaced([(z, before, np.zeros_like(before))] if before.any() else [])

    def _on_anew_clicked(self) -> None:
        annotations = self._session.annotations
        count = len(annotations.planes()) if annotations else 0
        if annotations is None or not count:
            self.message.tell("there are no annotations yet")
            return
        question = (
            f"Start with no annotations? Those of {fmt.count(count, 'slice')} and the models stay on disk beside\n"
            f"{annotations.folder}\nRestore… takes them up again."
        )
        yes = QMessageBox.StandardButton.Yes
        if QMessageBox.question(self, "Start over", question) == yes:
            attempt(self.message, self._begin_anew)

    def _begin_anew(self) -> None:
        aside = self._session.begin_anew()
        self.message.tell(f"Restore… takes the annotations of before up again; they are in {aside}")

    def _on_restore_clicked(self) -> None:
        names = {self._describe_aside(path): path for path in self._session.restorable()}
        if not names:
            self.message.tell("there are no other annotations of this volume")
            return
        name, is_chosen = QInputDialog.getItem(
            self, "Restore", "Other annotations of this volume", list(names), 0, False
        )
        if is_chosen:
            attempt(self.message, lambda: self._restore(names[name]))

    def _restore(self, aside: Path) -> None:
        before = self._session.restore(aside)
        if before is not None:
            self.message.tell(f"{self.message.text()}. Those of before are in {before}")

    @staticmethod
    def _describe_aside(path: Path) -> str:
        changed = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
        how = "set aside" if is_set_aside(path) else "painted in a second window"
        return f"{changed:%Y-%m-%d %H:%M}, {how}, {path.name}"

    def _on_import_clicked(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Import labels")
        if path:
            self.import_labels(Path(path), KIND_NAMES[self.kind.currentText()])

    def _on_import_layer_clicked(self) -> None:
        layers = {
            layer.name: layer
            for layer in self._viewer.layers
            if type(layer).__name__ in ("Labels", "Shapes") and not has_mark(layer, ANNOTATIONS, PREVIEW)
        }
        if not layers:
            self.message.warn("there is no layer of labels or shapes; open or draw one")
            return
        name, is_chosen = QInputDialog.getItem(self, "Import", "Labels or shapes", list(layers), 0, False)
        if is_chosen:
            self.import_from(layers[name], KIND_NAMES[self.kind.currentText()])

    def _on_job_done(self, result: Any) -> None:
        annotations, show = self._then
        if result and annotations is self._session.annotations:  # the answer to a question about another volume is not
            show(result)

    def _on_selected(self, planes: list[int] | None) -> None:
        """Replace the even planes by the chosen ones, unless the user has moved on."""
        annotations, question = self._session.annotations, self._question
        if not planes or annotations is None or question is None or question is not self._answered_question:
            return
        if set(annotations.planes()) == question.painted:
            is_painting = question.stamps != [annotations.stamp(z) for z in sorted(question.painted)]
            self._show_suggested(planes, stay=is_painting or self.plane() != self.suggested[0])

    def _on_selection_ended(self) -> None:
        if self._question is not self._answered_question:
            self._select_slices()

    def _on_layer_removed(self) -> None:
        if self._kept is None or self._kept in self._viewer.layers:
            return
        self._let_go(self._kept)
        layer, self.layer, self._kept = self.layer, None, None
        if layer is not None:
            self.message.tell("the annotation layer was removed; what is painted is kept, Paint brings it back")

    def _on_layers_changed(self) -> None:
        """The volume of other slices may be open or closed now."""
        if self._session.annotations is not None and self._session.annotations.also:
            self.list.try_again()
            self._on_slices_changed()

    # parts

    def _select_slices(self) -> None:
        """Start the latest selection of planes; a running one ends first."""
        if self._question is not None and not self.selecting.running:
            question = self._answered_question = self._question
            self.selecting.start(
                lambda stop: iter_different(question.chosen.volume, question.count, question.painted, stop)
            )

    def _start(self, name: str, work: Work, show: Callable[[Any], None]) -> None:
        """Start work on these annotations; ``show`` gets its result."""

        def start() -> None:
            self.job.start(work, name)
            self._then = (self._session.annotations, show)

        attempt(self.message, start)

    def _show_imported(self, planes: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        replaced = [p for p in planes if p[1].any()]
        is_undoable = all(after.any() for _, _, after in planes)
        self._show_replaced(planes if is_undoable else replaced)
        self.go_to(planes[0][0])
        undo = [f"brings back what {len(replaced)} of them had"] if replaced else []
        if is_undoable and len(replaced) < len(planes):
            undo.append("clears the others" if replaced else "clears them again")
        again = f"; Ctrl+Z {', and '.join(undo)}" if undo else ""
        self.message.tell(f"labels of {fmt.count(len(planes), 'plane')} were taken over{again}")

    def _show_suggested(self, planes: list[int], *, stay: bool = False) -> None:
        self.suggested = planes
        self._show_layer()
        numbers = f"plane{'s' if len(planes) > 1 else ''} {', '.join(map(str, planes))}"
        self.message.tell(
            f"Paint in {numbers}: some background and every class, in scribbles or whole. Click a slice in the "
            "list to go there"
        )
        self._on_slices_changed()
        if not stay:
            self.go_to(planes[0])

    def _show_layer(self) -> bool:
        """Make the annotation layer if it is missing. Returns whether there is one; the reason is shown if not."""
        chosen, annotations = self._session.volume, self._session.annotations
        if chosen is None or annotations is None:
            self.message.warn(self._session.no_annotations)
            return False
        if self.layer is None:
            name = f"{chosen.name} annotations"
            if self._kept is None:
                self._add_layer(name, annotations.array, chosen.place())
            self.layer = self._kept
            self._show_annotations()
            self.layer.name, self.layer.visible = name, True
            self._color_layer()
            self.layer.selected_label = self.classes.brush()
            self.layer.brush_size = max(2, min(chosen.plane_shape) // 60)
        return True

    def history(self) -> tuple[Any, list[Any], list[Any]] | None:
        """What napari can undo and redo in the annotations, and their state; None while their layer is not shown."""
        if self.layer is None or self._session.annotations is None:
            return None
        undo, redo = (list(getattr(self.layer, name, ())) for name in _HISTORIES)
        return self._work()[1], undo, redo

    def setHistory(self, history: tuple[Any, list[Any], list[Any]] | None) -> None:
        """Make the strokes of a closed dock undoable, if nothing was painted since."""
        if history is not None and self.layer is not None and history[0] == self._work()[1]:
            for name, items in zip(_HISTORIES, history[1:], strict=True):
                getattr(self.layer, name, []).extend(items)

    def _show_annotations(self) -> None:
        """Show the present annotations in the layer."""
        chosen, annotations = self._session.volume, self._session.annotations
        if chosen is None or annotations is None:
            return
        if self.layer.data is not annotations.array:
            move_layer(self._viewer, self.layer, annotations.array, chosen.place())
            lift(self._viewer.layers, self.layer, chosen.layer)
            self.layer._reset_history()  # strokes of another volume cannot be undone in this one
        annotations.array.is_written_later = True  # after each event of the layer
        self._image = chosen.layer

    def _color_layer(self) -> None:
        if self.layer is not None and self._colored != self.classes.value():
            self._colored = self.classes.value()
            self.layer.colormap = colors_of(self._colored)

    def _layer_to_paint(self) -> Any:
        return self.layer if self._show_layer() else None

    def _add_layer(self, name: str, array: Any, place: dict[str, Any]) -> None:
        self._colored = self.classes.value()
        layer = self._viewer.add_labels(
            array,
            name=name,
            colormap=colors_of(self._colored),
            metadata={ANNOTATIONS: True},
            opacity=0.5,  # so that the image is seen where all of a slice is labeled
            **place,
        )
        self._keep(layer)

    def _keep(self, layer: Any) -> None:
        self._kept = layer
        layer.metadata[ANNOTATIONS] = True
        for event in (layer.events.paint, layer.events.labels_update, layer.events.set_data):
            event.connect(self._on_stroke)
        layer.events.selected_label.connect(self._on_layer_label_changed)

    def _take_up_left_layer(self) -> None:
        """Take up the layer that a closed dock has left: two layers would overwrite each other's strokes."""
        for layer in self._viewer.layers:
            is_left = layer.metadata.get(ANNOTATIONS) == _LEFT
            if is_left and (isinstance(layer.data, PaintedArray) or layer.data.size == 1):
                self._keep(layer)
                return

    def _put_layer_away(self) -> None:
        """Hide the layer and detach it from the annotations of the earlier volume."""
        layer, chosen, self.layer = self._kept, self._session.volume, None
        if layer is not None:
            layer.visible = False
            ndim = chosen.layer.ndim if chosen else layer.ndim
            move_layer(self._viewer, layer, np.zeros((1,) * ndim, np.uint8), chosen.place() if chosen else {})
            layer._reset_history()

    def _let_go(self, layer: Any) -> None:
        for event in (layer.events.paint, layer.events.labels_update, layer.events.set_data):
            event.disconnect(self._on_stroke)
        layer.events.selected_label.disconnect(self._on_layer_label_changed)
        if self._session.annotations is not None:
            self._session.annotations.array.try_to_write()
            self._session.annotations.array.is_written_later = False

    def _forget_viewer(self) -> None:
        self._question = None
        self.selecting.abandon()
        self.list.cancel()
        self._viewer.layers.events.removed.disconnect(self._on_layer_removed)
        self._viewer.layers.events.removed.disconnect(self._on_layers_changed)
        self._viewer.layers.events.inserted.disconnect(self._on_layers_changed)
        with suppress(ValueError):  # a session may be closed twice
            self._viewer.mouse_drag_callbacks.remove(self._on_canvas_pressed)
        if self._kept is not None:
            self._let_go(self._kept)
            self._kept.metadata[ANNOTATIONS] = _LEFT


def colors_of(classes: tuple[Class, ...], *, first: int = FIRST_CLASS) -> Any:
    """napari's colors for labels: as painted, or with the first class at 1, where background is not shown."""
    from napari.utils.colormaps import DirectLabelColormap

    colors: dict[int | None, str] = {n: c.color for n, c in enumerate(classes, first)}
    if first > BACKGROUND:
        colors[BACKGROUND] = BACKGROUND_COLOR
    return DirectLabelColormap(color_dict=colors | {None: "#ff00ff", 0: "transparent"})


def _lie_on_each_other(layer: Any, other: Any) -> bool:
    """Whether the planes of two layers have one place in the world, to half a pixel."""
    corners, others = layer.extent.world[:, -2:], other.extent.world[:, -2:]
    return bool((np.abs(corners - others) <= np.abs(other.scale[-2:]) / 2).all())
