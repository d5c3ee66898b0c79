"""What the plugin costs napari: opening the dock, and how long the window stands still while work goes on.

    xvfb-run -a -s "-screen 0 1400x1000x24" python benchmarks/plugin.py

Opening is measured in fresh processes, beside napari alone; standing still by a timer of 20 ms (its longest gap), in a
window with the generated nuclei. The stack of the window is sampled in each gap: whether napari is at work, the plugin,
or neither (Qt, or another thread has Python's lock). A labels layer in napari without the dock stands beside it. Memory
is that of the process with the same nuclei. Cancelling is measured from the press of the button: until the window has
answered, until the job has ended, and until its thread has. Each the median of three. A stroke is drawn into the
annotations of a series, without a window; of eight the fastest, for each event of the mouse.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

RUNS = 3

OPENING = """
import sys, tempfile, time
start = time.perf_counter()
import napari
viewer = napari.Viewer()
from qtpy.QtWidgets import QApplication
QApplication.processEvents()
alone = time.perf_counter()
from pathlib import Path
from napari_distillfss._widgets.dock import DistillDock
dock = DistillDock(viewer, Path(tempfile.mkdtemp()))
viewer.window.add_dock_widget(dock, area="right")
QApplication.processEvents()
print(alone - start, time.perf_counter() - alone, "torch" in sys.modules)
viewer.close()
"""


def main() -> None:
    parts = {"gaps": measure_gaps, "large": measure_large, "memory": measure_memory, "cancels": measure_cancels}
    if sys.argv[1:]:
        print(json.dumps(parts[sys.argv[1]]()))
        return
    opened = [_last_line([sys.executable, "-c", OPENING]).split() for _ in range(RUNS)]
    alone, dock = (statistics.median(float(run[k]) for run in opened) for k in (0, 1))
    print(f"napari alone {alone:.2f} s, the dock {dock:.2f} s more; torch loaded: {opened[0][2]}")
    for what in ("gaps", "large"):
        gaps = [json.loads(_last_line([sys.executable, __file__, what])) for _ in range(RUNS)]
        for phase in gaps[0]:
            gap, napari, plugin = (1000 * statistics.median(run[phase][k] for run in gaps) for k in range(3))
            print(f"{phase}: the longest gap {gap:.0f} ms, of it in napari {napari:.0f}, in the plugin {plugin:.0f}")
    held = [json.loads(_last_line([sys.executable, __file__, "memory"])) for _ in range(RUNS)]
    for phase in held[0]:
        print(f"{phase}: {statistics.median(run[phase] for run in held):.0f} MB")
    cancels = [json.loads(_last_line([sys.executable, __file__, "cancels"])) for _ in range(RUNS)]
    for phase in cancels[0]:
        answered, ended, over = (statistics.median(run[phase][k] for run in cancels) for k in range(3))
        print(f"cancel {phase}: answered after {1000 * answered:.0f} ms, ended {ended:.1f} s, its thread {over:.1f} s")
    print(f"a stroke: {1000 * measure_stroke():.1f} ms for each event of the mouse")


class Samples:
    """Where the window's thread is, every 10 ms: "napari" (and what it is drawn with), "plugin" or ""."""

    def __init__(self) -> None:
        self._thread, self._taken = threading.get_ident(), list[tuple[float, str]]()
        threading.Thread(target=self._run, daemon=True).start()

    def between(self, start: float, end: float) -> list[str]:
        return [place for time_, place in self._taken if start <= time_ <= end]

    def _run(self) -> None:
        while True:
            time.sleep(0.01)
            self._taken.append((time.perf_counter(), _place(sys._current_frames().get(self._thread))))


def _place(frame: Any) -> str:
    """Whose function is the innermost. No frame is kept: its painters would outlive their pictures, and Qt crashes."""
    while frame is not None:
        path = frame.f_code.co_filename
        if "napari_distillfss" in path or "distillfss_core" in path:
            return "plugin"
        if any(f"/{name}/" in path for name in ("napari", "vispy", "magicgui", "superqt")):
            return "napari"
        frame = frame.f_back
    return ""


class Gaps:
    """Longest gaps of a 20 ms timer by what was going on, and of it in napari and in the plugin; seconds."""

    def __init__(self) -> None:
        from qtpy.QtCore import QTimer

        self.found: dict[str, list[float]] = {}
        self._samples, self._ticks, self._timer = Samples(), list[float](), QTimer()
        self._timer.timeout.connect(lambda: self._ticks.append(time.perf_counter()))
        self._timer.start(20)

    def during(self, phase: str, begin: Callable[[], object], until: Callable[[], object]) -> None:
        """Measure from the beginning, which is part of it, until what was begun last has ended, too."""
        self._ticks[:] = [time.perf_counter()]
        begin()
        go_on(until)
        seen = len(self._ticks)
        go_on(lambda: len(self._ticks) > seen + 5)
        start, end = max(itertools.pairwise(self._ticks), key=lambda pair: pair[1] - pair[0])
        places = self._samples.between(start, end)
        shares = [places.count(name) / max(1, len(places)) for name in ("napari", "plugin")]
        self.found[phase] = [end - start, *((end - start) * share for share in shares)]


