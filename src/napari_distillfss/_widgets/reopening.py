"""What a dock that is closed leaves to the next one of the same window: its choices, and where its work is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distillfss_core as core
from napari_distillfss._layers import choose_layer
from napari_distillfss._session import Applied, Counted
from napari_distillfss._students import Training

if TYPE_CHECKING:
    from napari_distillfss._widgets.dock import DistillDock

_KEY = "distillfss_session"
"""Key of the metadata of an image layer: what the dock had that is closed."""


@dataclass(frozen=True, eq=False)
class _Left:
    """Choices of a closed dock.

    ``model`` is there only where it has no file: a closed dock holds none that can be loaded again.
    """

    kind: str
    lead: Mapping[str, int]
    level: int
    model: Any
    model_path: Path | None
    training: Training | None
    applied: Applied | None
    counted: Counted | None
    labels: tuple[Any, Path | None]
    objects: Any
    strokes: Any
    out: str
    region: Any
    suggested: list[int]
    settings: core.DistillSettings
    boxes: Mapping[str, Any]
    unfolded: list[bool]


def leave(dock: DistillDock) -> None:
    """Leave the choices of a dock in the metadata of its image layer."""
    session = dock.session
    if session.volume is None:
        return
    session.volume.layer.metadata[_KEY] = _Left(
        kind=type(dock).__name__,
        lead=dict(session.volume.lead),
        level=dock.volume.level.value(),
        model=session.model if session.model_path is None else None,
        model_path=session.model_path,
        training=session.training,
        applied=session.applied,
        counted=session.counted,
        labels=dock.apply.shown(),
        objects=dock.objects.shown(),
        strokes=dock.support.history(),
        out=dock.apply.out.text(),
        region=dock.apply.region.value(),
        suggested=dock.support.suggested,
        settings=dock.distill.settings.value(),
        boxes={name: _value(box) for name, box in _boxes(dock).items()},
        unfolded=[section.heading.isChecked() for section in dock.sections.values()],
    )


def take_up(dock: DistillDock) -> bool:
    """Give a new dock the volume, the model and the choices of one that was closed. Returns whether there was one."""
    for layer in dock.session.layers():
        left = layer.metadata.get(_KEY)
        if isinstance(left, _Left) and left.kind == type(dock).__name__:
            del layer.metadata[_KEY]
            with suppress(core.DistillFSSError):  # the layer has changed since
                chosen = choose_layer(layer, lead=left.lead, level=left.level)
                dock.session.resume(left.model_path, left.training)
                dock.volume.setValue(chosen, left.level)
                _restore(dock, left)
                return True
    return False


def _restore(dock: DistillDock, left: _Left) -> None:
    session = dock.session
    dock.distill.settings.setValue(left.settings)
    dock.support.suggested = left.suggested
    session.slices_changed.emit()
    dock.apply.setShown(*left.labels)
    dock.apply.out.setText(left.out)
    dock.apply.region.setValue(left.region)
    if left.applied is not None:
        session.set_applied(left.applied)
        session.counted = left.counted
    dock.objects.setShown(left.objects)
    dock.support.setHistory(left.strokes)

    def restore_boxes() -> None:
        dock.preview.on.setChecked(False)  # so that it is asked for what the boxes say
        for name, box in _boxes(dock).items():
            _set(box, left.boxes[name])
        for section, is_unfolded in zip(dock.sections.values(), left.unfolded, strict=True):
            section.heading.setChecked(is_unfolded)

    def on_model() -> None:
        session.model_changed.disconnect(on_model)
        restore_boxes()

    restore_boxes()
    if left.model is not None:
        session.set_model(left.model, path=None, training=left.training)
        restore_boxes()
    elif left.model_path is not None:
        session.model_changed.connect(on_model)  # a model that arrives is previewed, whatever was shown before


def _boxes(dock: DistillDock) -> dict[str, Any]:
    """Combo, check and spin boxes whose choices are the user's, by name; the preview is switched on last."""
    support, preview, apply, objects = dock.support, dock.preview, dock.apply, dock.objects
    return {
        "count": support.count,
        "way": support.way,
        "kind": support.kind,
        "more": dock.distill.settings.more,
        "live": preview.live,
        "source": preview.source,
        **{f"shown {name}": box for name, box in preview.shown.items()},
        "drawn as": preview.drawn_as,
        "mode": apply.mode,
        "method": objects.method,
        "radius": objects.radius,
        "smallest": objects.smallest,
        "preview": preview.on,
    }


def _value(box: Any) -> Any:
    return (
        box.currentText()
        if hasattr(box, "currentText")
        else box.isChecked()
        if hasattr(box, "isChecked")
        else box.value()
    )


def _set(box: Any, value: Any) -> None:
    if hasattr(box, "setCurrentText"):
        box.setCurrentText(value)
    elif hasattr(box, "setChecked"):
        box.setChecked(value)
    else:
        box.setValue(value)
