"""Preview of the plane on screen during scrolling, with corrections by painting."""

from __future__ import annotations

from typing import Any

import numpy as np
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QCheckBox, QWidget
from superqt.utils import qdebounced, qthrottled

import distillfss_core as core
from napari_distillfss._annotations import Class, from_classes, model_classes
from napari_distillfss._instant import InstantAnswers, Others
from napari_distillfss._layers import PREVIEW, ChosenVolume, camera_of, leave, lift, move_layer, shows_planes, take_up
from napari_distillfss._session import Session
from napari_distillfss._tasks import (
    Answering,
    Doing,
    Noticed,
    PlanePart,
    Unanswered,
    fill,
    iter_filled,
    iter_instant,
    iter_plane,
    iter_teacher,
)
from napari_distillfss._threads import Job, LatestJob
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
    until_closed,
)
from napari_distillfss._widgets.support import colors_of

STYLES = {"filled": (0.45, 0), "outlines": (0.9, 2), "dim": (0.2, 0)}
"""Opacity and width of the contour (0: filled) of the layer of labels."""

MODEL, INSTANT = "model", "instant"
TEACHERS = {"teacher (untrained)": "dcama", "prototypes (untrained)": "prototype"}
_NAMES = {"labels": "preview", "probability": "preview: probability", "uncertainty": "preview: uncertainty"}
_NO_MODEL = "Train a model first, or choose an untrained one"
_LOAD_FIRST = "Load a model first"
_HINT = "Tick Preview: the instant model learns from what you paint"
_GAVE_WAY = "Switched off, as the applied labels are shown; tick it to see it in their place"
_NO_PREVIEW = "there is no preview of this plane yet; tick the preview"
_OF_INSTANT = "only the instant model follows strokes"
_WAIT = 60  # milliseconds without a move before a plane is asked for
_BETWEEN = 250  # milliseconds at least between two drawings of a preview that arrives in parts
_LATE = 400  # milliseconds after which the answer to a stroke is said to be late
_AFTER_STROKE = 50  # milliseconds without a stroke before the instant model follows it
_AFTER_STROKES = 500  # milliseconds without a stroke before a teacher learns of them
_Planes = tuple[dict[str, np.ndarray], np.ndarray]
"""What is shown of a plane, by name, and the probabilities of its classes."""