def go_on(until: Callable[[], object]) -> None:
    """Let the window go on."""
    from qtpy.QtWidgets import QApplication

    while not until():
        QApplication.processEvents()
        time.sleep(0.001)


def measure_gaps() -> dict[str, list[float]]:
    """The gaps of one session."""
    import napari
    from qtpy.QtWidgets import QApplication

    from distillfss_core import DistillSettings, generate_sample
    from napari_distillfss._widgets.dock import DistillDock

    viewer = napari.Viewer()
    app = QApplication.instance() or QApplication([])
    made = generate_sample(planes=12, size=384)
    gaps = Gaps()
    during = gaps.during

    def add_image() -> None:
        viewer.add_image(made.image, name="nuclei")

    def nothing() -> None:
        pass

    viewer.add_image(made.image)
    viewer.add_labels(made.labels)  # napari's first layers take it a second or two, whoever adds them
    app.processEvents()
    during("napari alone: a labels layer is added", lambda: viewer.add_labels(made.labels), lambda: True)
    viewer.layers.clear()
    folder = Path(tempfile.mkdtemp())
    dock = DistillDock(viewer, folder)
    viewer.window.add_dock_widget(dock, area="right")
    app.processEvents()
    during("a volume is chosen, torch loaded", add_image, lambda: "Computes" in dock.volume.device.text())
    during("slices are suggested", dock.support.suggest_slices, lambda: not dock.support.selecting.running)
    kept = dock.session.annotations
    assert kept is not None  # the suggestion made them
    first = dock.support.suggested[0]
    dock.support.go_to(first)
    dock.support.paint.click()
    layer = dock.support.layer

    def draw() -> None:
        with layer.block_history():  # as between press and release of the mouse
            layer._draw(2, (first, 100, 100), (first, 100, 200))

    during("first stroke", draw, lambda: kept.plane(first).any())
    for z in dock.support.suggested:
        kept.put(z, (made.labels[z] > 0).astype(np.uint8) + 1)
    dock.session.painted()
    dock.distill.settings.setValue(DistillSettings(steps=40, crops=32, crop_size=128, zoom=Fraction(1)))
    during("preparing to distill", dock.distill.start, lambda: dock.distill.plot.losses)
    during("distilling", nothing, lambda: not dock.session.busy)
    during("first preview", nothing, lambda: "is ready" in dock.preview.message.text())
    during(
        "scrolling",
        lambda: dock.support.go_to(7),
        lambda: dock.preview.plane == 7 and "is ready" in dock.preview.message.text(),
    )
    dock.apply.out.setText(str(folder / "out.ome.zarr"))
    during("Apply is pressed", dock.apply.start, lambda: True)
    during("applying", nothing, lambda: not dock.session.busy)
    during("counting objects", dock.objects.start, lambda: not dock.session.busy)
    during("refining", dock.distill.start_refining, lambda: not dock.session.busy)
    count = len(viewer.layers)
    during(
        "a sample is generated",
        lambda: viewer.open_sample("napari-distillfss", "nuclei"),
        lambda: len(viewer.layers) > count,
    )
    viewer.close()
    return gaps.found


