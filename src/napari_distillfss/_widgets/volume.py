"""Choice of the volume: an image layer, or a file that becomes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from napari.layers import Image
from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import QCheckBox, QComboBox, QDoubleSpinBox, QFileDialog, QInputDialog, QLabel, QWidget
from superqt.utils import qdebounced

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._layers import (
    LEAD_NAMES,
    REPLACE_NAN,
    ChosenVolume,
    choose_layer,
    covers_of,
    finest_shape,
    hide_covers,
    hold_shown,
    is_at,
    is_image,
    layer_axes,
    layer_of_file,
    lead_at,
    lead_axes,
    names_of_channels,
    point_on,
    show_whole,
    to_world,
    units_beside,
)
from napari_distillfss._session import Session
from napari_distillfss._tasks import Doing, iter_device
from napari_distillfss._threads import Job
from napari_distillfss._widgets._common import (
    BeforeAction,
    JobBar,
    Message,
    attempt,
    button,
    column,
    combo,
    row,
    spin,
    until_closed,
)

_MOST = 1e9  # that NaN is replaced by
_QUICK = 16_000_000  # bytes of an array that are hashed in a moment
_WAIT = 150  # milliseconds without a move of a slider before its time or channel is chosen


class ChannelChoice(QComboBox):
    """Chooses a channel by its name, or by its number where it has none; ``valueChanged`` emits the number."""

    valueChanged = Signal(int)

    def __init__(self, tooltip: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setToolTip(tooltip)
        self.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.setMinimumContentsLength(3)
        self.currentIndexChanged.connect(self._on_index_changed)
        self.setMaximum(0)

    def value(self) -> int:
        return max(0, self.currentIndex())

    def setValue(self, value: int) -> None:
        self.setCurrentIndex(min(max(0, value), self.count() - 1))

    def maximum(self) -> int:
        return self.count() - 1

    def setMaximum(self, high: int) -> None:
        """Offer the channels 0 to ``high``."""
        if high != self.maximum():
            chosen = self.value()
            was_blocked = self.blockSignals(True)
            self.clear()
            self.addItems([str(number) for number in range(high + 1)])
            self.blockSignals(was_blocked)
            self.setValue(chosen)

    def setNames(self, names: Sequence[str]) -> None:
        """Show these names; numbers where there are none."""
        for number in range(self.count()):
            text = names[number] if names else str(number)
            self.setItemText(number, text)
            self.setItemData(number, f"{text} (channel {number})", Qt.ItemDataRole.ToolTipRole)

    def _on_index_changed(self, index: int) -> None:
        self.valueChanged.emit(index)


@dataclass(frozen=True, eq=False)
class _Awaited:
    """A layer that was chosen and is being hashed: `id` of its array, and what chooses it once this is done."""

    layer: Any
    array: int
    again: Callable[[], object]


class VolumePicker(QWidget):
    """Edits the chosen volume. ``valueChanged`` emits a ChosenVolume or None.

    The volume of a large array is chosen once another thread has hashed it; until then the one before stays.

    Time and channel are those of napari's sliders: either one moves the other. After a slider the volume is chosen a
    moment later, or at once before the user presses anything: a stroke never meets the annotations of another time.
    """

    valueChanged = Signal(object)

    def __init__(self, session: Session, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session, self._viewer = session, viewer
        self._value: ChosenVolume | None = None
        self._opened: ChosenVolume | None = None  # as the latest file was opened
        self._awaited: _Awaited | None = None
        self._hashed: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()  # of a layer: arrays, by their `id`
        self.layers = combo("The image layer to segment")
        self.layers.activated.connect(self._on_layer_activated)
        self.open_file = button(
            "File…", "Open an image, a TIFF stack, MRC, NIfTI or an .npy file lazily", self._on_open_file_clicked
        )
        self.open_folder = button(
            "Folder…", "Open OME-Zarr, zarr, a DICOM series or a folder of planes lazily", self._on_open_folder_clicked
        )
        self.open_address = button(
            "Address…", "Open OME-Zarr at an https:// or s3:// address lazily", self._on_open_address_clicked
        )
        self.lead: dict[str, Any] = {
            "t": spin(0, 0, 0, "Which time to segment"),
            "c": ChannelChoice("Which channel to segment"),
        }
        self.level = spin(0, 0, 0, "Resolution of the pyramid: 0 is the finest; a coarser one is faster")
        self._lead_labels = {letter: QLabel(name.capitalize()) for letter, name in LEAD_NAMES.items()}
        self._level_label = QLabel("Level")
        for label, box in zip((*self._lead_labels.values(), self._level_label), (*self.lead.values(), self.level),
                              strict=True):  # fmt: skip
            label.setBuddy(box)
            box.setAccessibleName(label.text())
        self.replaces = QCheckBox("Read NaN and infinite as")
        self.replaces.setToolTip("Pixels that are not finite can be neither learned from nor segmented")
        self.replaces.toggled.connect(self._on_replacement_edited)
        self.replacement = QDoubleSpinBox()
        self.replacement.setToolTip("What is read in place of NaN and infinite; the file is not changed")
        self.replacement.setAccessibleName("Number in place of NaN and infinite")
        self.replacement.editingFinished.connect(self._on_replacement_edited)
        self._replacing = row(self.replaces, self.replacement)
        self.layers.setAccessibleName("Image layer")
        for box in self.lead.values():
            box.valueChanged.connect(self._on_lead_edited)
        self.level.valueChanged.connect(self._on_choice_changed)
        self._soon = until_closed(session, qdebounced(self._on_slider_settled, timeout=_WAIT))
        self._before_action = BeforeAction(self._on_slider_settled, self)
        self.message = Message("No image layer yet. Open one, or try File > Open Sample > DistillFSS", lines=4)
        self.device = Message(lines=1)
        self.opening = Job(name="Opening of a volume", parent=self)
        which = [w for letter in LEAD_NAMES for w in (self._lead_labels[letter], self.lead[letter])]
        column(
            self,
            row(self.layers, self.open_file, self.open_folder, self.open_address, first=2),
            row(*which, self._level_label, self.level),
            self._replacing,
            JobBar(
                self.opening,
                cancel="Open nothing",
                starting="Opening",
                instead_of=self.message,
                is_patient=lambda: False,
            ),
            self.message,
            self.device,
        )
        self._job = Job()
        self._job.done.connect(self._on_device_found)
        self._job.failed.connect(self.device.warn)
        self.opening.done.connect(self._on_opened)
        self.opening.failed.connect(self.message.warn)
        self.opening.ended.connect(self._on_opening_ended)
        session.closed.connect(self.opening.abandon)
        session.closed.connect(self._forget_viewer)
        viewer.layers.events.inserted.connect(self._on_layers_changed)
        viewer.layers.events.removed.connect(self._on_layers_changed)
        viewer.layers.events.reordered.connect(self._on_layers_changed)
        viewer.layers.events.renamed.connect(self._on_layers_changed)
        viewer.dims.events.current_step.connect(self._on_slider_moved)
        self._take(None)
        self._on_layers_changed()

    def value(self) -> ChosenVolume | None:
        return self._value

    def setValue(self, value: ChosenVolume | None, level: int | None = None) -> None:
        if value is None:
            self._stop_waiting()
            self.layers.setCurrentIndex(-1)
            self._take(None)
            return
        self.layers.setCurrentIndex(self._images().index(value.layer))
        self._fit_boxes(value.layer)
        for letter, index in value.lead.items():
            _set(self.lead[letter], index)
        _set(self.level, int(value.opening.get("level", self.level.value())) if level is None else level)
        self._take(value)

    def open_path(self, path: str | Path) -> None:
        """Show a file, a folder, or what lies at an address, lazily as a layer, and choose it.

        It is opened in another thread, since a disk or a server may be slow. An earlier one that is not open yet is
        abandoned.
        """
        self.opening.abandon()
        point = tuple(self._viewer.dims.point) if self._viewer.layers else None
        self.opening.start(lambda stop: _iter_opening(path, stop, point))

    def _on_opened(self, opened: ChosenVolume | None) -> None:
        awaited, self._awaited = self._awaited, None
        if opened is None or self.opening.was_stopped:
            self._show_choice()
            self.message.tell("Stopped; nothing was opened")
            return
        if awaited is not None:
            self._on_hashed(opened, awaited)
            return
        self._opened = opened
        self._viewer.add_layer(opened.layer)
        self.layers.setCurrentIndex(self._images().index(opened.layer))
        self._choose_and_show()

    def _on_hashed(self, opened: ChosenVolume, awaited: _Awaited) -> None:
        before, self._opened = self._opened, opened
        self._hashed.setdefault(opened.layer, set()).add(awaited.array)
        self.layers.setCurrentIndex(self._images().index(opened.layer))
        awaited.again()
        self._opened = before  # the layer may be changed before it is chosen again

    def _on_opening_ended(self) -> None:
        if not self.opening.running:
            self._awaited = None

    def _stop_waiting(self) -> None:
        if self._awaited is not None:
            self.opening.abandon()

    def _choose_and_show(self) -> None:
        """Choose the volume, and fit the view to it unless it lies where the one before does."""
        before = self._value
        self._on_choice_changed()
        if self._value is None or self._awaited is not None:
            return
        layer = self._value.layer
        is_elsewhere = before is None or not _lie_alike(before.layer, layer)
        if is_elsewhere or not is_at(layer, point_on(layer, self._viewer.dims), self._viewer.dims.displayed):
            show_whole(self._viewer, self._value)

    def _images(self) -> list[Any]:
        return [layer for layer in self._viewer.layers if is_image(layer)]

    def _on_layers_changed(self, event: Any = None) -> None:
        images = self._images()
        current = self._value.layer if self._value else None
        self.layers.blockSignals(True)
        self.layers.clear()
        self.layers.addItems([layer.name for layer in images])
        if self._awaited is not None and self._awaited.layer not in images:
            self._stop_waiting()
        self._show_choice()
        self.layers.blockSignals(False)
        if current is not None and current not in images:
            self._take(None)
            kept = "; what was painted and trained is kept" if self._session.annotates else ""
            self.message.tell(f"layer {current.name!r} was removed{kept}")
        added = getattr(event, "value", None) if getattr(event, "type", "") == "inserted" else None
        if self._awaited is not None:
            return
        if current is None and images and (event is None or added in images):
            self.layers.setCurrentIndex(images.index(added) if added in images else 0)
            self._on_choice_changed()
        elif self._value is not None:
            covers = covers_of(self._viewer.layers, self._value.layer, self._value.layer)
            note = f"{_names(covers)} covers it: choose it again to see it\n" if covers else ""
            self.message.tell(f"{note}{self._text()}")

    def _on_layer_activated(self) -> None:
        """Choose the volume and show it: opaque images above it are hidden, and stay where they are in the list."""
        self._choose_and_show()
        if self._awaited is not None:
            self._awaited = replace(self._awaited, again=self._on_layer_activated)
            return
        if self._value is None:
            return
        image = self._value.layer
        image.visible = True
        hidden = hide_covers(self._viewer.layers, image, image)
        if hidden:
            self.message.tell(f"{_names(hidden)} covered it and is hidden\n{self._text()}")

    def _on_choice_changed(self, *_: object) -> None:
        index = self.layers.currentIndex()
        images = self._images()
        if not 0 <= index < len(images):
            return
        layer = images[index]

        def choose() -> None:
            self._fit_boxes(layer)
            if self._value is None or layer is not self._value.layer:
                self._follow_sliders(layer)
            lead = {letter: self.lead[letter].value() for letter in lead_axes(layer)}
            chosen = self._choose(layer, lead, self.level.value())
            if chosen is not None:
                self._take(chosen)

        if not attempt(self.message, choose):
            self._take(None)

    def _choose(self, layer: Any, lead: dict[str, int], level: int) -> ChosenVolume | None:
        """The volume of a layer; the one that was opened last need not be opened again.

        None if it is hashed before, in another thread. Pixels that are not finite are read as was chosen in an earlier
        session.
        """
        opened = self._opened
        is_open = opened is not None and opened.layer is layer and opened.lead == lead and not level
        chosen = opened if opened is not None and is_open else choose_layer(layer, lead=lead, level=level)
        array = _array_of(layer, level)
        if chosen.volume.location is None and _size_of(array) > _QUICK and id(array) not in self._hashed.get(layer, ()):
            self.opening.abandon()
            self.opening.start(lambda stop: _iter_hashing(chosen, stop))
            self._awaited = _Awaited(layer, id(array), self._on_choice_changed)
            self.layers.setCurrentIndex(self._images().index(layer))
            return None
        if REPLACE_NAN not in layer.metadata:
            number = self._session.replacement_of(chosen)
            if number is not None:
                layer.metadata[REPLACE_NAN], self._opened = number, None
                self._fit_boxes(layer)
                return choose_layer(layer, lead=lead, level=level)
        return chosen

    def _on_lead_edited(self) -> None:
        self._on_choice_changed()
        if self._value is not None:
            dims, axes, layer = self._viewer.dims, self._value.axes, self._value.layer
            place = to_world(layer, dims, self._value.point_of(0))
            for letter in self._value.lead:
                axis = axes.index(letter)
                dims.set_point(dims.ndim - len(axes) + axis, place[axis])

    def _on_slider_moved(self) -> None:
        if self._value is not None and self._value.lead:
            self._soon()
            self._before_action.arm()

    def _on_slider_settled(self) -> None:
        self._soon.cancel()
        self._before_action.disarm()
        chosen = self._value
        if chosen is not None and self._follow_sliders(chosen.layer):
            self._on_choice_changed()

    def _follow_sliders(self, layer: Any) -> bool:
        """Show the time and channel of napari's sliders. Returns whether one of them is another than before."""
        lead = lead_at(layer, point_on(layer, self._viewer.dims))
        before = [self.lead[letter].value() for letter in lead]
        for letter, place in lead.items():
            _set(self.lead[letter], place)
        return before != [self.lead[letter].value() for letter in lead]

    def _fit_boxes(self, layer: Any) -> None:
        """Show the levels, times and channels of a layer."""
        letters = layer_axes(layer)
        shape = finest_shape(layer)
        for letter, box in self.lead.items():
            self._lead_labels[letter].setVisible(letter in letters)
            box.setVisible(letter in letters)
            if letter in letters:
                _set(box, box.value(), int(shape[letters.index(letter)]) - 1)
        self.lead["c"].setNames(names_of_channels(layer))
        levels = len(layer.data) if layer.multiscale else 1
        self._level_label.setVisible(levels > 1)
        self.level.setVisible(levels > 1)
        _set(self.level, self.level.value(), levels - 1)
        self._replacing.setVisible(REPLACE_NAN in layer.metadata)
        value = layer.metadata.get(REPLACE_NAN)
        self.replaces.blockSignals(True)
        self.replaces.setChecked(value is not None)
        self.replaces.blockSignals(False)
        if value is not None:
            limit = min(_MOST, float(np.finfo(layer.dtype).max))
            self.replacement.setRange(-limit, limit)
            self.replacement.setValue(value)

    def replace_nan(self, value: float | None) -> None:
        """Read pixels of the volume that are not finite as a number, or as they are. Annotations stay."""
        if self._value is not None and self._value.layer.metadata.get(REPLACE_NAN, math.nan) != value:
            self._value.layer.metadata[REPLACE_NAN] = value
            self._session.keep_replacement(self._value, value)
            self._opened = None
            self._on_choice_changed()

    def _on_replacement_edited(self) -> None:
        self.replace_nan(self.replacement.value() if self.replaces.isChecked() else None)

    def _show_choice(self) -> None:
        """Show the layer of the volume in the list, or the one that is being hashed where none is chosen."""
        images, chosen = self._images(), self._value or self._awaited
        self.layers.setCurrentIndex(images.index(chosen.layer) if chosen and chosen.layer in images else -1)

    def _take(self, value: ChosenVolume | None) -> None:
        self._value = value
        if value is not None:
            self._stop_waiting()
            self.message.tell(self._text())
            if not self.device.text() and not self._job.running:
                self.device.tell("looking for a GPU")
                self._job.start(iter_device)
        else:
            boxes = (*self.lead.values(), self.level, *self._lead_labels.values(), self._level_label)
            for box in (*boxes, self._replacing):
                box.hide()
        self.valueChanged.emit(value)

    def _text(self) -> str:
        """What the units of other images mean for the chosen volume, which comes first, then its size and memory."""
        if self._value is None:
            return ""
        note = units_beside(self._value.layer, self._viewer.layers)
        return "\n".join(filter(None, (fmt.sentence(note), fmt.volume(self._value))))

    def _on_open_file_clicked(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Open a volume")
        if path:
            self.open_path(path)

    def _on_open_folder_clicked(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Open OME-Zarr, DICOM, or a folder of planes")
        if path:
            self.open_path(path)

    def _on_open_address_clicked(self) -> None:
        address, is_given = QInputDialog.getText(self, "Open a volume", "Address of OME-Zarr (https://, s3://)")
        if is_given and address.strip():
            self.open_path(address.strip())

    def _on_device_found(self, name: str) -> None:
        self.device.tell(f"computes on {name}")

    def _forget_viewer(self) -> None:
        self._viewer.layers.events.inserted.disconnect(self._on_layers_changed)
        self._viewer.layers.events.removed.disconnect(self._on_layers_changed)
        self._viewer.layers.events.reordered.disconnect(self._on_layers_changed)
        self._viewer.layers.events.renamed.disconnect(self._on_layers_changed)
        self._viewer.dims.events.current_step.disconnect(self._on_slider_moved)
        self._before_action.disarm()


def _iter_opening(
    path: str | Path, stop: Event, point: tuple[float, ...] | None
) -> Generator[Doing, None, ChosenVolume | None]:
    """Open a path or address and make its layer, which reads a plane or two. Returns None if it was stopped.

    The planes at ``point`` of napari's sliders are in memory then.
    """
    yield Doing(f"opening {path}")
    levels, options = layer_of_file(path)
    if stop.is_set():
        return None
    yield Doing(f"reading {options['name']}")
    levels = hold_shown(levels, options, point)
    opened = choose_layer(Image(levels if options["multiscale"] else levels[0], **options))
    return (yield from _iter_hashing(opened, stop))


def _iter_hashing(chosen: ChosenVolume, stop: Event) -> Generator[Doing, None, ChosenVolume | None]:
    """Read what tells a volume from others, which is kept. Returns None if it was stopped."""
    yield Doing(f"reading {chosen.name}")
    with suppress(core.DistillFSSError):  # the session says why it keeps no annotations
        _ = chosen.volume.identity
    return None if stop.is_set() else chosen


def _array_of(layer: Any, level: int) -> Any:
    return layer.data[level] if layer.multiscale else layer.data


def _size_of(array: Any) -> int:
    """Bytes of an array."""
    size: int = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    return size


def _lie_alike(layer: Any, other: Any) -> bool:
    """Whether two layers cover the same rows and columns of the world."""
    return bool(np.allclose(layer.extent.world[:, -2:], other.extent.world[:, -2:]))


def _names(layers: list[Any]) -> str:
    first, *rest = (repr(layer.name) for layer in layers)
    return f"{first} and {fmt.count(len(rest), 'image')} more" if rest else first


def _set(box: Any, value: int, high: int | None = None) -> None:
    box.blockSignals(True)
    if high is not None:
        box.setMaximum(high)
    box.setValue(value)
    box.blockSignals(False)
