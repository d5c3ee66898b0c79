"""Volumes are opened in another thread: the window goes on, Cancel works, and errors are one line."""

import threading
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import tifffile
import zarr
from napari.layers import Image
from napari.utils.notifications import notification_manager
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QPushButton

from distillfss_core import DistillFSSError, Volume
from napari_distillfss import _reader
from napari_distillfss._layers import hold_shown, layer_of_file
from napari_distillfss._widgets import volume
from napari_distillfss._widgets._common import JobBar


@pytest.fixture
def stack(tmp_path, sample):
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, sample.image, photometric="minisblack", metadata={"axes": "ZYX"})
    return path


@pytest.fixture
def slow(monkeypatch, qtbot):
    """A reader that is held until the event is set, where the name of the file is not "quick.tif"."""
    go_on, reading = threading.Event(), []

    def read(path):
        reading.append(Path(path).name)
        if reading[-1] != "quick.tif":
            assert go_on.wait(60)
        return layer_of_file(path)

    monkeypatch.setattr(volume, "layer_of_file", read)
    go_on.reading = reading
    yield go_on
    go_on.set()
    wait_for_threads(qtbot)


@pytest.fixture
def hashing(monkeypatch, qtbot):
    """Small arrays are hashed like large ones. Hashing waits for the event; `threads` are those it was done in."""
    go_on, identity = threading.Event(), Volume.identity
    go_on.threads = []

    def look(self):
        if threading.current_thread() is not threading.main_thread():
            go_on.threads.append(threading.current_thread())
            assert go_on.wait(60)
        return identity.fget(self)

    monkeypatch.setattr(volume, "_QUICK", 0)
    monkeypatch.setattr(Volume, "identity", property(look))
    yield go_on
    go_on.set()
    wait_for_threads(qtbot)


def choose(dock, name):
    """As the user does."""
    index = dock.volume.layers.findText(name)
    dock.volume.layers.setCurrentIndex(index)
    dock.volume.layers.activated.emit(index)


def wait_for_threads(qtbot):
    qtbot.waitUntil(lambda: not any("Opening" in t.name for t in threading.enumerate()), timeout=60_000)


def test_the_window_goes_on_while_a_slow_volume_is_opened(viewer, open_dock, qtbot, stack, slow, sample):
    dock = open_dock(viewer)
    ticks = []

    def tick():
        ticks.append(bar.text.text())
        if len(ticks) == 5:
            slow.set()

    (bar,) = dock.volume.findChildren(JobBar)
    dock.volume.open_path(stack)
    qtbot.waitUntil(lambda: slow.reading == ["stack.tif"])
    timer = QTimer()
    timer.timeout.connect(tick)
    timer.start(1)
    qtbot.waitUntil(lambda: dock.volume.value() is not None, timeout=60_000)
    assert len(ticks) >= 5  # the reader has waited for these
    assert ticks[4] == f"Opening {stack}"
    chosen = dock.volume.value()
    assert chosen.volume.path == stack
    assert chosen.layer is viewer.layers["stack.tif"]
    np.testing.assert_array_equal(chosen.volume.plane(3), sample.image[3])
    assert chosen.layer.contrast_limits[1] > chosen.layer.contrast_limits[0]
    assert dock.session.annotations is not None


def test_a_volume_is_opened_once(viewer, open_dock, open_path, stack, monkeypatch):
    """The window's thread takes the volume as the other thread has opened it."""
    opened_in = []
    choose = volume.choose_layer

    def spy(*args, **options):
        opened_in.append(threading.current_thread())
        return choose(*args, **options)

    monkeypatch.setattr(volume, "choose_layer", spy)
    open_path(open_dock(viewer), stack)
    assert len(opened_in) == 1
    assert opened_in[0] is not threading.main_thread()


def test_opening_is_cancelled_at_once_and_shows_nothing_later(viewer, open_dock, qtbot, stack, slow):
    dock = open_dock(viewer)
    (bar,) = dock.volume.findChildren(JobBar)
    (cancel,) = bar.findChildren(QPushButton)
    dock.volume.open_path(stack)
    qtbot.waitUntil(lambda: bool(slow.reading))
    cancel.click()
    assert not dock.volume.opening.running
    assert dock.volume.message.text() == "Stopped; nothing was opened"
    slow.set()
    wait_for_threads(qtbot)
    qtbot.wait(50)
    assert not viewer.layers
    assert dock.volume.value() is None


