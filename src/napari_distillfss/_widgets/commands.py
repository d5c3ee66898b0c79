"""Commands of napari's palette. Each shows its section of the dock, which is opened where it is closed."""

from __future__ import annotations

from typing import Any

import napari
from napari.utils.notifications import show_info
from qtpy.QtWidgets import QDockWidget, QWidget

import distillfss_core as core
from napari_distillfss._widgets._common import JobBar
from napari_distillfss._widgets.dock import DistillDock

_PLUGIN, _DOCK = "napari-distillfss", "Label, distill, segment"
_OF_ANNOTATIONS = ("support", "distill")


def show_dock() -> None:
    """Show the dock."""
    _show()


def suggest_slices() -> None:
    """Suggest slices to annotate."""
    _section("support").suggest_slices()


def add_slice() -> None:
    """Put the plane on screen among the slices to annotate."""
    _section("support").add_plane()


def next_slice() -> None:
    """Go to the next annotated slice."""
    _section("support").go_to_annotated(1)


def previous_slice() -> None:
    """Go to the previous annotated slice."""
    _section("support").go_to_annotated(-1)


def next_suggested() -> None:
    """Go to the next suggested slice that has no label."""
    _section("support").go_to_next()


def fill_rest() -> None:
    """Label the unlabeled pixels of the plane on screen as background."""
    _section("support").fill_rest()


def train() -> None:
    """Train a model."""
    _section("distill").start()


def refine() -> None:
    """Refine the present model."""
    _section("distill").start_refining()


def toggle_preview() -> None:
    """Switch the preview on or off."""
    _section("preview").on.toggle()


def correct_plane() -> None:
    """Copy the preview into the annotations of the plane on screen."""
    _section("preview", annotates=True).correct_plane()


def apply() -> None:
    """Segment the volume."""
    _section("apply").start()


def count_objects() -> None:
    """Count the objects of the labels."""
    _section("objects").start()


def export_labels() -> None:
    """Ask where to write the labels as TIFF, and write them."""
    _section("objects").ask_to_export_labels()


def load_model() -> None:
    """Ask for a model file, and load it."""
    _section("model").ask_to_load()


def cancel() -> None:
    """Cancel what runs, in all docks of this window."""
    _show()
    running = [bar for dock in _docks(_viewer()) for bar in dock.findChildren(JobBar) if bar.is_running]
    for bar in running:
        bar.stop()
    if not running:
        show_info("DistillFSS: nothing is running")


def _viewer() -> Any:
    viewer = napari.current_viewer()
    if viewer is None:
        raise core.DistillFSSError("there is no napari window; open one first")
    return viewer


def _docks(viewer: Any) -> list[DistillDock]:
    return [widget for widget in viewer.window.dock_widgets.values() if isinstance(widget, DistillDock)]


def _section(name: str, *, annotates: bool = False) -> Any:
    """A section of the dock, made visible; optionally of one in which slices are annotated."""
    dock = _show(annotates=annotates or name in _OF_ANNOTATIONS)
    section = getattr(dock, name)
    dock.unfold(section)
    return section


def _show(*, annotates: bool = False) -> DistillDock:
    """Show a dock of the current window, optionally one in which slices are annotated; open one if there is none."""
    viewer = _viewer()
    fitting = [dock for dock in _docks(viewer) if dock.annotates or not annotates]
    dock: DistillDock
    if fitting:
        dock = fitting[0]
    else:
        _, dock = viewer.window.add_plugin_dock_widget(_PLUGIN, _DOCK)
    holder: QWidget | None = dock
    while holder is not None and not isinstance(holder, QDockWidget):
        holder = holder.parentWidget()
    if holder is not None:
        holder.show()
        holder.raise_()
    return dock
