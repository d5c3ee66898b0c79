"""The dock in napari's own window."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import zarr
from qtpy.QtCore import QEvent, QPointF, Qt, QTimer
from qtpy.QtGui import QMouseEvent, QOpenGLContext
from qtpy.QtOpenGLWidgets import QOpenGLWidget
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def window(display, make_napari_viewer):
    return make_napari_viewer()


@pytest.fixture
def docked(window, open_dock, few):
    dock = open_dock(window)
    window.window.add_dock_widget(dock, name="DistillFSS", area="right")
    dock.distill.settings.setValue(few)
    return dock


def test_the_menus_lead_to_the_dock(display, npe2pm, make_napari_viewer, root, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    from npe2 import PluginManifest

    npe2pm.register(PluginManifest.from_file(root / "src" / "napari_distillfss" / "napari.yaml"))
    viewer = make_napari_viewer()
    from napari._app_model import get_app_model

    menus = get_app_model().menus
    in_segment = {item.command.id for item in menus.get_menu("napari/layers/segment") if hasattr(item, "command")}
    assert {"napari-distillfss.dock", "napari-distillfss.apply_dock"} <= in_segment
    plugins = {item.title for item in menus.get_menu("napari/plugins") if hasattr(item, "submenu")}
    assert "DistillFSS" in plugins
    _, dock = viewer.window.add_plugin_dock_widget("napari-distillfss", "Label, distill, segment")
    dock.session.close()


def test_nothing_is_cut_off_at_the_width_of_the_dock(docked, window):
    window.add_image(np.zeros((2, 3, 4, 64, 64)), name="a long name of an image that does not fit in any box")
    docked.distill.settings.more.setCurrentIndex(1)
    for section in docked.sections.values():
        section.heading.setChecked(True)
    docked.objects.table.show()
    bar = docked.verticalScrollBar().sizeHint().width()
    assert docked.widget().minimumSizeHint().width() + bar <= docked.minimumWidth()


def test_the_window_stays_alive_while_distilling_and_applying(
    docked, window, sample, painted_truth, few, qtbot, tmp_path
):
    docked.distill.settings.setValue(replace(few, steps=20))
    window.add_image(np.tile(sample.image, (8, 2, 2)), name="nuclei")
    for z in (1, 5):
        docked.session.annotations.put(z, np.tile(painted_truth[z], (2, 2)))
    docked.session.painted()
    docked.support.paint.click()  # napari's first labels layer takes it a moment
    docked.distill.start()
    qtbot.waitUntil(lambda: bool(docked.distill.plot.losses), timeout=120_000)  # torch is loaded by now
    docked.apply.out.setText(str(tmp_path / "o.ome.zarr"))
    ticks = []
    timer = QTimer()
    timer.timeout.connect(lambda: ticks.append(None))
    timer.start(1)
    for start in (lambda: None, docked.apply.start):
        start()
        ticks.clear()
        qtbot.waitUntil(lambda: not docked.session.busy, timeout=120_000)
        assert len(ticks) > 3  # other work may hold the cores, so no time is asked for; the bench measures the gaps
    timer.stop()


def test_closing_the_window_while_distilling_ends_the_work(
    display, make_napari_viewer, qtbot, sample, painted_truth, few, tmp_path
):
    from napari_distillfss._widgets.dock import DistillDock

    viewer = make_napari_viewer()
    viewer.add_image(sample.image, name="nuclei")
    dock = DistillDock(viewer, tmp_path)
    viewer.window.add_dock_widget(dock, name="DistillFSS", area="right")
    dock.session.annotations.put(1, painted_truth[1])
    dock.session.painted()
    dock.distill.settings.setValue(replace(few, steps=100_000))
    dock.distill.start()
    qtbot.waitUntil(lambda: bool(dock.distill.plot.losses), timeout=120_000)
    session = dock.session
    with qtbot.waitSignal(dock.destroyed):
        viewer.window.remove_dock_widget(dock)
        dock.deleteLater()
    qtbot.waitUntil(lambda: not any("distillfss" in t.name for t in threading.enumerate()), timeout=60_000)
    assert session.annotations is None


@pytest.fixture
def drawn(display, make_napari_viewer, open_dock, few):
    """A shown window with the dock; a crash of the drawing ends the process."""
    viewer = make_napari_viewer(show=True)
    dock = open_dock(viewer)
    viewer.window.add_dock_widget(dock, name="DistillFSS", area="right")
    dock.distill.settings.setValue(few)
    return viewer, dock


def test_the_canvas_is_current_when_a_layer_is_removed(drawn):
    """Otherwise napari may crash at a later draw."""
    viewer, dock = drawn
    layer = viewer.add_image(np.zeros((4, 32, 32)))
    QApplication.processEvents()
    (canvas,) = dock.window().findChildren(QOpenGLWidget)
    canvas.doneCurrent()
    assert QOpenGLContext.currentContext() is None
    contexts = []
    viewer.layers.events.removed.connect(lambda: contexts.append(QOpenGLContext.currentContext()))
    viewer.layers.remove(layer)
    assert contexts == [canvas.context()]


def wait_for_preview(qtbot, dock):
    qtbot.waitUntil(lambda: not dock.preview.busy and not dock.session.busy, timeout=60_000)
    qtbot.wait(200)  # so that it is drawn


def test_the_preview_is_switched_off_and_on_after_a_step_of_z_without_a_new_layer(drawn, qtbot, sample, student):
    viewer, dock = drawn
    viewer.add_image(sample.image, name="nuclei")
    dock.support.go_to(2)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    layer = dock.preview.layers["labels"]
    for z in (3, 4, 5, 3):
        dock.support.go_to(z)  # the layer is out of the slice until the plane is computed
        dock.preview.on.setChecked(False)
        qtbot.wait(100)
        assert layer in viewer.layers
        assert not layer.visible
        dock.preview.on.setChecked(True)
        wait_for_preview(qtbot, dock)
        assert dock.preview.layers == {"labels": layer}
        assert layer.data_to_world((0, 0, 0))[0] == z
        expected = dock.session.model.predict(sample.image[z]).labels
        np.testing.assert_array_equal(layer.data[0], expected)


@pytest.mark.parametrize("letter", ["t", "c"])
def test_another_time_or_channel_moves_the_layers_of_preview_and_annotations(letter, drawn, qtbot, sample, student):
    viewer, dock = drawn
    image = np.stack([sample.image, sample.image[::-1], sample.image])
    viewer.add_image(image, name="nuclei", axis_labels=(letter, "z", "y", "x"))
    dock.volume.lead[letter].setValue(0)
    dock.support.paint.click()
    dock.session.annotations.put(3, np.ones((96, 96), np.uint8))
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    preview, annotations = dock.preview.layers["labels"], dock.support.layer
    for at in (1, 2, 0, 1, 0):
        viewer.dims.set_current_step(0, at)
        qtbot.wait(100)
        dock.volume.lead[letter].setValue(at)
        wait_for_preview(qtbot, dock)
        dock.support.paint.click()
        assert dock.preview.layers == {"labels": preview}
        assert dock.support.layer is annotations
        assert [sum(layer is kept for layer in viewer.layers) for kept in (preview, annotations)] == [1, 1]
        assert annotations.data_to_world((0, 0, 0, 0))[0] == at
        assert bool(np.asarray(annotations.data[0, 3]).any()) is (at == 0)
        plane = image[at, dock.preview.plane]
        np.testing.assert_array_equal(preview.data[0, 0], dock.session.model.predict(plane).labels)
        viewer.screenshot()


def test_volumes_of_other_shapes_take_over_the_layers(drawn, qtbot, sample, student):
    viewer, dock = drawn
    viewer.add_image(sample.image, name="stack")
    viewer.add_image(np.stack([sample.image] * 2), name="series", scale=(1, 2, 0.5, 0.5))
    viewer.add_image(sample.image[3], name="plane", translate=(5, 6))
    dock.support.paint.click()
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    preview, annotations = dock.preview.layers["labels"], dock.support.layer
    for name in ("series", "plane", "stack", "plane", "series"):
        row = dock.volume.layers.findText(name)
        dock.volume.layers.setCurrentIndex(row)
        dock.volume.layers.activated.emit(row)
        wait_for_preview(qtbot, dock)
        dock.support.fill_rest()
        assert dock.support.layer is annotations
        assert dock.preview.layers == {"labels": preview}
        extent = viewer.layers[name].extent.world
        np.testing.assert_array_equal(annotations.extent.world[:, -2:], extent[:, -2:])
        np.testing.assert_array_equal(preview.extent.world[:, -2:], extent[:, -2:])
        dock.support.layer.undo()  # only what was painted in this volume
        assert not dock.session.annotations.planes()
        dock.support.layer.undo()
        assert not dock.session.annotations.planes()
        viewer.screenshot()


def draw(viewer, start, end):
    """Draw a line with the mouse between two points (y, x) of the world."""
    canvas = viewer.window._qt_viewer.canvas
    transform = canvas.view.transform * canvas.view.scene.transform
    begin, finish = (np.array(transform.map([x, y])[:2]) for y, x in (start, end))
    left, none = Qt.MouseButton.LeftButton, Qt.MouseButton.NoButton
    strokes = [(QEvent.Type.MouseButtonPress, 0, left, left), (QEvent.Type.MouseMove, 0.5, none, left),
               (QEvent.Type.MouseMove, 1, none, left), (QEvent.Type.MouseButtonRelease, 1, left, none)]  # fmt: skip
    for kind, part, button, held in strokes:
        at = QPointF(*(begin + part * (finish - begin)))
        everywhere = QPointF(canvas.native.mapToGlobal(at.toPoint()))
        event = QMouseEvent(kind, at, everywhere, button, held, Qt.KeyboardModifier.NoModifier)
        QApplication.sendEvent(canvas.native, event)
        QTest.qWait(10)  # napari drops moves of the mouse that follow within 5 ms


@pytest.mark.parametrize("letter", ["t", "c"])
def test_a_stroke_right_after_a_slider_lies_where_the_slider_is(letter, drawn, qtbot, sample):
    viewer, dock = drawn
    viewer.add_image(np.stack([sample.image] * 3), name="nuclei", axis_labels=(letter, "z", "y", "x"))
    dock.support.paint.click()
    strokes = [(2, 5), (0, 1), (1, 4), (0, 3), (2, 0)]
    for at, z in strokes:
        viewer.dims.set_current_step((0, 1), (at, z))
        draw(viewer, (40, 40), (40, 60))
        assert dock.support.layer.data_to_world((0, 0, 0, 0))[0] == at
        np.testing.assert_array_equal(dock.session.annotations.plane(z)[40, 40:61:5], 2)
    for at in range(3):
        dock.volume.lead[letter].setValue(at)
        assert dock.session.annotations.planes() == sorted(z for there, z in strokes if there == at)


def test_a_button_right_after_a_slider_acts_where_the_slider_is(drawn, qtbot, sample):
    viewer, dock = drawn
    viewer.add_image(np.stack([sample.image] * 3), name="nuclei", axis_labels=("t", "z", "y", "x"))
    viewer.dims.set_current_step(0, 2)
    qtbot.mouseClick(dock.support.rest, Qt.MouseButton.LeftButton)
    assert dock.volume.lead["t"].value() == 2
    assert dock.session.annotations.planes() == [dock.support.plane()]


@pytest.mark.parametrize("z", [1, 12])
def test_where_the_volume_has_no_plane_nothing_is_painted(z, drawn, sample):
    viewer, dock = drawn
    viewer.add_image(sample.image, name="nuclei", translate=(2, 0, 0))
    viewer.add_image(np.zeros((20, 96, 96)), name="longer")
    dock.volume.layers.setCurrentIndex(0)
    dock.volume.layers.activated.emit(0)
    dock.support.paint.click()
    viewer.dims.set_current_step(0, z)
    draw(viewer, (40, 40), (40, 60))
    assert dock.session.annotations.planes() == []
    assert "not on screen" in dock.support.message.text()
    viewer.dims.set_current_step(0, 3)
    dock.support.paint.click()
    draw(viewer, (40, 40), (40, 60))
    assert dock.session.annotations.planes() == [1]


def test_a_stroke_is_on_disk_after_each_event_of_the_mouse_and_written_once_in_it(drawn, sample, monkeypatch):
    from napari_distillfss._painted import PaintedArray

    viewer, dock = drawn
    viewer.add_image(np.stack([sample.image] * 2), name="nuclei", axis_labels=("t", "z", "y", "x"))
    dock.support.paint.click()
    dock.support.layer.brush_size = 3
    writes, write = [], PaintedArray._write
    monkeypatch.setattr(PaintedArray, "_write", lambda self, *args: (writes.append(1), write(self, *args))[1])
    seen = []

    def look(layer, event):
        yield
        while event.type == "mouse_move":
            folder, z = dock.session.annotations.folder, dock.support.plane()
            seen.append(np.count_nonzero(zarr.open_array(folder / "labels.zarr", mode="r")[0, z]))
            yield

    dock.support.layer.mouse_drag_callbacks.append(look)
    draw(viewer, (20, 20), (70, 70))
    assert 1 <= len(writes) <= 3  # the press, and two moves of many dabs
    painted = np.count_nonzero(dock.session.annotations.plane(dock.support.plane()))
    assert seen[-1] == painted > 150
    dock.support.layer.undo()
    assert dock.session.annotations.planes() == []
    dock.session.close()
    dock.support.layer.paint((0, 2, 40, 40), 2, refresh=False)  # without the dock, each dab is written
    assert len(writes) > 4
