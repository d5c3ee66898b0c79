"""Removal of layers without a crash of napari."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qtpy.QtOpenGLWidgets import QOpenGLWidget
from qtpy.QtWidgets import QWidget


def guard_removals(dock: QWidget, viewer: Any) -> Callable[[], None]:
    """Make the canvas of the window current before any layer is removed, and return what ends this.

    napari sends commands to OpenGL when a layer is removed, outside of a paint event. Without a current context they
    are lost, and a later draw may crash (docs/decisions/napari.md).
    """

    def make_current() -> None:
        window = dock.window()
        assert window is not None  # at least the dock itself
        for canvas in window.findChildren(QOpenGLWidget):
            canvas.makeCurrent()

    viewer.layers.events.removing.connect(make_current)
    return lambda: viewer.layers.events.removing.disconnect(make_current)