def measure_large() -> dict[str, list[float]]:
    """The gaps of one session with planes of 2048 x 2048 pixels, all in sight, and the instant model."""
    import napari

    from distillfss_core import generate_sample
    from napari_distillfss._widgets.dock import DistillDock

    viewer = napari.Viewer()
    made = generate_sample(planes=6, size=512)
    image, labels = (np.tile(array, (1, 4, 4)) for array in (made.image, made.labels > 0))
    gaps = Gaps()
    during = gaps.during
    viewer.add_image(made.image)
    viewer.add_labels(made.labels)  # napari's first layers take it a second or two, whoever adds them
    viewer.layers.clear()
    dock = DistillDock(viewer, Path(tempfile.mkdtemp()))
    viewer.window.add_dock_widget(dock, area="right")
    viewer.add_image(image, name="large")
    during("2048: torch is loaded", lambda: None, lambda: "omputes" in dock.volume.device.text())
    kept = dock.session.annotations
    assert kept is not None  # the volume made them
    during("2048: paint is pressed", dock.support.paint.click, lambda: True)
    layer = dock.support.layer

    def draw(label: int, z: int, row: int) -> None:
        with layer.block_history():  # as between press and release of the mouse
            layer._draw(label, (z, row, 100), (z, row, 300))

    def is_ready() -> bool:
        return "is ready" in dock.preview.message.text() and not dock.preview.busy

    first = dock.support.plane()
    during("2048: first stroke", lambda: draw(2, first, 100), lambda: kept.plane(first).any())
    kept.put(first, labels[first].astype(np.uint8) + 1)
    dock.session.painted()
    during("2048: first preview", lambda: dock.preview.on.setChecked(True), is_ready)
    instant = dock.preview._instant
    assert instant is not None  # it has answered
    version = instant.version
    during(
        "2048: a stroke and its answer", lambda: draw(1, first, 200), lambda: is_ready() and instant.version > version
    )
    during("2048: slider", lambda: dock.support.go_to(first + 1), lambda: is_ready() and dock.preview.plane > first)
    during("2048: slider back", lambda: dock.support.go_to(first), lambda: is_ready() and dock.preview.plane == first)
    viewer.close()
    return gaps.found


def measure_memory() -> dict[str, float]:
    """Resident megabytes of the process after each part of the work; the largest during it where it is named so."""
    import napari
    from qtpy.QtWidgets import QApplication

    from distillfss_core import DistillSettings, generate_sample
    from distillfss_core.process import peak_mb, reset_peak, resident_mb
    from napari_distillfss._widgets.dock import DistillDock

    viewer = napari.Viewer()
    app = QApplication.instance() or QApplication([])
    made = generate_sample(planes=12, size=384)
    viewer.add_image(made.image)
    viewer.add_labels(made.labels)
    app.processEvents()
    viewer.layers.clear()
    folder = Path(tempfile.mkdtemp())
    held = {"napari": resident_mb() or 0.0}

    def after(phase: str, until: Callable[[], object]) -> None:
        reset_peak()
        while not until():
            app.processEvents()
            time.sleep(0.005)
        time.sleep(1)  # the thread of the job returns its memory
        held[phase], held[f"{phase}, the most"] = resident_mb() or 0.0, peak_mb() or 0.0

    dock = DistillDock(viewer, folder)
    widget = viewer.window.add_dock_widget(dock, area="right")
    viewer.add_image(made.image, name="nuclei")
    after("the dock, torch loaded", lambda: "omputes" in dock.volume.device.text())
    assert dock.session.annotations is not None  # the volume made them
    for z in (1, 4, 6, 9):
        dock.session.annotations.put(z, (made.labels[z] > 0).astype(np.uint8) + 1)
    dock.session.painted()
    dock.preview.on.setChecked(True)
    after("the instant model", lambda: "is ready" in dock.preview.message.text())
    dock.distill.settings.setValue(DistillSettings(steps=15, zoom=Fraction(1)))
    dock.distill.start()
    after("a training", lambda: not dock.session.busy)
    after("the preview of the model", lambda: "is ready" in dock.preview.message.text())
    dock.apply.out.setText(str(folder / "out.ome.zarr"))
    dock.apply.start()
    after("Apply", lambda: not dock.session.busy)
    closing = time.monotonic()
    viewer.window.remove_dock_widget(widget)
    dock.session.close()
    after("the dock is closed", lambda: time.monotonic() > closing + 1)
    viewer.close()
    return held


class Cancels:
    """Seconds from a press of Cancel until the window has answered, the job has ended, and its thread has."""

    def __init__(self, dock: Any) -> None:
        self._dock, self.found = dock, dict[str, list[float]]()

    def note(self, phase: str, press: Callable[[], object], ended: Callable[[], bool]) -> None:
        start = time.perf_counter()
        press()
        self.found[phase] = []
        for is_reached in (lambda: True, ended, _no_thread):
            go_on(is_reached)
            self.found[phase].append(time.perf_counter() - start)

    def during(self, phase: str, job: Any, begin: Callable[[], object], ready: Callable[[Any], bool]) -> None:
        """Begin a job, and cancel it after a step that is ready for it."""
        from napari_distillfss._widgets._common import JobBar

        steps: list[Any] = []
        job.stepped.connect(steps.append)
        (bar,) = (bar for bar in self._dock.findChildren(JobBar) if bar._job is job)
        begin()
        go_on(lambda: any(map(ready, steps)))
        self.note(phase, bar.cancel.click, lambda: not job.running)
        job.stepped.disconnect(steps.append)


def _no_thread() -> bool:
    return not any(thread.name.startswith("distillfss") for thread in threading.enumerate())


