"""What the plugin costs napari: opening the dock, and how long the window stands still while work goes on.

    xvfb-run -a -s "-screen 0 1400x1000x24" python benchmarks/plugin.py

Opening is measured in fresh processes, beside napari alone; standing still by a timer of 20 ms (its longest gap), in a
window with the generated nuclei. Memory is that of the process with the same nuclei. Each the median of three. A stroke
is drawn into the annotations of a series, without a window; of eight the fastest, for each event of the mouse.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

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
    if sys.argv[1:] == ["gaps"]:
        print(json.dumps(measure_gaps()))
        return
    if sys.argv[1:] == ["memory"]:
        print(json.dumps(measure_memory()))
        return
    opened = [_last_line([sys.executable, "-c", OPENING]).split() for _ in range(RUNS)]
    alone, dock = (statistics.median(float(run[k]) for run in opened) for k in (0, 1))
    print(f"napari alone {alone:.2f} s, the dock {dock:.2f} s more; torch loaded: {opened[0][2]}")
    gaps = [json.loads(_last_line([sys.executable, __file__, "gaps"])) for _ in range(RUNS)]
    for phase in gaps[0]:
        print(f"{phase}: the longest gap {1000 * statistics.median(run[phase] for run in gaps):.0f} ms")
    held = [json.loads(_last_line([sys.executable, __file__, "memory"])) for _ in range(RUNS)]
    for phase in held[0]:
        print(f"{phase}: {statistics.median(run[phase] for run in held):.0f} MB")
    print(f"a stroke: {1000 * measure_stroke():.1f} ms for each event of the mouse")


def measure_gaps() -> dict[str, float]:
    """The longest gap of a 20 ms timer, in seconds, by what was going on; what begins it is part of it."""
    import napari
    from qtpy.QtCore import QTimer
    from qtpy.QtWidgets import QApplication

    from distillfss_core import DistillSettings, generate_sample
    from napari_distillfss._widgets.dock import DistillDock

    viewer = napari.Viewer()
    app = QApplication.instance() or QApplication([])
    made = generate_sample(planes=12, size=384)
    viewer.add_image(made.image)
    viewer.add_labels(made.labels)  # napari's first layers take it a second or two, whoever adds them
    app.processEvents()
    viewer.layers.clear()
    folder = Path(tempfile.mkdtemp())
    dock = DistillDock(viewer, folder)
    viewer.window.add_dock_widget(dock, area="right")
    ticks: list[float] = []
    timer = QTimer()
    timer.timeout.connect(lambda: ticks.append(time.perf_counter()))
    timer.start(20)
    gaps = {}

    def during(phase: str, begin: Callable[[], object], until: Callable[[], object]) -> None:
        ticks[:] = [time.perf_counter()]
        begin()
        while not until() or len(ticks) < 6:
            app.processEvents()
            time.sleep(0.001)
        gaps[phase] = float(np.diff(ticks).max())

    def add_image() -> None:
        viewer.add_image(made.image, name="nuclei")

    def nothing() -> None:
        pass

    during("a volume is chosen, torch loaded", add_image, lambda: "Computes" in dock.volume.device.text())
    during("slices are suggested", dock.support.suggest_slices, lambda: not dock.support.selecting.running)
    assert dock.session.annotations is not None  # the suggestion made them
    for z in dock.support.suggested:
        dock.session.annotations.put(z, (made.labels[z] > 0).astype(np.uint8) + 1)
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
    viewer.close()
    return gaps


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
