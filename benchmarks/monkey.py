"""Random gestures in napari's own window with the dock: is a stroke lost, what fails, how long does it stand still?

    python benchmarks/monkey.py --seeds 1,2,3 --gestures 200 -o monkey.jsonl

Each seed is a process of its own with generated images (planes, stacks, colors, a pyramid, time and channels). After
each gesture the annotations on disk are compared with what is known of them. After a stroke, its pixels are looked up
on disk, in the layer and in the list. A process that ends by a signal, or stands still for minutes, is a fault. The
time is the longest gap of a timer of 20 ms. With --stacks, samples of the window's stack are counted by place.

Needs a screen, or Xvfb. Without a window manager the window keeps its first size.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import zarr

PLANES, SIZE = 6, 192
STUCK = 240  # seconds of one gesture until the process is given up
LATE = 0.06  # seconds without a tick, from which stacks are counted
SECONDS = 20  # until a stroke has to be on disk, in the layer and in the list
REST = 0.7  # seconds that suffice for what the dock does a moment later
MARK = 8  # pixels of a corner that tell which plane is shown
WEIGHTS = {
    "stroke": 16,
    "slide": 8,
    "slide, then stroke": 14,
    "slide, then fill rest": 3,
    "stroke, undo, redo": 4,
    "undo or redo": 3,
    "class": 4,
    "visibility": 3,
    "add a layer": 3,
    "remove a layer": 2,
    "order of layers": 2,
    "rename a layer": 2,
    "volume": 4,
    "channel or time in the dock": 4,
    "preview": 3,
    "source of the preview": 1,
    "train": 2,
    "apply": 1,
    "suggest": 2,
    "import": 2,
    "2-D or 3-D": 2,
    "close and open the dock": 1,
    "outline": 6,
    "correct": 2,
    "refine": 1,
    "count": 1,
    "earlier models": 1,
    "batch": 1,
    "apply dock": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1", help="comma-separated")
    parser.add_argument("--gestures", type=int, default=200, help="of each seed")
    parser.add_argument("--only", default="", help="gestures, comma-separated with semicolons (default: all)")
    parser.add_argument("--stacks", action="store_true", help="print where the window stood still")
    parser.add_argument("-o", "--output", type=Path, help="file of rows to append to")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        Monkey(args.process, int(args.seeds), args.only.split(";") if args.only else list(WEIGHTS)).run(args.gestures)
        return
    if not os.environ.get("DISPLAY") and sys.platform == "linux":
        if shutil.which("xvfb-run") is None:
            sys.exit("needs a screen: install xvfb")
        screen = "-screen 0 1400x1000x24"
        os.execvp("xvfb-run", ["xvfb-run", "-a", "-s", screen, sys.executable, *sys.argv])
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        for seed in args.seeds.split(","):
            for row in rows_of(Path(name), seed, args):
                rows.append(row)
                if args.output:
                    with open(args.output, "a") as file:
                        file.write(json.dumps(row) + "\n")
    report(rows, with_stacks=args.stacks)
    sys.exit(any(row["faults"] for row in rows))


def few() -> Any:
    """Settings of a training that takes a second."""
    from distillfss_core import DistillSettings

    return DistillSettings(steps=6, crops=4, queries=1, shots=1, crop_size=64, zoom=Fraction(1))


def make_inputs(folder: Path) -> None:
    """A student that learned next to nothing, and a stack as a file."""
    from distillfss_core import AnnotatedSlice, SupportSet, distill, generate_sample, write_labels

    sample = generate_sample(planes=2, size=96)
    pairs = zip(sample.image, sample.labels, strict=True)
    slices = [AnnotatedSlice(image, (labels > 0).astype(np.uint8)) for image, labels in pairs]
    distill(SupportSet(slices, planes_of_one_volume=True), few()).save(folder / "student.safetensors")
    write_labels(folder / "file.tif", numbered(stack()))


def rows_of(folder: Path, seed: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one process; one that has ended by a signal or an error gets a last row that says so."""
    command = [sys.executable, "-X", "faulthandler", os.path.abspath(__file__), "--process", str(folder)]
    command += ["--seeds", seed, "--gestures", str(args.gestures), "--only", args.only]
    began = {"gesture": "open the window"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            if "faults" in row:
                print(json.dumps({name: value for name, value in row.items() if name != "stacks"}), file=sys.stderr)
                yield row
            else:
                began = row
        code = process.wait()
        if code:
            errors.seek(0)
            end = {"seed": int(seed), "gap": 0.0, "faults": [f"the process ended with {code}: {errors.read()[:3000]}"]}
            print(json.dumps(began | end), file=sys.stderr)
            yield began | end


def report(rows: list[dict[str, Any]], *, with_stacks: bool) -> None:
    """Print gaps by kind of gesture, where the window stood still, and the faults."""
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["gesture"]].append(row)
    print("| gesture | number | gap, median ms | longest | of it ours, median ms | longest | faults |")
    print("|---|---|---|---|---|---|---|")
    for kind, those in sorted(by_kind.items()):
        gaps, faults = [1000 * row["gap"] for row in those], sum(bool(row["faults"]) for row in those)
        ours = [1000 * row.get("ours", 0) for row in those]
        figures = [f"{figure(times):.0f}" for times in (gaps, ours) for figure in (statistics.median, max)]
        print(f"| {kind} | {len(those)} | {' | '.join(figures)} | {faults} |")
    for kind, those in sorted(by_kind.items()) if with_stacks else ():
        counts = sum((Counter(row.get("stacks", {})) for row in those), Counter[str]())
        for place, count in counts.most_common(12):
            print(f"{kind}: {10 * count / len(those):.0f} ms each in {place}")
    for row in rows:
        for fault in row["faults"]:
            print(f"seed {row['seed']}, {row.get('number')}, {row['gesture']} ({row.get('what', '')}): {fault}")


