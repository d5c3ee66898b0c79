"""Objects are outlined by a click, a stroke or a box, and taken over into the annotations."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import numpy as np
from napari.utils.colormaps import DirectLabelColormap
from qtpy.QtCore import QObject, Signal
from qtpy.QtWidgets import QPushButton

from napari_distillfss._annotations import FIRST_CLASS, UNLABELED
from napari_distillfss._layers import PREVIEW, is_at, leave, lift, move_layer, shows_planes, take_up
from napari_distillfss._outlines import (
    Draft,
    Outlined,
    PlaneCache,
    box_between,
    iter_outline,
    pixels_to_paint,
    probability_of,
    within,
)
from napari_distillfss._session import Session
from napari_distillfss._threads import LatestJob
from napari_distillfss._widgets._common import Message, attempt
from napari_distillfss._widgets.classes import ClassList

ACCEPT, DROP = "Enter", "Escape"
_AWAY, _BOX = "Shift", "Control"
_PART = "proposed outline"
_COLOR = "#ff00ff"
_MAKES = "Enter makes it "
_HELP = (
    "Click an object, draw along it, or Ctrl+drag a box around it. Then: click more, Shift+click takes away, Enter "
    "accepts, Escape drops"
)


class OutlineTool(QObject):
    """Proposes the object under the mouse; Enter paints it in the class of the brush.

    While it is on, the annotation layer is the active one and is neither painted into nor moved. The proposal is drawn
    in a layer of its own, which is made once and then moved and hidden, never removed.

    ``settled`` is emitted whenever all strokes have been answered.

    Parameters
    ----------
    session : Session
    viewer : napari viewer
    show_layer : function
        Returns the annotation layer, or None if there is none; the reason is shown then.
    classes : ClassList
        Its brush gives the class of an outline; switching on takes the first class in place of background or eraser.
    message : Message
    """

    settled = Signal()

    def __init__(
        self,
        session: Session,
        viewer: Any,
        show_layer: Callable[[], Any],
        classes: ClassList,
        message: Message,
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._session, self._viewer, self._show_layer, self._classes = session, viewer, show_layer, classes
        self._message = message
        self.evidence_of: Callable[[int], Any] = lambda _plane: None  # probabilities of a plane, "k+1 y x"
        self.layer: Any = None  # shows the proposal
        self._target: Any = None  # annotation layer, while the tool is on
        self._draft: Draft | None = None
        self._answer: Outlined | None = None
        self._is_accepted = False  # whether the answer that is under way is to be painted at once
        self._is_adding = False
        self._planes = PlaneCache()
        self.on = QPushButton("Outline objects")
        self.on.setCheckable(True)
        self.on.setToolTip(f"{_HELP} (Alt+O)")
        self.on.toggled.connect(self._on_toggled)
        self._latest = LatestJob(self)
        self._latest.answered.connect(self._on_answer)
        self._latest.failed.connect(self._on_failed)
        self._latest.idle.connect(self.settled.emit)
        session.volume_changed.connect(self.switch_off)
        session.closed.connect(self._forget_viewer)
        viewer.dims.events.current_step.connect(self._on_view_moved)
        viewer.dims.events.order.connect(self._on_view_moved)
        viewer.dims.events.ndisplay.connect(self._on_view_moved)
        viewer.layers.selection.events.active.connect(self._on_active_changed)
        viewer.layers.events.removed.connect(self._on_layer_removed)

    @property
    def job(self) -> LatestJob:
        """Computes the proposals."""
        return self._latest

    @property
    def busy(self) -> bool:
        """Whether an outline is being computed."""
        return self._latest.busy

    @property
    def answer(self) -> Outlined | None:
        """The proposal on screen."""
        return self._answer

    def switch_off(self) -> None:
        """Drop the proposal and give the mouse back."""
        self.on.setChecked(False)

    def add_stroke(self, points: Any, *, take_away: bool = False) -> None:
        """Propose an outline with one stroke more: points y x in pixels of the plane, shape (n, 2)."""
        chosen, begun = self._session.volume, self._begin()
        if chosen is None or begun is None:
            return
        stroke = within(points, chosen.plane_shape)
        draft = self._draft or begun
        if not len(stroke):
            return
        if take_away and not draft.inside and draft.box is None:
            self._message.warn("there is no proposal to take away from; click an object first")
            return
        self._draft = draft.with_stroke(stroke, take_away=take_away)
        self._ask(self._draft)

    def draw_box(self, first: Any, last: Any) -> None:
        """Propose the outline of another object, that fills a box between two corners: y x in pixels of the plane."""
        chosen, begun = self._session.volume, self._begin()
        if chosen is not None and begun is not None:
            self._draft = replace(begun, box=box_between(first, last, chosen.plane_shape))
            self._ask(self._draft)

    def _begin(self) -> Draft | None:
        """A draft in the class of the brush, of the plane on screen; None where none can be made."""
        chosen = self._session.volume
        if chosen is None or self._target is None:
            return None
        label = self._classes.brush()
        if label == UNLABELED:
            self._message.warn("the eraser is chosen; choose the class of the object")
            return None
        return Draft(chosen.plane_on(self._viewer.dims), label)

    def accept(self) -> None:
        """Paint the proposal into the annotation layer, as one step of its history."""
        if self._draft is None:
            return
        answer, annotations = self._answer, self._session.annotations
        if answer is None or answer.draft is not self._draft:
            self._is_accepted = True
            return
        target = self._target
        self.drop()
        if target is None or annotations is None:
            return
        z, label = answer.draft.plane, answer.draft.label
        rows, columns = pixels_to_paint(answer, annotations.plane(z), preserve=bool(target.preserve_labels))
        index = tuple(i if isinstance(i, slice) else np.full(len(rows), i) for i in annotations.index(z))
        if attempt(self._message, lambda: target.data_setitem((*index, rows, columns), label)):
            self._message.tell(f"{len(rows)} pixels are {self._name_of(label)} now; Ctrl+Z takes them back")

    def drop(self) -> None:
        """Forget the proposal."""
        self._draft = self._answer = None
        self._is_accepted = False
        self._latest.cancel()
        if self.layer is not None:
            self.layer.visible = False
        if self._message.text().startswith(_MAKES):
            self._message.tell(_HELP)

    def brush_changed(self) -> None:
        """The class of the brush has changed: the proposal was for another."""
        if self._draft is not None and self._draft.label != self._classes.brush():
            self.drop()

    # what happens

    def _on_toggled(self, on: bool) -> None:
        if not on:
            self.drop()
            self._let_go()
            if self._message.text() == _HELP:
                self._message.tell("")
            return
        target = self._show_layer()
        dims = self._viewer.dims
        if target is None:
            self.switch_off()
        elif not shows_planes(dims):
            self._message.warn("outlines lie in planes (y, x): show the volume in 2D, in its own order of axes")
            self.switch_off()
        else:
            if self._classes.brush() < FIRST_CLASS:
                self._classes.setBrush(FIRST_CLASS)
            self._take(target)
            self._message.tell(_HELP)

    def _take(self, target: Any) -> None:
        self._target = target
        self._viewer.layers.selection.active = target
        target.mode = "pan_zoom"
        target.mouse_pan = False
        target.mouse_drag_callbacks.append(self._on_mouse_drag)
        target.bind_key(ACCEPT, lambda _: self.accept(), overwrite=True)
        target.bind_key(DROP, lambda _: self.drop(), overwrite=True)
        target.events.mode.connect(self._on_mode_changed)

    def _let_go(self) -> None:
        target, self._target = self._target, None
        if target is None:
            return
        target.events.mode.disconnect(self._on_mode_changed)
        if self._on_mouse_drag in target.mouse_drag_callbacks:  # a layer that was removed has none
            target.mouse_drag_callbacks.remove(self._on_mouse_drag)
        for key in (ACCEPT, DROP):
            target.bind_key(key, None)
        target.mouse_pan = str(target.mode) == "pan_zoom"

    def _on_mouse_drag(self, layer: Any, event: Any) -> Generator[None, None, None]:
        """Collect the way of the mouse from press to release."""
        if event.button != 1:
            return
        if not is_at(layer, event.position, event.dims_displayed):
            self._message.warn("this volume is not on screen; move the sliders to one of its planes")
            return
        take_away, is_box = _AWAY in event.modifiers, _BOX in event.modifiers
        points = [layer.world_to_data(event.position)[-2:]]
        yield
        while event.type == "mouse_move":
            points.append(layer.world_to_data(event.position)[-2:])
            if is_box:
                self._show_box(points[0], points[-1])
            yield
        if is_box:
            self.draw_box(points[0], points[-1])
        else:
            self.add_stroke(points, take_away=take_away)

    def _on_answer(self, answer: Outlined) -> None:
        if answer.draft is not self._draft:
            return
        self._answer = answer
        self._show(answer)
        self._message.tell(f"{_MAKES}{self._name_of(answer.draft.label)}; click to add, Shift+click to take away")
        if self._is_accepted:
            self.accept()

    def _on_failed(self, text: str) -> None:
        """Go back to the proposal before the stroke that cannot be used."""
        self._is_accepted = False
        self._draft = self._answer.draft if self._answer is not None else None
        if self._answer is not None:
            self._show(self._answer)
        elif self.layer is not None:
            self.layer.visible = False  # it shows the box
        self._message.warn(text)

    def _on_view_moved(self) -> None:
        chosen, dims = self._session.volume, self._viewer.dims
        if chosen is None or self._target is None:
            return
        if not shows_planes(dims):
            self.switch_off()
        elif self._draft is not None and chosen.plane_on(dims) != self._draft.plane:
            self.drop()

    def _on_mode_changed(self) -> None:
        if str(self._target.mode) != "pan_zoom":
            self.switch_off()

    def _on_active_changed(self) -> None:
        is_other = self._viewer.layers.selection.active is not self._target
        if self._target is not None and is_other and not self._is_adding:
            self.switch_off()

    def _on_layer_removed(self) -> None:
        if self.layer is not None and self.layer not in self._viewer.layers:
            self.layer = None
            self.drop()
        if self._target is not None and self._target not in self._viewer.layers:
            self.switch_off()

    # parts

    def _ask(self, draft: Draft) -> None:
        chosen, annotations = self._session.volume, self._session.annotations
        if chosen is None or annotations is None:
            return
        volume, planes, z = chosen.volume, self._planes, draft.plane
        evidence = probability_of(draft.label, self.evidence_of(z))
        preserve = bool(self._target.preserve_labels)
        self._latest.ask(
            lambda stop: iter_outline(
                lambda: planes.read(volume, z), draft, lambda: annotations.plane(z), evidence, stop, preserve=preserve
            )
        )

    def _name_of(self, label: int) -> str:
        names = self._session.annotations.class_names if self._session.annotations else ()
        return names[label - FIRST_CLASS] if FIRST_CLASS <= label < FIRST_CLASS + len(names) else "background"

    def _show(self, answer: Outlined) -> None:
        self._show_mask(answer.mask, answer.draft.plane, answer.corner)

    def _show_box(self, first: Any, last: Any) -> None:
        """Show a box while it is drawn."""
        chosen = self._session.volume
        if chosen is not None:
            (y0, y1), (x0, x1) = box_between(first, last, chosen.plane_shape)
            self._show_mask(np.ones((y1 - y0, x1 - x0), bool), chosen.plane_on(self._viewer.dims), (y0, x0))

    def _show_mask(self, part: np.ndarray, plane: int, corner: tuple[int, int]) -> None:
        chosen = self._session.volume
        if chosen is None:
            return
        mask = np.pad(part, 1).astype(np.uint8)  # so that its outline is drawn on all sides
        array = mask.reshape((1,) * (len(chosen.axes) - 2) + mask.shape)
        y, x = corner
        place = chosen.place(plane, y - 1, x - 1)
        if self.layer is None:
            self.layer = take_up(self._viewer.layers, _PART)
        if self.layer is None:
            self._add_layer(array, place)
        else:
            move_layer(self._viewer, self.layer, array, place)
            lift(self._viewer.layers, self.layer, chosen.layer)
        self.layer.visible = True

    def _add_layer(self, array: np.ndarray, place: dict[str, Any]) -> None:
        self._is_adding = True
        colors = DirectLabelColormap(color_dict={1: _COLOR, 0: "transparent", None: "transparent"})
        self.layer = self._viewer.add_labels(
            array, name=_PART, colormap=colors, opacity=1.0, metadata={PREVIEW: True}, **place
        )
        self.layer.contour = 2
        self.layer.editable = False
        self._viewer.layers.selection.active = self._target
        self._is_adding = False

    def _forget_viewer(self) -> None:
        self.switch_off()
        if self.layer is not None:
            leave(self.layer, _PART)
            self.layer = None
        self._latest.cancel()
        dims, layers = self._viewer.dims.events, self._viewer.layers
        for event in (dims.current_step, dims.order, dims.ndisplay):
            event.disconnect(self._on_view_moved)
        layers.selection.events.active.disconnect(self._on_active_changed)
        layers.events.removed.disconnect(self._on_layer_removed)
