"""Keys of the dock in its viewer.

napari 0.9 takes no key bindings from a manifest (`napari.plugins._npe2` drops them), so they are bound to the viewer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from napari_distillfss._annotations import FIRST_CLASS

if TYPE_CHECKING:
    from napari_distillfss._widgets.dock import DistillDock

NEXT_SUGGESTED, PREVIEW, TRAIN, REFINE, ADD_SLICE = "Alt-N", "Alt-P", "Alt-T", "Alt-R", "Alt-A"
NEXT_SLICE, PREVIOUS_SLICE = "Alt-Right", "Alt-Left"
OUTLINE = "Alt-O"

_Pressed = Callable[[Any], object]
_before: dict[_Pressed, _Pressed | None] = {}
"""What the key of a function of an open dock did before; None where it did nothing."""


def bind_shortcuts(dock: DistillDock) -> Callable[[], None]:
    """Bind the keys of the dock, each with Alt. Returns what gives them back to whom they belonged before.

    P is the preview. Where slices are annotated, 1 to 9 are classes, N is the next suggested slice, A adds the plane on
    screen, the arrows go to annotated slices, O outlines objects, T trains and R refines.
    """
    viewer, actions = dock.viewer, {PREVIEW: dock.preview.on.toggle}
    if dock.annotates:
        actions |= {
            NEXT_SUGGESTED: dock.support.go_to_next,
            ADD_SLICE: dock.support.add_plane,
            NEXT_SLICE: partial(dock.support.go_to_annotated, 1),
            PREVIOUS_SLICE: partial(dock.support.go_to_annotated, -1),
            TRAIN: dock.distill.start,
            REFINE: dock.distill.start_refining,
            OUTLINE: dock.support.outline.on.toggle,
            **{f"Alt-{n}": _brush(dock, FIRST_CLASS + n - 1) for n in range(1, 10)},
        }
    bound = [_bind(viewer, key, action) for key, action in actions.items()]

    def release() -> None:
        for key, function in [(key, function) for key, function in viewer.keymap.items() if function in bound]:
            before = _before[function]
            if before is None:
                del viewer.keymap[key]
            else:
                viewer.keymap[key] = before
        for function in bound:
            before = _before.pop(function, None)  # a session may be closed twice
            for later in [later for later, earlier in _before.items() if earlier is function]:
                _before[later] = before

    return release


def _bind(viewer: Any, key: str, action: Callable[[], object]) -> _Pressed:
    def pressed(_: Any) -> None:
        action()

    _before[pressed] = viewer.bind_key(key, pressed, overwrite=True)
    return pressed


def _brush(dock: DistillDock, label: int) -> Callable[[], None]:
    def choose() -> None:
        if label < FIRST_CLASS + len(dock.support.classes.value()):
            dock.support.classes.setBrush(label)

    return choose