# images


def stack() -> np.ndarray:
    from distillfss_core import generate_sample

    return np.asarray(generate_sample(planes=PLANES, size=SIZE).image)


def numbered(image: np.ndarray, *, planes: int = 2) -> np.ndarray:
    """Write the number of each plane into its corner."""
    result = image.copy()
    lead = result.shape[: result.ndim - planes]
    for number, index in enumerate(np.ndindex(*lead)):
        result[(*index, slice(MARK), slice(MARK))] = number + 1
    return result


def images() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Data and keywords of image layers by name; "series" has time, channels and z."""
    import dask.array as da

    one = stack()
    series = np.stack([np.stack([one, 255 - one]), np.stack([one[::-1], one[:, ::-1]])])
    fine = numbered(one.repeat(2, 1).repeat(2, 2))
    return {
        "series": (numbered(series), {"axis_labels": ("t", "c", "z", "y", "x"), "scale": (1, 1, 2, 1, 1)}),
        "stack": (numbered(one[:, ::-1]), {}),
        "plane": (numbered(one[2]), {"scale": (0.5, 0.5), "translate": (3, 4)}),
        "colors": (numbered(np.stack([one, one[::-1], 255 - one], -1), planes=3), {"rgb": True}),
        "pyramid": ([fine, fine[:, ::2, ::2]], {"multiscale": True, "scale": (1, 0.5, 0.5)}),
        "lazy": (da.from_array(numbered(series[:, 1]), chunks=(1, 1, SIZE, SIZE)), {"translate": (0, 1, 0, 0)}),
    }


class Stacks:
    """Samples where the window's thread is, every 10 ms; counts those while its timer is late."""

    def __init__(self, ticks: list[float]) -> None:
        self._ticks, self._thread = ticks, threading.get_ident()
        self._counts: Counter[str] = Counter()
        self._longest, self._ours = 0.0, 0.0  # seconds of the longest gap, and of it in code of the plugin
        threading.Thread(target=self._run, daemon=True).start()

    def take(self) -> tuple[dict[str, int], float]:
        """Counts by place, and the seconds of the longest gap that were spent in code of the plugin."""
        taken = dict(self._counts.most_common(20)), self._ours
        self._counts, self._longest, self._ours = Counter(), 0.0, 0.0
        return taken

    def _run(self) -> None:
        since, places = 0.0, list[str]()
        while True:
            time.sleep(0.01)
            if not self._ticks:
                continue
            now, last = time.perf_counter(), self._ticks[-1]
            if last != since:
                since, places = last, []
            places.append(place_of(sys._current_frames().get(self._thread)))
            gap = now - since
            if gap > self._longest:
                self._longest = gap
                self._ours = gap * sum(place.startswith("ours") for place in places) / len(places)
            if gap > LATE:
                self._counts[places[-1]] += 1