def test_of_two_volumes_the_one_that_was_wanted_last_is_opened(viewer, open_dock, qtbot, stack, slow):
    dock = open_dock(viewer)
    quick = stack.with_name("quick.tif")
    quick.write_bytes(stack.read_bytes())
    dock.volume.open_path(stack)
    qtbot.waitUntil(lambda: bool(slow.reading))
    dock.volume.open_path(quick)
    qtbot.waitUntil(lambda: dock.volume.value() is not None, timeout=60_000)
    slow.set()
    wait_for_threads(qtbot)
    qtbot.wait(50)
    assert [layer.name for layer in viewer.layers] == ["quick.tif"]


def test_a_dock_that_was_closed_opens_nothing(viewer, open_dock, qtbot, stack, slow):
    dock = open_dock(viewer)
    dock.volume.open_path(stack)
    qtbot.waitUntil(lambda: bool(slow.reading))
    dock.session.close()
    slow.set()
    qtbot.waitUntil(lambda: not dock.volume.opening.running, timeout=60_000)
    assert not viewer.layers


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_cannot_be_opened_is_one_line_and_notified_where_the_dock_is_not_seen(
    kind, viewer, open_dock, open_path, tmp_path
):
    notification_manager.records.clear()
    dock = open_dock(viewer)
    path = tmp_path / "none.tif" if kind == "file" else tmp_path
    open_path(dock, path)
    message = dock.volume.message
    assert message.warns
    assert str(path) in message.text()
    (notified,) = [record.message for record in notification_manager.records]
    assert notified == f"DistillFSS: Opening of a volume has failed: {message.text()}"
    assert "\n" not in notified
    assert not viewer.layers


def test_naparis_own_file_dialog_reads_in_another_thread(qtbot, tmp_path, monkeypatch):
    from volumes import noise, write_ome_zarr

    write_ome_zarr(tmp_path / "a.ome.zarr", noise((3, 16, 16)))
    threads = []

    def spy(*args, **options):
        threads.append(threading.current_thread())
        return layer_of_file(*args, **options)

    monkeypatch.setattr(_reader, "layer_of_file", spy)
    path = str(tmp_path / "a.ome.zarr")
    ((_, options, kind),) = _reader.get_reader(path)(path)
    assert (kind, options["name"]) == ("image", "a.ome.zarr")
    assert threads
    assert threading.main_thread() not in threads
    with pytest.raises(DistillFSSError):
        _reader.get_reader("none.zarr")("none.zarr")


