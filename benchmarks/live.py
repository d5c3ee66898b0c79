"""How soon the instant model follows a stroke, and how long the window stands still meanwhile.

    xvfb-run -a -s "-screen 0 1400x1000x24" python benchmarks/live.py

A scripted user draws thirty strokes with the mouse on generated nuclei of 512 x 512 pixels, on nuclei and on background
in turn, on three planes. The time of a stroke is that from the release of the mouse to the moment when the data of the
preview layer have changed. The gaps are those of a timer of 20 ms, while the stroke is drawn and afterwards. Each run
is a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PLANES = (4, 8, 12)
ON_OBJECT, ON_BACKGROUND = 12, 40  # pixels of the image that a stroke is long
BRUSH = 5  # pixels
TRIES = 200  # lines of which the best is drawn
MOVES = 12  # mouse events of a stroke
PATIENCE = 60  # seconds
REST = 0.7  # seconds after an answer, in which the list of slices is brought up to date, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--strokes", type=int, default=30)
    parser.add_argument("--size", type=int, default=512, help="side of the planes in pixels")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(User(args.size).draw(args.strokes)))
        return
    command = [sys.executable, __file__, "--child", "--strokes", str(args.strokes), "--size", str(args.size)]
    for _ in range(args.runs):
        load = os.getloadavg()[0]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        _show(json.loads(done.stdout.strip().splitlines()[-1]), load)


class User:
    """A window with a volume, the dock, and somebody who paints."""

    def __init__(self, size: int) -> None:
        import napari
        from qtpy.QtCore import QTimer
        from qtpy.QtWidgets import QApplication

        from distillfss_core import generate_sample
        from napari_distillfss._widgets.dock import DistillDock

        self.viewer = napari.Viewer()
        self.app: Any = QApplication.instance()
        made = generate_sample(planes=16, size=size)
        self.truth = made.labels > 0
        self.viewer.add_image(made.image, name="nuclei")
        self.dock = DistillDock(self.viewer, Path(tempfile.mkdtemp()))
        self.viewer.window.add_dock_widget(self.dock, area="right")
        self.canvas = self.viewer.window._qt_viewer.canvas.native
        self.rng = np.random.default_rng(0)
        self.ticks: list[float] = []
        self.timer = QTimer()
        self.timer.timeout.connect(lambda: self.ticks.append(time.perf_counter()))
        self.timer.start(20)
        self.changed: list[float] = []
        self.dock.preview._latest.answered.connect(self._on_answered)

    def _on_answered(self, part: Any) -> None:
        if hasattr(part, "probabilities"):  # the slot of the dock was called before, and has shown it
            self.changed.append(time.perf_counter())

    def draw(self, strokes: int) -> dict[str, Any]:
        """Seconds from the end of each stroke to its answer; the longest gaps while drawing and after it; the IoU."""
        preview, rows = self.dock.preview, []
        self.dock.support.go_to(PLANES[0])
        self.dock.support.paint.click()
        self.rest(1)
        for on_object in (False, True):
            self.stroke(PLANES[0], on_object)
        preview.on.setChecked(True)
        self.wait_for(f"Preview of plane {PLANES[0]} is ready")
        self.rest(2)
        for number in range(strokes):
            z = PLANES[number * len(PLANES) // strokes]
            if preview.plane != z:
                self.dock.support.go_to(z)
                self.wait_for(f"Preview of plane {z} is ready")
                self.rest(1)
            rows.append(self.measure(z, number % 2 == 0))
        shown, truth = preview.layers["labels"].data[0] > 0, self.truth[PLANES[-1]]
        iou = float((shown & truth).sum() / (shown | truth).sum())
        self.viewer.close()
        answer, drawing, after = np.array(rows).T.tolist()
        return {"answer": answer, "gap while drawing": drawing, "gap after a stroke": after, "iou": iou}

    def measure(self, z: int, on_object: bool) -> tuple[float, float, float]:
        """A stroke: time to the answer, longest gap before and after the release."""
        self.ticks[:] = [time.perf_counter()]
        self.changed.clear()
        self.stroke(z, on_object)
        released = time.perf_counter()
        drawing = float(np.diff([*self.ticks, released]).max())
        self.ticks[:] = [released]
        self.wait(lambda: any(t > released for t in self.changed))
        answered = next((t for t in self.changed if t > released), float("nan"))
        self.rest(REST)
        return answered - released, drawing, float(np.diff(self.ticks).max())

    def stroke(self, z: int, on_object: bool) -> None:
        """Draw a line through an object or through background."""
        from qtpy.QtCore import QEvent, QPointF, Qt
        from qtpy.QtGui import QMouseEvent

        from napari_distillfss._layers import camera_of

        layer = self.dock.support.layer
        layer.selected_label, layer.brush_size = (2 if on_object else 1), BRUSH
        line = self.choose_line(z, on_object)
        camera, left, none = camera_of(self.viewer), Qt.MouseButton.LeftButton, Qt.MouseButton.NoButton
        kinds = [QEvent.Type.MouseButtonPress, *[QEvent.Type.MouseMove] * (MOVES - 2), QEvent.Type.MouseButtonRelease]
        for kind, place in zip(kinds, line, strict=True):
            y, x = (place - camera.center[-2:]) * camera.zoom
            at = QPointF(self.canvas.width() / 2 + x, self.canvas.height() / 2 + y)
            is_move, is_release = kind == QEvent.Type.MouseMove, kind == QEvent.Type.MouseButtonRelease
            event = QMouseEvent(
                kind, at, self.canvas.mapToGlobal(at), none if is_move else left, none if is_release else left,
                Qt.KeyboardModifier.NoModifier,
            )  # fmt: skip
            self.app.sendEvent(self.canvas, event)
            self.app.processEvents()

    def choose_line(self, z: int, on_object: bool) -> np.ndarray:
        """Of some random lines the one with the fewest pixels of the other class under the brush; "n 2", y and x."""
        inside = self.truth[z] == on_object
        places = np.argwhere(inside)
        middles, angles = places[self.rng.integers(len(places), size=TRIES)], self.rng.uniform(0, np.pi, TRIES)
        offsets = np.linspace(-0.5, 0.5, MOVES) * (ON_OBJECT if on_object else ON_BACKGROUND)
        directions = np.stack([np.sin(angles), np.cos(angles)], 1)
        lines = middles[:, None] + offsets[:, None] * directions[:, None]
        around = BRUSH / 2 * np.array([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])
        under = (lines[:, :, None] + around).round().astype(int)
        end = self.truth.shape[-1] - 1
        right = inside[tuple(under.clip(0, end).transpose(3, 0, 1, 2))] & ((under >= 0) & (under <= end)).all(-1)
        best: np.ndarray = lines[right.mean((1, 2)).argmax()]
        return best

    def wait(self, until: Callable[[], bool]) -> None:
        end = time.perf_counter() + PATIENCE
        while not until() and time.perf_counter() < end:
            self.app.processEvents()
            time.sleep(0.001)

    def wait_for(self, text: str) -> None:
        self.wait(lambda: bool(self.dock.preview.message.text() == text))

    def rest(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        self.wait(lambda: time.perf_counter() > end)


def _show(run: dict[str, Any], load: float) -> None:
    parts = []
    for name in ("answer", "gap while drawing", "gap after a stroke"):
        values = 1000 * np.array(run[name])
        middle, high = np.percentile(values, (50, 90))
        parts.append(f"{name} {middle:.0f} ms ({high:.0f} at 90 %, {values.max():.0f} at most)")
    print(f"{'; '.join(parts)}; IoU {run['iou']:.3f}; load average {load:.1f}")


if __name__ == "__main__":
    main()