def place_of(frame: Any) -> str:
    """The innermost function of the plugin with what it has called, or of napari, or that it draws.

    No frame is kept: its painters would outlive their pictures, and Qt crashes.
    """
    calls = []
    while frame is not None:
        path = frame.f_code.co_filename
        calls.append((path, f"{os.path.basename(path)}:{frame.f_code.co_name}"))
        frame = frame.f_back
    ours = [k for k, (path, _) in enumerate(calls) if "napari_distillfss" in path]
    if ours:
        return f"ours {calls[ours[0]][1]}" + (f" > {calls[ours[0] - 1][1]}" if ours[0] else "")
    if any(name.endswith((":paintGL", ":_draw_scene", ":draw_visual")) for _, name in calls):
        return "napari, drawing"
    napari = [name for path, name in calls if "/napari/" in path]
    return f"napari {napari[0]}" if napari else f"other {calls[0][1]}" if calls else "nothing"


def name_of(layer: Any) -> str:
    """Name of an image under which it was added; "" of layers that the dock has added."""
    remembered = layer.metadata.get("distillfss", {}).get("path")
    return str(layer.metadata.get("monkey", Path(remembered).stem if remembered else ""))


Key = tuple[str, int, int]
"""Name of an image, time point and channel: what has annotations of its own."""