class PreviewWidget(QWidget):
    """Keeps up to three preview layers at the plane on screen; results of earlier requests are dropped.

    A layer is made once and then moved and hidden, never removed. A closed dock leaves it to the next one.

    ``correct`` gives what the preview says of a plane, as it is painted, for the user to correct; ``settled`` is
    emitted whenever all that is on screen has been answered.
    """

    correct = Signal(object)
    settled = Signal()

    def __init__(self, session: Session, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session, self._viewer = session, viewer
        self._no_model = _NO_MODEL if session.annotates else _LOAD_FIRST
        self._teacher: Any = None
        self._instant: InstantAnswers | None = None
        self._version = 0  # of the instant model, whose output is shown
        self._requested: tuple[Any, Any] = (
            None,
            None,
        )  # of what kind a teacher was asked for, and of which annotations
        self._plane = -1
        self._notice = ""  # why the answers may be wrong
        self._corrected = -1  # plane whose preview is hidden, as its labels were taken over for correction
        self._painted_tiles: dict[tuple[int, int], tuple[slice, slice]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._probabilities: np.ndarray | None = None
        self._layers: dict[str, Any] = {}
        self._colored: tuple[Class, ...] = ()  # classes that the colors of the labels are of
        self.on = QCheckBox("Preview the plane on screen")
        self.on.setToolTip("Segment the visible part of each plane as you scroll")
        self.source = combo(
            "model: the trained student; instant: a linear classifier that follows your strokes; teacher: a "
            "network with your slices as support, before any training; prototypes: likewise, by the mean of each class",
            (MODEL, INSTANT, *TEACHERS) if session.annotates else (MODEL,),
        )
        self.source.setCurrentText(INSTANT)
        self.live = QCheckBox("Live")
        self.live.setToolTip("The instant model follows every stroke; otherwise it follows when you change the plane")
        self.live.setChecked(bool(session.recall("live", True)))
        allow(self.live, "" if self._uses_instant else _OF_INSTANT)
        self.shown = {name: QCheckBox(name) for name in _NAMES}
        for name, help_ in {
            "labels": "The class of every pixel",
            "probability": "How probable the chosen class is, 0 to 1",
            "uncertainty": f"0 sure, 1 no idea{': paint where it is bright' if session.annotates else ''}",
        }.items():
            self.shown[name].setToolTip(help_)
            self.shown[name].toggled.connect(self._on_shown_toggled)
        self.drawn_as = combo("How labels are drawn over the image", tuple(STYLES))
        self.drawn_as.currentTextChanged.connect(self._on_style_changed)
        self.of_class = combo("The class whose probability is shown")
        self.take = button(
            "Correct this plane",
            "Copy the preview of this plane into its unpainted pixels. Then repaint the errors and press Refine",
            self.correct_plane,
        )
        allow(self.take, _NO_PREVIEW)
        self.job = Job(session, "Preparation of the teacher", self)
        self.message = Message(_HINT if session.annotates else self._no_model)
        self._latest = LatestJob(self)
        self.offer = ReplaceOffer(session, self._latest, self.job)
        told = row(self.message, self.offer, first=3)
        self._soon = until_closed(session, qdebounced(self._ask, timeout=_WAIT))
        self._soon_shown = until_closed(session, qthrottled(self._show_parts, timeout=_BETWEEN, leading=False))
        self._late = until_closed(session, qdebounced(self._on_late, timeout=_LATE))
        self._after_stroke = until_closed(session, qdebounced(self._on_stroke_ended, timeout=_AFTER_STROKE))
        self._after_strokes = until_closed(session, qdebounced(self._on_strokes_settled, timeout=_AFTER_STROKES))
        self.shown["labels"].setChecked(True)
        using = row("Using", self.source)
        column(
            self,
            row(self.on, self.live, first=3),
            using,
            row(*self.shown.values()),
            row("Probability of", self.of_class),
            row("Labels as", self.drawn_as),
            self.take,
            JobBar(self.job, cancel="Stop", instead_of=told, is_patient=lambda: False),
            told,
        )
        if not session.annotates:
            for part in (self.live, using, self.take):
                part.hide()
        self._connect(session, viewer)

    def _connect(self, session: Session, viewer: Any) -> None:
        session.slices_changed.connect(self._on_slices_changed)
        session.stroked.connect(self._on_stroked)
        session.classes_changed.connect(self._on_classes_changed)
        self._latest.answered.connect(self._on_part)
        self._latest.failed.connect(self._on_failed)
        self._latest.idle.connect(self._on_idle)
        self.job.done.connect(self._on_teacher)
        self.job.ended.connect(self._on_job_ended)
        self.job.failed.connect(self.message.warn)
        self.on.toggled.connect(self._on_toggled)
        self.source.activated.connect(self._on_source_activated)
        self.source.currentTextChanged.connect(self._on_source_changed)
        self.live.toggled.connect(self._on_live_toggled)
        self.of_class.activated.connect(self._on_class_activated)
        session.model_changed.connect(self._on_model_changed)
        session.volume_changed.connect(self._on_volume_changed)
        session.closed.connect(self._forget_viewer)
        viewer.dims.events.current_step.connect(self._on_view_moved)
        viewer.dims.events.order.connect(self._on_view_moved)
        viewer.dims.events.ndisplay.connect(self._on_view_moved)
        camera_of(viewer).events.zoom.connect(self._on_view_moved)
        camera_of(viewer).events.center.connect(self._on_view_moved)
        viewer.layers.events.removed.connect(self._on_layer_removed)

    @property
    def busy(self) -> bool:
        """Whether a preview is being computed."""
        return self._latest.busy

    @property
    def layers(self) -> dict[str, Any]:
        """Preview layers; none while the preview is off."""
        return dict(self._layers) if self.on.isChecked() else {}

    @property
    def plane(self) -> int:
        """Plane of the preview layers."""
        return self._plane

    def model(self) -> Any:
        """Model of the preview: the student, the instant model or a teacher; None if there is none."""
        if self._uses_instant:
            return self._instant.model if self._instant is not None and self._instant.is_fitted else None
        return self._session.model if self._kind is None else self._teacher

    def evidence_of(self, plane: int) -> np.ndarray | None:
        """Latest probabilities of the model for this plane, "k+1 y x" float32, background first; not to be changed.

        Where nothing was computed yet they are zero. None if the preview is off or shows another plane.
        """
        is_shown = self.on.isChecked() and plane == self._plane and bool(self._painted_tiles)
        return self._probabilities if is_shown else None

    @property
    def _uses_instant(self) -> bool:
        return self.source.currentText() == INSTANT

    @property
    def _kind(self) -> str | None:
        """Of the teacher that is chosen, if one is."""
        return TEACHERS.get(self.source.currentText())

    def give_way(self) -> None:
        """Switch the preview off, as applied labels are seen from now on."""
        if self.on.isChecked():
            self.on.setChecked(False)
            self.message.tell(_GAVE_WAY)

    # what happens

    def _on_toggled(self, on: bool) -> None:
        if not on:
            self._hide_layers()
            return
        self.offer.hide()
        if self._kind is not None and self._teacher is None:
            self._make_teacher()
        self._ask()

    def _on_source_activated(self, _: int) -> None:
        self._teacher = None
        self._release_instant()
        self._clear()
        if self._kind is None:
            self._ask()
        else:
            self._make_teacher()

    def _on_source_changed(self) -> None:
        allow(self.live, "" if self._uses_instant else _OF_INSTANT)
        self._tell_what_is_needed()

    def _release_instant(self) -> None:
        """Let go of the features of the instant model, unless it is the chosen one."""
        held = self._instant
        if held is not None and not self._uses_instant:
            self._instant = InstantAnswers(held.volume, held.annotations, held.pixel_size, held.version)

    def _tell_what_is_needed(self) -> None:
        """Tell how a preview that is off gets its output."""
        if not self.on.isChecked():
            needs_model = self._kind is None and self._session.model is None
            self.message.tell(_HINT if self._uses_instant else self._no_model if needs_model else "")

    def _on_live_toggled(self, on: bool) -> None:
        self._session.remember("live", on)
        self._on_stroked()

    def _make_teacher(self) -> None:
        if self.job.running:  # what was asked for before ends first, and is dropped
            self._requested = (None, None)
            self.job.cancel()
            return
        wanted = self._wanted()

        def start() -> None:
            maker = self._session.support_maker()
            self.job.start(lambda stop: iter_teacher(maker, core.DistillSettings(), str(wanted[0]), stop))
            self._requested = wanted

        attempt(self.message, start)

    def _on_slices_changed(self) -> None:
        self._on_stroked()
        if self.on.isChecked() and self._kind is not None:
            self._after_strokes()

    def _on_stroked(self) -> None:
        if self.on.isChecked() and self._uses_instant and self.live.isChecked():
            self._after_stroke()

    def _on_stroke_ended(self) -> None:
        if self._uses_instant:
            self._ask()

    def _on_strokes_settled(self) -> None:
        """Make the teacher again from the slices as they are; the earlier one is used until it is there."""
        if self._session.busy and not self.job.running:
            self._after_strokes()  # after that job
        elif self.on.isChecked() and self._kind is not None and self._session.annotations is not None:
            self._make_teacher()

    def _on_classes_changed(self) -> None:
        self._color_labels()
        self._on_stroked()

    def _color_labels(self) -> None:
        """Give the labels the colors of the model's classes, if these are others than before: napari draws then."""
        shown = self._classes_shown()
        if "labels" in self._layers and shown != self._colored:
            self._layers["labels"].colormap = colors_of(shown, first=1)
            self._colored = shown

    def _classes_shown(self) -> tuple[Class, ...]:
        """The model's classes, see `model_classes`."""
        classes = self._session.annotations.classes if self._session.annotations else ()
        model = self.model()
        names = tuple(model.class_names) if model is not None else tuple(c.name for c in classes)
        return model_classes(names, classes)

    def _wanted(self) -> tuple[Any, Any]:
        return self._kind, self._session.annotations

    def _on_job_ended(self) -> None:
        kind, annotations = wanted = self._wanted()
        if kind is not None and annotations is not None and wanted != self._requested:
            self._make_teacher()

    def _on_teacher(self, teacher: Any) -> None:
        if teacher is None or self._wanted() != self._requested:  # stopped, or another is wanted by now
            return
        self._teacher = teacher
        self._clear()
        self.on.setChecked(True)
        self._ask()

    def _on_model_changed(self) -> None:
        if self._session.model is not None:
            self.source.setCurrentText(MODEL)
            self._release_instant()
            self._clear()
            self.on.setChecked(True)
            self._ask()

    def _on_volume_changed(self) -> None:
        self._teacher = self._instant = None  # they have learned from slices of another volume
        self._hide_layers()
        if self.message.text() == _GAVE_WAY:  # to labels of the volume before
            self._tell_what_is_needed()
            self.on.setChecked(True)
        if self._session.volume is None:
            self.message.tell("choose a volume first")
            self._tell_what_is_needed()
        if self.on.isChecked() and self._kind is not None and self._session.annotations is not None:
            self._make_teacher()
        else:
            self._ask()

    def _on_view_moved(self) -> None:
        if self.on.isChecked():
            self._soon()

    def _ask(self) -> None:
        """Request the tiles on screen that are not computed yet."""
        chosen, model = self._session.volume, self.model()
        if not self.on.isChecked():
            return
        if chosen is None:
            self.message.tell("choose a volume first")
            return
        if model is None and not self._uses_instant:
            self.message.tell(self._no_model)
            return
        dims = self._viewer.dims
        if not shows_planes(dims):
            self.message.tell("the preview is of planes (y, x): show the volume in 2D, in its own order of axes")
            return
        z = chosen.plane_on(dims)
        if self._uses_instant:
            self._ask_instant(chosen, z)
            return
        self._go_to(chosen, z, list(model.class_names))
        self._latest.cancel()
        painted, on_screen, volume = frozenset(self._painted_tiles), chosen.on_screen(), chosen.volume
        new = [] if painted else [a for a in (*self._arrays.values(), self._probabilities) if a is not None]
        self.message.tell(f"Preview of plane {z}: computing")
        self._latest.ask(lambda stop: iter_filled(new, iter_plane(volume, model, z, on_screen, painted, stop)))

    def _ask_instant(self, chosen: ChosenVolume, z: int) -> None:
        """Request an output of the instant model, which follows the annotations before."""
        annotations = self._session.annotations
        if annotations is None:
            self.message.warn(self._session.no_annotations)
            return
        if self._instant is None or self._instant.annotations is not annotations:
            self._instant = InstantAnswers(chosen.volume, annotations, chosen.pixel_size)
        self._instant.others = Others(*self._session.used(), tuple(self._session.layers()))
        instant, on_screen, is_here = self._instant, chosen.on_screen(), z == self._plane
        shown = (self._version, frozenset(self._painted_tiles)) if is_here else (0, frozenset[tuple[int, int]]())
        refit = self.live.isChecked() or not is_here
        if is_here:
            self._late()
        else:
            self.message.tell(f"Preview of plane {z}: computing")
        self._latest.cancel()
        shape, plane_shape = chosen.shape, chosen.plane_shape

        def make_blank(count: int) -> _Planes | None:
            if is_here:
                return None
            arrays, probabilities = _blank(shape, plane_shape, count)
            fill((*arrays.values(), probabilities))
            return arrays, probabilities

        self._latest.ask(
            lambda stop: iter_instant(instant, z, on_screen, shown, refit=refit, stop=stop, make_blank=make_blank)
        )

    def _on_late(self) -> None:
        """Tell that the preview on screen is not yet that of the latest strokes."""
        if self._latest.busy and self.on.isChecked() and self._uses_instant:
            self.message.tell(f"Preview of plane {self._plane}: following your strokes")

    def _on_part(self, part: PlanePart | Noticed | Doing | Answering | Unanswered) -> None:
        if isinstance(part, PlanePart):
            self._on_plane_part(part)
        elif isinstance(part, Noticed):
            self._notice = part.text
        elif isinstance(part, Doing):
            self.message.tell(part.text)
        elif isinstance(part, Unanswered):
            self._hide_layers()
            self.message.warn(part.text)
        elif self._session.volume is not None:
            self._go_to(self._session.volume, part.plane, list(part.class_names), part.blank)
            if part.version != self._version:
                self._version, self._painted_tiles = part.version, {}

    def _on_plane_part(self, part: PlanePart) -> None:
        if part.plane != self._plane or self._probabilities is None:
            return
        where = (0,) * (self._arrays["labels"].ndim - 2) + part.where
        self._arrays["labels"][where] = part.labels
        self._arrays["uncertainty"][where] = part.uncertainty
        self._probabilities[(slice(None), *part.where)] = part.probabilities
        self._arrays["probability"][where] = part.probabilities[self.of_class.currentIndex() + 1]
        self._painted_tiles[part.where[0].start, part.where[1].start] = part.where
        allow(self.take)
        if len(self._painted_tiles) == 1:
            self._show_layers()
        else:
            self._soon_shown()

    def _on_failed(self, message: str) -> None:
        self.message.warn(message)
        self.on.setChecked(False)

    def _show_parts(self) -> None:
        """Show the parts that have arrived, now and then: napari maps the whole plane to colors each time."""
        if self._painted_tiles and self.on.isChecked():
            self._show_layers()

    def _on_idle(self) -> None:
        self._soon_shown.flush()
        if self.on.isChecked() and self._painted_tiles:
            if self._notice:
                self.message.warn(f"Preview of plane {self._plane} is ready, but {self._notice}")
            else:
                self.message.tell(f"Preview of plane {self._plane} is ready")
            self.settled.emit()

    def _on_shown_toggled(self) -> None:
        self._corrected = -1
        if self._painted_tiles:
            self._show_layers()

    def _on_style_changed(self) -> None:
        if "labels" in self._layers:
            opacity, self._layers["labels"].contour = STYLES[self.drawn_as.currentText()]
            self._layers["labels"].opacity = opacity

    def _on_class_activated(self, index: int) -> None:
        if self._probabilities is not None:
            self._arrays["probability"][...] = self._probabilities[index + 1]
            self._show_layers()

    def correct_plane(self) -> None:
        """Copy the preview of the plane on screen into its unpainted pixels."""
        if not self._painted_tiles:
            self.message.warn(_NO_PREVIEW)
            return
        chosen = self._session.volume
        if chosen is None or chosen.plane_on(self._viewer.dims) != self._plane:
            self.message.warn("the preview is of another plane; wait until this one is computed")
            return
        labels = self._arrays["labels"].reshape(chosen.plane_shape)
        annotation = np.full(labels.shape, core.IGNORE, np.uint8)
        for where in self._painted_tiles.values():  # what was not computed stays unlabeled
            annotation[where] = labels[where]
        self.correct.emit(from_classes(annotation))
        self._corrected = self._plane
        self._show_layers()
        self.message.tell(
            f"Plane {self._plane} is copied to the annotations. The preview is hidden while you correct it"
        )

    def _on_layer_removed(self) -> None:
        self._layers = {name: layer for name, layer in self._layers.items() if layer in self._viewer.layers}

    # layers

    def _go_to(self, chosen: ChosenVolume, z: int, names: list[str], blank: _Planes | None = None) -> None:
        """Clear the preview layers and move them to another plane, or to other classes."""
        is_same = [self.of_class.itemText(i) for i in range(self.of_class.count())] == names
        if z == self._plane and is_same:
            return
        self._plane, self._corrected, self._painted_tiles = z, -1, {}
        allow(self.take, _NO_PREVIEW)
        if not is_same:
            self.of_class.clear()
            self.of_class.addItems(names)
        self._arrays, self._probabilities = blank or _blank(chosen.shape, chosen.plane_shape, len(names))

    def _show_layers(self) -> None:
        chosen = self._session.volume
        if chosen is None:
            return
        place = chosen.place(self._plane)
        for name, array in self._arrays.items():
            if name not in self._layers and self.shown[name].isChecked():
                self._layers[name] = self._take_up(name) or self._add_layer(name, array, place)
            layer = self._layers.get(name)
            if layer is not None:
                if layer.data is not array:
                    move_layer(self._viewer, layer, array, place)
                    lift(self._viewer.layers, layer, chosen.layer)
                    if name == "labels":
                        self._color_labels()
                layer.visible = self.shown[name].isChecked() and self._plane != self._corrected
                layer.refresh()

    def _take_up(self, name: str) -> Any:
        """The layer that a closed dock has left; None if there is none."""
        layer = take_up(self._viewer.layers, _NAMES[name])
        if layer is not None and name == "labels":
            layer.opacity, layer.contour = STYLES[self.drawn_as.currentText()]
            self._colored = ()
        return layer

    def _add_layer(self, name: str, array: np.ndarray, place: dict[str, Any]) -> Any:
        active = self._viewer.layers.selection.active
        options = {"name": _NAMES[name], "metadata": {PREVIEW: True}, **place}
        if name == "labels":
            opacity, contour = STYLES[self.drawn_as.currentText()]
            self._colored = self._classes_shown()
            colors = colors_of(self._colored, first=1)
            layer = self._viewer.add_labels(array, opacity=opacity, colormap=colors, **options)
            layer.contour = contour
        else:
            ramp = "viridis" if name == "probability" else "inferno"
            layer = self._viewer.add_image(
                array, colormap=ramp, contrast_limits=(0, 1), opacity=0.6, blending="additive", **options
            )
        if active is not None:
            self._viewer.layers.selection.active = active  # the brush stays where it was
        return layer

    def _clear(self) -> None:
        self._latest.cancel()
        self._plane, self._corrected, self._painted_tiles = -1, -1, {}
        allow(self.take, _NO_PREVIEW)

    def _hide_layers(self) -> None:
        self._clear()
        for layer in self._layers.values():
            layer.visible = False

    def _forget_viewer(self) -> None:
        self._latest.cancel()
        for name, layer in self._layers.items():
            leave(layer, _NAMES[name])
        self._layers, self._arrays, self._probabilities = {}, {}, None
        self._teacher = self._instant = None
        events = self._viewer.dims.events
        for event in (events.current_step, events.order, events.ndisplay):
            event.disconnect(self._on_view_moved)
        camera = camera_of(self._viewer).events
        for event in (camera.zoom, camera.center):
            event.disconnect(self._on_view_moved)
        self._viewer.layers.events.removed.disconnect(self._on_layer_removed)


def _blank(shape: tuple[int, ...], plane_shape: tuple[int, int], count: int) -> _Planes:
    """What is shown of a plane of a volume, by name, and the probabilities of this many classes and background."""
    one = (*(1 for _ in shape[:-2]), *plane_shape)
    kinds = {"labels": np.uint8, "probability": np.float32, "uncertainty": np.float32}
    return {name: np.zeros(one, kind) for name, kind in kinds.items()}, np.zeros((count + 1, *plane_shape), np.float32)