def measure_cancels() -> dict[str, list[float]]:
    """What `Cancels` has found in one session."""
    import napari

    from distillfss_core import DistillSettings, TrainStep, generate_sample
    from napari_distillfss._widgets.dock import DistillDock

    viewer = napari.Viewer()
    made = generate_sample(planes=12, size=512)
    folder = Path(tempfile.mkdtemp())
    dock = DistillDock(viewer, folder)
    cancels = Cancels(dock)
    during = cancels.during
    viewer.window.add_dock_widget(dock, area="right")
    viewer.add_image(made.image, name="nuclei")
    go_on(lambda: "omputes" in dock.volume.device.text())
    kept = dock.session.annotations
    assert kept is not None  # the volume made them
    for z in (1, 4, 6, 9, 11):
        kept.put(z, (made.labels[z] > 0).astype(np.uint8) + 1)
    dock.session.painted()
    dock.preview.on.setChecked(True)
    waited = time.perf_counter() + 2
    go_on(lambda: time.perf_counter() > waited)
    cancels.note("the first preview", lambda: dock.preview.on.setChecked(False), lambda: not dock.preview.layers)
    train, job = dock.distill.start, dock.distill.job
    during("Train, loading", job, train, lambda step: "backbone" in getattr(step, "text", ""))
    during("Train, fitting a probe", job, train, lambda step: getattr(step, "stage", "") == "fit")
    dock.distill.settings.setValue(DistillSettings(steps=40, zoom=Fraction(1)))
    during("Train, a step", job, train, lambda step: isinstance(step, TrainStep) and not step.is_preparation)
    during("Train, after its steps", job, train, lambda step: hasattr(step, "model"))
    go_on(lambda: not dock.preview.busy)
    dock.preview.on.setChecked(False)
    dock.support.way.setCurrentText("least sure")
    during("Suggest slices", dock.support.job, dock.support.suggest_slices, lambda step: True)
    dock.support.outline.on.setChecked(True)
    dock.support.outline.add_stroke([(200.0, 200.0)])
    cancels.note("an outline", dock.support.outline.drop, lambda: not dock.support.outline.busy)
    dock.apply.out.setText(str(folder / "out.ome.zarr"))
    during("Apply", dock.apply.job, dock.apply.start, lambda step: hasattr(step, "level"))
    viewer.add_labels(made.labels, name="truth")
    dock.objects.labels.setCurrentText("truth")
    dock.objects.method.setCurrentText("watershed")
    go_on(lambda: not dock.objects._measuring.busy)
    during("Count objects", dock.objects.job, dock.objects.start, lambda step: hasattr(step, "total"))
    cancels.found["a sample"] = _cancel_sample(viewer)
    viewer.close()
    return cancels.found


def _cancel_sample(viewer: Any) -> list[float]:
    """As `Cancels` finds it: the dialog waits for the job, and the job for its thread."""
    from qtpy.QtCore import QTimer
    from qtpy.QtWidgets import QApplication, QProgressDialog

    from distillfss_core import DistillFSSError

    pressed: list[float] = []

    def press() -> None:
        (dialog,) = (w for w in QApplication.topLevelWidgets() if isinstance(w, QProgressDialog) and w.isVisible())
        pressed.append(time.perf_counter())
        dialog.canceled.emit()
        pressed.append(time.perf_counter())

    QTimer.singleShot(700, press)
    with suppress(DistillFSSError):
        viewer.open_sample("napari-distillfss", "nuclei")
    ended = time.perf_counter() - pressed[0]
    return [pressed[1] - pressed[0], ended, ended]


def measure_stroke() -> float:
    """Seconds for each event of the mouse of a stroke of twelve dabs an event, in 20 planes of 1024 x 1024 pixels."""
    from napari.layers import Labels

    from napari_distillfss._annotations import Annotations

    folder = Path(tempfile.mkdtemp())
    annotations = Annotations(folder / "kept", (1, 20, 1024, 1024), lambda z: (0, z))
    for z in range(20):
        annotations.put(z, np.ones((1024, 1024), np.uint8))
    array, layer = annotations.array, Labels(annotations.array)
    array.is_written_later = True
    layer.events.labels_update.connect(lambda event: array.write())
    layer.mode, layer.brush_size = "paint", 17
    times = []
    for stroke in range(8):
        began, row = time.perf_counter(), 100 + 60 * stroke
        with layer.block_history():
            for column in range(100, 500, 50):
                layer._draw(2 + stroke % 2, (0, 3, row, column), (0, 3, row, column + 50))
        times.append((time.perf_counter() - began) / 8)
    return min(times)


def _last_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