class Monkey:
    """A window with the dock, and what is known of the annotations."""

    def __init__(self, inputs: Path, seed: int, only: list[str]) -> None:
        import napari
        from qtpy.QtCore import QTimer
        from qtpy.QtWidgets import QApplication

        self.inputs, self.only, self.seed = inputs, only, seed
        self.kept = Path(tempfile.mkdtemp(dir=inputs))
        self.rng = random.Random(seed)
        self.images = images()
        self.faults: list[str] = []
        self.known: dict[Key, np.ndarray] = {}
        self.folders: dict[Key, Path] = {}
        self.shapes: dict[Key, tuple[int, int, int]] = {}
        self.what = ""
        self.outputs = 0
        self.viewer = napari.Viewer(show=True)
        self.app = QApplication.instance() or QApplication([])
        self.record_faults()
        self.viewer.window._qt_window.resize(1280, 900)
        self.open_dock()
        self.add_image("series")
        self.add_image("stack")
        self.viewer.reset_view()
        self.ticks: list[float] = []
        self.stacks = Stacks(self.ticks)
        timer = self.timer = QTimer()
        timer.timeout.connect(lambda: self.ticks.append(time.perf_counter()))
        timer.start(20)

    def run(self, gestures: int) -> None:
        weights = [WEIGHTS[name] for name in self.only]
        self.run_events(1)
        for number in range(gestures):
            name = self.rng.choices(self.only, weights)[0]
            row: dict[str, Any] = {"seed": self.seed, "number": number, "gesture": name}
            print(json.dumps(row), flush=True)
            faulthandler.dump_traceback_later(STUCK, exit=True)
            self.faults, self.what = [], ""
            self.stacks.take()
            self.ticks[:] = [time.perf_counter()]
            try:
                self.perform(name)
            except Exception:  # noqa: BLE001  (a row, as every other fault)
                self.faults.append(traceback.format_exc())
            gap = float(np.diff([*self.ticks, time.perf_counter()]).max())
            stacks, ours = self.stacks.take()
            row |= {"what": self.what, "gap": round(gap, 4), "ours": round(ours, 4), "stacks": stacks}
            print(json.dumps(row | {"faults": self.faults}), flush=True)
        faulthandler.cancel_dump_traceback_later()
        self.dock.session.close()
        self.run_events(0.2)
        self.wait(lambda: not any("distillfss" in thread.name for thread in threading.enumerate()), 120)
        self.viewer.close()

    def perform(self, name: str) -> None:
        """A gesture and its checks. Where it does not paint, it may be followed by the next one at once."""
        before = self.key()
        action: Callable[[], bool | None] = getattr(self, "do_" + "".join(c if c.isalnum() else "_" for c in name))
        paints = action()
        if paints is None:
            self.run_events(self.rng.choice((0.0, 0.05, REST)))
            self.check_unchanged({})
        elif paints:
            self.run_events(REST)
            self.check_unchanged({before, self.key()})

    def record_faults(self) -> None:
        """Keep exceptions of slots and threads, warnings of napari, and messages of Qt and of loggers."""
        from napari.utils.notifications import Notification, NotificationSeverity, notification_manager
        from qtpy.QtCore import qInstallMessageHandler

        def unexpected(kind: Any, value: Any, trace: Any) -> None:
            self.faults.append("".join(traceback.format_exception(kind, value, trace)))

        def notified(notification: Notification) -> None:
            is_bad = notification.severity >= NotificationSeverity.WARNING
            if is_bad and not str(notification.message).startswith("DistillFSS:"):
                self.faults.append(f"notification: {notification.message}")

        class Handler(logging.Handler):
            def emit(_, record: logging.LogRecord) -> None:
                self.faults.append(f"log of {record.name}: {record.getMessage()}")

        def of_qt(kind: Any, _: Any, message: str | None) -> None:
            if "propagateSizeHints" not in str(message):  # there is no window manager
                self.faults.append(f"Qt: {message}")

        sys.excepthook = unexpected
        threading.excepthook = lambda args: unexpected(args.exc_type, args.exc_value, args.exc_traceback)
        notification_manager.notification_ready.connect(notified)
        for logger in ("", "vispy", "napari"):
            logging.getLogger(logger).addHandler(Handler(logging.ERROR))
        qInstallMessageHandler(of_qt)

    # the window

    def open_dock(self) -> None:
        from napari_distillfss._widgets.dock import DistillDock

        self.dock = DistillDock(self.viewer, self.kept)
        self.docked = self.viewer.window.add_dock_widget(self.dock, name="DistillFSS", area="right")
        self.dock.distill.settings.setValue(few())

    def close(self, dock: Any) -> None:
        from qtpy.QtCore import QEvent

        self.viewer.window.remove_dock_widget(dock)
        dock.deleteLater()
        self.app.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)  # processEvents leaves these to the loop

    def run_events(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while True:
            self.app.processEvents()
            if time.perf_counter() >= end:
                return
            time.sleep(0.001)

    def wait(self, until: Callable[[], object], seconds: float = SECONDS) -> bool:
        end = time.perf_counter() + seconds
        while not until():
            if time.perf_counter() > end:
                return False
            self.run_events(0.01)
        return True

    def add_image(self, name: str) -> None:
        if name == "file":
            self.dock.volume.open_path(self.inputs / "file.tif")
            if not self.wait(lambda: any(name_of(layer) == name for layer in self.viewer.layers)):
                self.faults.append(f"the file is not open: {self.dock.volume.message.text()}")
            return
        data, options = self.images[name]
        self.viewer.add_image(data, name=name, metadata={"monkey": name}, **options)

    def of_user(self) -> list[Any]:
        return [layer for layer in self.viewer.layers if name_of(layer)]

    def chosen(self) -> Any:
        """The image layer that the dock shows as chosen; None if there is none."""
        name = self.dock.volume.layers.currentText()
        return next((layer for layer in self.viewer.layers if layer.name == name), None)

    def place(self) -> tuple[Key, int] | None:
        """Image, time, channel and plane on screen, by the number in the corner; None if nothing of it is shown."""
        layer = self.chosen()
        if layer is None:
            return None
        point = np.array(self.viewer.dims.point[-layer.ndim :], float)
        point[-2:] = layer.data_to_world((0,) * (layer.ndim - 2) + (MARK // 2, MARK // 2))[-2:]
        name = name_of(layer)
        value = layer.get_value(tuple(point), world=True)
        if layer.multiscale:  # of which napari may have read the middle alone
            plane = int(np.round(layer.world_to_data(point)[0]))
            return ((name, 0, 0), plane) if 0 <= plane < PLANES else None
        if value is None:
            return None
        counts = {"series": (2, 2, PLANES), "lazy": (2, 1, PLANES), "plane": (1, 1, 1)}
        t, c, z = np.unravel_index(int(np.ravel(value)[0]) - 1, counts.get(name, (1, 1, PLANES)))
        return (name, int(t), int(c)), int(z)

    def key(self) -> Key | None:
        """What the dock has the annotations of."""
        chosen = self.dock.session.volume
        if chosen is None or self.dock.session.annotations is None:
            return None
        key = (name_of(chosen.layer), chosen.lead.get("t", 0), chosen.lead.get("c", 0))
        self.shapes[key] = (chosen.planes, *chosen.plane_shape)
        folder = self.folders.setdefault(key, self.dock.session.annotations.folder)
        if folder != self.dock.session.annotations.folder:
            self.folders[key] = self.dock.session.annotations.folder
            self.faults.append(f"annotations of {key} are in {self.dock.session.annotations.folder}, not in {folder}")
        return key

    # what is on disk

    def on_disk(self, key: Key) -> np.ndarray:
        """Annotations (z, y, x) of an image, read anew."""
        array, path = np.zeros(self.shapes[key], np.uint8), self.folders[key] / "labels.zarr"
        if path.exists():
            array[...] = np.asarray(zarr.open_array(path, mode="r")[:]).reshape(array.shape)
        return array

    def check_unchanged(self, allowed: Any) -> None:
        """Compare all annotations with what they were, but those that were painted; these are known from now on."""
        self.key()
        for key in self.folders:
            array = self.on_disk(key)
            changed = int((array != self.known.get(key, 0)).sum())
            if changed and key not in allowed:
                self.faults.append(f"{changed} pixels of {key} were changed by what does not paint there")
            self.known[key] = array

    # strokes

    def do_stroke(self) -> bool | None:
        return self.stroke(lambda: None) if self.prepare() else None

    def do_slide__then_stroke(self) -> bool | None:
        return self.stroke(lambda: self.slide(self.rng.choice((0, 1, 2)))) if self.prepare() else None

    def do_slide__then_fill_rest(self) -> bool | None:
        if not self.prepare():
            return None
        self.slide(self.rng.choice((0, 1, 2)))
        place = self.place()
        self.click(self.dock.support.rest)
        self.run_events(REST)
        if place is None:
            return True
        key, z = place
        if not self.wait(lambda: self.key() == key):
            self.faults.append(f"the dock has {self.key()}, the window shows {key}")
        if key not in self.folders or not self.on_disk(key)[z].all():
            self.faults.append(f"plane {z} of {key} is not filled")
        self.check_unchanged({key})
        return False

    def do_stroke__undo__redo(self) -> bool | None:
        if not self.prepare() or (place := self.place()) is None:
            return None
        key, before = place[0], self.known.get(place[0], np.zeros(1))
        self.stroke(lambda: None)
        after = self.known.get(key)
        for letter, wanted in (("Z", before), ("Y", after)):
            if after is None or wanted is None or (before == after).all():
                break
            self.press_key(letter)
            self.run_events(0.1)
            if (self.on_disk(key) != wanted).any():
                self.faults.append(f"undo or redo ({letter}) has not brought back {key}")
        return True

    def prepare(self) -> bool:
        """Take a tool of the annotation layer, as the user does before a stroke; in 2-D, where there is a volume."""
        layer, support = self.chosen(), self.dock.support
        if layer is None:
            return False
        layer.visible = True
        if self.viewer.dims.ndisplay == 3:
            self.viewer.dims.ndisplay = 2
            self.run_events(REST)  # the camera moves when it is drawn
        if support.layer is None or self.viewer.layers.selection.active is not support.layer:
            self.click(support.paint)
        if support.layer is None:
            self.faults.append(f"no annotation layer: {support.message.text()}")
            return False
        support.layer.visible = True
        support.layer.mode = self.rng.choice(("paint", "paint", "paint", "fill", "erase"))
        return True

    def stroke(self, move: Callable[[], object]) -> bool:
        """Move something, draw a line with the mouse at once, and look where it has gone."""
        layer = self.dock.support.layer
        label = 0 if str(layer.mode) == "erase" else int(layer.selected_label)
        start, end = self.points()
        move()
        place = self.place()
        self.draw(start, end)
        self.what += f" {layer.mode} {label} at {place}"
        if place is None:
            self.run_events(REST)
            self.check_unchanged({})
            return False
        key, z = place
        points = [start, end] if str(layer.mode) != "fill" else [end]
        wrong = self.wrong(key, z, points, label)
        if not self.wait(lambda: not self.wrong(key, z, points, label)):
            wrong = self.wrong(key, z, points, label)
            self.faults.append(f"stroke of {label} at {key}, plane {z}: {wrong}")
        self.check_unchanged({key})
        return False

    def wrong(self, key: Key, z: int, points: list[np.ndarray], label: int) -> str:
        """Why a stroke is lost; "" if it is on disk, in the layer and in the list."""
        layer = self.dock.support.layer
        if self.key() != key or layer is None:
            return f"the dock has {self.key()}"
        if self.place() != (key, z):
            self.dock.support.go_to(z)  # slices that were suggested meanwhile have moved the view
        array = self.on_disk(key)
        positions = [self.world(point) for point in points]
        pixels = [tuple(np.round(layer.world_to_data(p[-layer.ndim :])[-2:]).astype(int)) for p in positions]
        if any(array[z][pixel] != label for pixel in pixels):
            return f"on disk are {[int(array[z][pixel]) for pixel in pixels]} at {pixels}"
        shown = [layer.get_value(tuple(p[-layer.ndim :]), world=True) for p in positions]
        if any((value or 0) != label for value in shown):
            return f"the layer shows {shown}" if layer.visible else "the layer is hidden"
        items: Any = self.dock.support.list
        rows = [items.item(k) for k in range(items.count())]
        listed = {items.row_of(row).plane for row in rows if "not painted" not in row.text()} - {None}  # of others
        painted = {k for k, plane in enumerate(array) if plane.any()}
        return "" if listed == painted else f"planes {sorted(listed)} are listed, not {sorted(painted)}"

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Two points of the canvas on the chosen image, away from its borders and marks."""
        layer, canvas = self.chosen(), self.viewer.window._qt_viewer.canvas
        low, high = layer.extent.world[:, -2:]
        inside = [low + (high - low) * [self.rng.uniform(0.2, 0.8) for _ in "yx"] for _ in range(2)]
        transform = canvas.view.transform * canvas.view.scene.transform
        start, end = (np.array(transform.map([*point[::-1]])[:2]) for point in inside)
        return start.round(), end.round()

    def world(self, point: np.ndarray) -> np.ndarray:
        canvas = self.viewer.window._qt_viewer.canvas
        return np.array(canvas._map_canvas2world(tuple(point), canvas.view))

    def draw(self, start: np.ndarray, end: np.ndarray, *, with_control: bool = False) -> None:
        """Press the mouse, move it on a line, and release it."""
        from qtpy.QtCore import QEvent

        self.mouse(QEvent.Type.MouseButtonPress, start, with_control=with_control)
        for part in (0.25, 0.5, 0.75, 1.0):
            self.mouse(QEvent.Type.MouseMove, start + part * (end - start), with_control=with_control)
            self.run_events(0.006)
        self.mouse(QEvent.Type.MouseButtonRelease, end, with_control=with_control)

    def mouse(self, kind: Any, point: np.ndarray, *, with_control: bool = False) -> None:
        from qtpy.QtCore import QEvent, QPointF, Qt
        from qtpy.QtGui import QMouseEvent

        native = self.viewer.window._qt_viewer.canvas.native
        where, left, none = QPointF(*point), Qt.MouseButton.LeftButton, Qt.MouseButton.NoButton
        button = none if kind == QEvent.Type.MouseMove else left
        held = none if kind == QEvent.Type.MouseButtonRelease else left
        at = QPointF(native.mapToGlobal(where.toPoint()))
        modifiers = Qt.KeyboardModifier.ControlModifier if with_control else Qt.KeyboardModifier.NoModifier
        self.app.sendEvent(native, QMouseEvent(kind, where, at, button, held, modifiers))

    def click(self, button: Any) -> None:
        from qtpy.QtCore import Qt
        from qtpy.QtTest import QTest

        press: Any = QTest.mouseClick
        self.dock.ensureWidgetVisible(button)
        press(button, Qt.MouseButton.LeftButton)

    def press_key(self, name: str) -> None:
        """Press Enter or Escape, or undo (Z) or redo (Y) a stroke."""
        from qtpy.QtCore import Qt
        from qtpy.QtTest import QTest

        control, shift = Qt.KeyboardModifier.ControlModifier, Qt.KeyboardModifier.ShiftModifier
        keys = {
            "Enter": (Qt.Key.Key_Return, Qt.KeyboardModifier.NoModifier),
            "Escape": (Qt.Key.Key_Escape, Qt.KeyboardModifier.NoModifier),
            "Z": (Qt.Key.Key_Z, control),
            "Y": (Qt.Key.Key_Z, control | shift),
        }
        press: Any = QTest.keyClick
        press(self.viewer.window._qt_viewer.canvas.native, *keys[name])

    # other gestures

    def slide(self, axis: int) -> None:
        """Move one of the last axes before y and x: 0 is z, 1 is the channel (or time), 2 is time."""
        sliders = self.viewer.window._qt_viewer.dims.slider_widgets
        axis = self.viewer.dims.ndim - 3 - axis
        if axis < 0:
            return
        slider = sliders[axis].slider
        value = self.rng.randint(int(slider.minimum()), int(slider.maximum()))
        self.what += f" axis {axis} to {value}"
        slider.setValue(value)

    def do_slide(self) -> None:
        self.slide(self.rng.choice((0, 0, 1, 2)))

    def do_undo_or_redo(self) -> bool:
        self.press_key(self.rng.choice("ZZY"))
        return True

    def do_class(self) -> None:
        classes = self.dock.support.classes
        what = self.rng.choice(("brush", "brush", "brush", "label", "add", "remove"))
        if what == "brush":
            classes.setBrush(self.rng.randrange(classes.list.count()))
        elif what == "label" and self.dock.support.layer is not None:
            self.dock.support.layer.selected_label = self.rng.randint(1, classes.list.count())
        elif what in ("add", "remove"):
            self.click(classes.add if what == "add" and classes.list.count() < 5 else classes.remove)
        self.what = what

    def do_visibility(self) -> None:
        layer = self.rng.choice(list(self.viewer.layers))
        layer.visible = not layer.visible

    def do_add_a_layer(self) -> None:
        there = {name_of(layer) for layer in self.of_user()}
        absent = [name for name in (*self.images, "file") if name not in there]
        if absent:
            self.what = self.rng.choice(absent)
            self.add_image(self.what)

    def do_remove_a_layer(self) -> None:
        """An image of the user, or the annotation layer where its plane is shown (docs/decisions/napari.md)."""
        layers = self.of_user()
        layer = self.rng.choice(layers) if len(layers) > 1 else None
        annotations = self.dock.support.layer
        if self.rng.random() < 0.3 and annotations is not None and annotations.visible and self.place() is not None:
            layer = annotations
        if layer is not None:
            self.what = layer.name
            self.viewer.layers.remove(layer)

    def do_order_of_layers(self) -> None:
        count = len(self.viewer.layers)
        self.viewer.layers.move(self.rng.randrange(count), self.rng.randrange(count))

    def do_rename_a_layer(self) -> None:
        layer = self.rng.choice(list(self.viewer.layers))
        layer.name = f"{layer.name[:12]} {self.rng.randrange(100)}"

    def do_volume(self) -> None:
        combo = self.dock.volume.layers
        row = self.rng.randrange(max(1, combo.count()))
        combo.setCurrentIndex(row)
        combo.activated.emit(row)
        self.what = combo.currentText()

    def do_channel_or_time_in_the_dock(self) -> None:
        box = self.rng.choice([*self.dock.volume.lead.values()])
        if not box.isHidden():
            box.setValue(self.rng.randint(0, box.maximum()))

    def do_preview(self) -> None:
        preview = self.dock.preview
        if self.dock.session.model is None:
            self.dock.model.load_from(self.inputs / "student.safetensors")
        else:
            self.click(self.rng.choice((preview.on, *preview.shown.values())))

    def do_source_of_the_preview(self) -> None:
        source = self.dock.preview.source
        source.setCurrentIndex(self.rng.randrange(source.count()))
        source.activated.emit(source.currentIndex())

    def do_train(self) -> None:
        """Press Train, and perhaps Cancel; what is painted meanwhile is kept as always."""
        job = self.dock.distill.job
        if job.running:
            job.cancel()
        else:
            self.click(self.dock.distill.distill)
            self.run_events(self.rng.choice((0.0, 0.3, 2.0)))
            if self.rng.random() < 0.5:
                job.cancel()

    def do_apply(self) -> None:
        job = self.dock.apply.job
        if job.running:
            job.cancel()
        elif self.dock.session.model is not None:
            self.outputs += 1
            self.dock.apply.out.setText(str(self.kept / f"out-{self.outputs}.ome.zarr"))
            self.click(self.dock.apply.apply)
            self.run_events(self.rng.choice((0.0, 0.5, 2.0)))
            if self.rng.random() < 0.3:
                job.cancel()

    def do_suggest(self) -> None:
        self.dock.support.way.setCurrentIndex(self.rng.randrange(self.dock.support.way.count()))
        self.click(self.dock.support.suggest)

    def do_import(self) -> bool | None:
        """A plane of classes from a file."""
        chosen, place = self.dock.session.volume, self.place()
        if chosen is None or place is None or self.dock.session.busy or self.key() != place[0]:
            return None
        from distillfss_core import write_labels

        labels = np.zeros(chosen.plane_shape, np.uint8)
        labels[20:30, 20:30] = 1
        write_labels(self.kept / "plane.tif", labels)
        self.dock.support.import_labels(self.kept / "plane.tif", "classes")
        key, z = place
        self.wait(lambda: not self.dock.session.busy)
        if (self.on_disk(key)[z] != labels + 1).any():
            self.faults.append(f"the import into plane {z} of {key} is not on disk: {self.dock.support.message.text()}")
        return True

    def do_2_D_or_3_D(self) -> None:
        self.viewer.dims.ndisplay = 5 - self.viewer.dims.ndisplay

    def do_outline(self) -> bool | None:
        """Outline what is under the mouse, or in a box, and accept or drop it."""
        if not self.prepare() or (place := self.place()) is None:
            return None
        tool, key, z = self.dock.support.outline, *place
        self.dock.support.layer.mode = "paint"
        self.click(tool.on)
        if not tool.on.isChecked():
            return None  # the message has the reason
        start, end = self.points()
        is_box = self.rng.random() < 0.3
        self.draw(start, end if is_box else start, with_control=is_box)
        self.wait(lambda: not tool.busy)
        accepts, label = self.rng.random() < 0.7, self.dock.support.classes.brush()
        answer = tool.answer
        self.what = f"{'box' if is_box else 'click'} {label} at {place}, {'accepted' if accepts else 'dropped'}"
        self.press_key("Enter" if accepts else "Escape")
        is_known = accepts and answer is not None and not is_box  # a box may leave out a corner
        if is_known and not self.wait(lambda: not self.wrong(key, z, [start], label)):
            self.faults.append(f"outline of {label} at {place}: {self.wrong(key, z, [start], label)}")
        self.click(tool.on)
        self.run_events(REST)
        self.check_unchanged({key} if accepts else {})
        return False

    def do_correct(self) -> bool | None:
        """Copy the preview of the plane into its annotations."""
        preview = self.dock.preview
        if not self.prepare() or (place := self.place()) is None or not preview.take.isEnabled():
            return None
        key, z = place
        self.click(preview.take)
        is_filled = self.wait(lambda: self.key() == key and self.on_disk(key)[z].all(), 5)
        self.what = f"{place} {'filled' if is_filled else preview.message.text()}"
        return True

    def do_refine(self) -> None:
        if self.dock.distill.refine.isEnabled():
            self.click(self.dock.distill.refine)
            self.run_events(self.rng.choice((0.0, 0.3, 2.0)))

    def do_count(self) -> None:
        """Count the objects of written labels, or of a layer."""
        objects = self.dock.objects
        if objects.labels.count():
            objects.labels.setCurrentIndex(self.rng.randrange(objects.labels.count()))
            self.what = objects.labels.currentText()
            self.click(objects.count)
            self.run_events(self.rng.choice((0.0, 2.0)))

    def do_earlier_models(self) -> None:
        """Restore one of the models of the volume, or compare two."""
        history = self.dock.model.history
        paths = [student.path for student in history.students()]
        history.list.clearSelection()
        history.choose(*self.rng.sample(paths, min(len(paths), self.rng.choice((1, 2)))))
        self.click(self.rng.choice((history.restore, history.compare)))
        self.run_events(self.rng.choice((0.0, 1.0)))

    def do_batch(self) -> None:
        """Segment all image layers, and perhaps stop."""
        batch = self.dock.apply.batch
        if self.dock.session.model is not None and not batch.job.running:
            self.outputs += 1
            batch.what.setCurrentText("all image layers")
            batch.out.setText(str(self.kept / f"batch-{self.outputs}"))
            self.click(batch.run)
            self.run_events(self.rng.choice((0.0, 0.5, 3.0)))
            if self.rng.random() < 0.5:
                batch.job.cancel()

    def do_apply_dock(self) -> None:
        """Open the dock for a model that exists, use it, and close it."""
        from napari_distillfss._widgets.dock import ApplyDock

        dock = ApplyDock(self.viewer, self.kept)
        self.viewer.window.add_dock_widget(dock, name="Apply a model", area="right")
        dock.model.load_from(self.inputs / "student.safetensors")
        self.wait(lambda: dock.session.model is not None)
        dock.preview.on.setChecked(True)
        self.run_events(self.rng.choice((0.0, REST, 2.0)))
        self.close(dock)

    def do_close_and_open_the_dock(self) -> None:
        self.close(self.dock)
        self.run_events(self.rng.choice((0.0, REST)))
        self.open_dock()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