@pytest.fixture
def files(tmp_path):
    """A stack, a series and a pyramid, with their images."""
    rng = np.random.default_rng(0)
    series = rng.integers(0, 255, (3, 9, 64, 48), np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", series[0], metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "series.ome.tif", series, metadata={"axes": "TZYX"})
    group = zarr.open_group(tmp_path / "pyramid.zarr", mode="w", zarr_format=2)
    for n in (1, 2):
        group.create_array(str(n), data=np.ascontiguousarray(series[0][:, ::n, ::n]))
    scales = [{"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": [2, n, n]}]} for n in (1, 2)]
    axes = [{"name": a, "type": "space"} for a in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": scales}]
    return {
        tmp_path / "stack.tif": series[0],
        tmp_path / "series.ome.tif": series,
        tmp_path / "pyramid.zarr": series[0],
    }


@pytest.mark.parametrize("number", range(3))
def test_napari_reads_nothing_when_a_layer_of_a_file_is_added(number, files, viewer, monkeypatch):
    path, image = list(files.items())[number]
    reads, read = [], Volume.__getitem__
    monkeypatch.setattr(Volume, "__getitem__", lambda self, key: (reads.append(key), read(self, key))[1])
    for point in (None, 2.0):
        if point is not None:
            viewer.dims.set_point(viewer.dims.ndim - 3, point)
        levels, options = layer_of_file(path)
        held = hold_shown(levels, options, None if point is None else viewer.dims.point)
        assert [level.name for level in held] == [level.name for level in levels]
        layer = Image(held if options["multiscale"] else held[0], **options)
        assert reads
        reads.clear()
        viewer.add_layer(layer)
        assert reads == []
        index = tuple(round(x) for x in layer.world_to_data(viewer.dims.point)[:-2])
        data = layer.data[0] if options["multiscale"] else layer.data
        np.testing.assert_array_equal(np.asarray(data[index]), image[index])
        np.testing.assert_array_equal(np.asarray(data), image)


@pytest.mark.parametrize("kind", ["array", "dask", "NaN"])
def test_a_large_array_is_hashed_in_another_thread(kind, viewer, open_dock, qtbot, hashing, sample):
    image = sample.image.astype(np.float32)
    image[0, 0, 0] = np.nan if kind == "NaN" else 0
    dock = open_dock(viewer)
    viewer.add_image(da.from_array(image) if kind == "dask" else image, name="large")
    viewer.add_image(image[1:], name="later")
    (bar,) = dock.volume.findChildren(JobBar)
    qtbot.waitUntil(lambda: bar.text.text() == "Reading large")
    assert dock.volume.value() is None
    assert dock.volume.layers.currentText() == "large"
    hashing.set()
    qtbot.waitUntil(lambda: dock.volume.value() is not None)
    assert dock.volume.value().name == "large"
    dock.session.annotations.put(2, np.full(image.shape[1:], 2, np.uint8))
    kept = dock.session.annotations.folder
    choose(dock, "later")
    qtbot.waitUntil(lambda: dock.volume.value().name == "later")
    assert dock.session.annotations.planes() == []
    choose(dock, "large")
    assert dock.volume.value().name == "large"  # known, so at once
    assert dock.session.annotations.folder == kept
    assert dock.session.annotations.planes() == [2]
    assert len(hashing.threads) == 2
    assert [layer.name for layer in viewer.layers][:2] == ["large", "later"]


def test_the_volume_of_before_stays_until_a_large_one_is_hashed(viewer, open_dock, qtbot, hashing, sample, monkeypatch):
    monkeypatch.setattr(volume, "_QUICK", sample.image.nbytes)
    dock = open_dock(viewer)
    viewer.add_image(sample.image, name="small")
    viewer.add_image(np.concatenate([sample.image] * 2), name="large")
    viewer.add_image(np.concatenate([sample.image] * 3), name="larger")
    assert dock.volume.value().name == "small"
    (bar,) = dock.volume.findChildren(JobBar)
    (cancel,) = bar.findChildren(QPushButton)
    choose(dock, "large")
    qtbot.waitUntil(lambda: len(hashing.threads) == 1)
    assert dock.volume.value().name == dock.session.volume.name == "small"
    cancel.click()
    assert dock.volume.layers.currentText() == "small"
    choose(dock, "large")
    choose(dock, "larger")
    assert dock.volume.layers.currentText() == "larger"
    viewer.layers.remove("larger")
    assert dock.volume.layers.currentText() == "small"
    assert not dock.volume.opening.running
    choose(dock, "large")
    choose(dock, "small")
    assert not dock.volume.opening.running
    hashing.set()
    wait_for_threads(qtbot)
    qtbot.wait(50)
    assert dock.volume.value().name == dock.session.volume.name == "small"
    choose(dock, "large")
    qtbot.waitUntil(lambda: dock.session.volume.name == "large")
    assert viewer.layers["large"].visible


def test_a_large_series_is_hashed_once_for_all_time_points(viewer, open_dock, qtbot, hashing, sample):
    hashing.set()
    dock = open_dock(viewer)
    viewer.add_image(np.stack([sample.image] * 3), name="series")
    qtbot.waitUntil(lambda: dock.volume.value() is not None)
    for time in (2, 1):
        dock.volume.lead["t"].setValue(time)
        assert dock.volume.value().lead == {"t": time}
        assert dock.session.volume.lead == {"t": time}
    assert len(hashing.threads) == 1
