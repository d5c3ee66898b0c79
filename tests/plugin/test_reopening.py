"""A dock that is closed leaves its layers hidden, and the next one takes them up."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from qtpy.QtCore import Qt

from distillfss_core import Proposal
from napari_distillfss._annotations import Annotations
from napari_distillfss._layers import ANNOTATIONS, PREVIEW, choose_layer
from napari_distillfss._widgets.mark import ObjectMark


def marked(viewer, mark):
    return [layer for layer in viewer.layers if layer.metadata.get(mark)]


def previewed(qtbot, dock, student):
    """Load a student, and wait for its preview."""
    dock.model.load_from(student)
    qtbot.waitUntil(lambda: dock.session.model is not None and not dock.session.busy, timeout=60_000)
    qtbot.waitUntil(lambda: "is ready" in dock.preview.message.text() and not dock.preview.busy, timeout=60_000)


def close(qtbot, dock):
    dock.session.close()
    qtbot.waitUntil(lambda: not dock.session.busy and not dock.preview.busy, timeout=60_000)


def test_preview_layers_of_a_closed_dock_are_hidden_and_used_again(viewer, nuclei, open_dock, student, qtbot):
    first = open_dock(viewer)
    first.preview.shown["uncertainty"].setChecked(True)
    first.preview.drawn_as.setCurrentText("outlines")
    previewed(qtbot, first, student)
    left = marked(viewer, PREVIEW)
    assert [layer.visible for layer in left] == [True, True]
    close(qtbot, first)
    assert [layer.visible for layer in left] == [False, False]
    assert marked(viewer, PREVIEW) == left
    second = open_dock(viewer)
    previewed(qtbot, second, student)
    assert marked(viewer, PREVIEW) == left
    shown = second.preview.layers["labels"]
    assert shown is left[0]
    assert shown.visible
    assert shown.contour == 0  # as this dock draws them
    assert not left[1].visible  # uncertainty is not ticked here
    first.session.close()  # as when napari ends
    assert shown.visible
    second.preview.shown["uncertainty"].setChecked(True)
    assert second.preview.layers["uncertainty"] is left[1]
    assert left[1].visible


def test_two_open_docks_have_layers_of_their_own(viewer, nuclei, open_dock, student, qtbot, tmp_path):
    docks = [open_dock(viewer), open_dock(viewer, tmp_path / "other")]
    for dock in docks:
        previewed(qtbot, dock, student)
    first, second = (dock.preview.layers["labels"] for dock in docks)
    assert first is not second


@pytest.mark.parametrize("is_removed", [False, True])
def test_the_ring_around_an_object_is_used_again(viewer, nuclei, is_removed):
    chosen, box = choose_layer(nuclei), ((1, 2), (3, 9), (4, 8))
    first = ObjectMark(viewer)
    first.show(chosen, box)
    ring = first.layer
    first.leave()
    assert not ring.visible
    if is_removed:
        viewer.layers.remove(ring)
    second = ObjectMark(viewer)
    second.show(chosen, box)
    assert (second.layer is ring) is not is_removed
    assert second.layer.visible
    first.hide()
    assert second.layer.visible


def test_a_proposed_outline_is_used_again(viewer, nuclei, open_dock, qtbot):
    from napari_distillfss._outlines import Draft, Outlined

    mask = np.zeros((96, 96), bool)
    mask[4:9, 5:12] = True
    answer = Outlined(Draft(2, 2), Proposal(mask, ((4, 9), (5, 12))))

    def propose(dock):
        dock.support.take_brush()
        dock.support.outline._show(answer)
        return dock.support.outline.layer

    first = open_dock(viewer)
    outline = propose(first)
    close(qtbot, first)
    assert not outline.visible
    assert propose(open_dock(viewer)) is outline
    assert outline.visible
    assert len(marked(viewer, ANNOTATIONS)) == 1


def test_a_dock_that_is_taken_out_of_its_window_gives_its_annotations_to_the_next(viewer, nuclei, open_dock, qtbot):
    """napari takes a dock that is closed out of the window; Python deletes it some time later."""
    from qtpy.QtWidgets import QDockWidget

    frame = QDockWidget()
    qtbot.addWidget(frame)
    first = open_dock(viewer)
    folder = first.session.annotations.folder
    frame.setWidget(first)
    frame.setFloating(True)
    first.support.take_brush()
    first.session.annotations.put(1, np.ones((96, 96), np.uint8))
    first.setParent(None)
    assert first.session.annotations is None
    assert not (folder / "owner").exists()
    second = open_dock(viewer)
    assert second.session.annotations.folder == folder
    assert second.session.annotations.planes() == [1]
    assert second.support.layer is marked(viewer, ANNOTATIONS)[0]
    assert len(marked(viewer, ANNOTATIONS)) == 1


def test_a_closed_dock_holds_no_models(viewer, nuclei, open_dock, student, painted_truth, qtbot):
    dock = open_dock(viewer)
    dock.session.annotations.put(1, painted_truth[1])
    dock.session.painted()
    dock.preview.on.setChecked(True)
    qtbot.waitUntil(lambda: dock.preview.model() is not None and not dock.preview.busy, timeout=60_000)
    instant = weakref.ref(dock.preview.model())
    previewed(qtbot, dock, student)
    gc.collect()
    assert instant() is None  # its features are not held while the student is used
    held = weakref.ref(dock.session.model)
    close(qtbot, dock)
    gc.collect()
    assert held() is None


def test_annotations_and_preview_lie_above_an_image_that_is_opened_later(
    viewer, nuclei, open_dock, student, qtbot, sample
):
    dock = open_dock(viewer)
    dock.support.take_brush()
    previewed(qtbot, dock, student)
    layers = viewer.layers
    later = viewer.add_image(sample.image[::-1].copy(), name="later", scale=(2.5, 1, 1), units=("um",) * 3)
    assert layers.index(dock.support.layer) < layers.index(later)
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    dock.support.take_brush()
    qtbot.waitUntil(lambda: dock.preview.layers["labels"].visible, timeout=60_000)
    assert layers.index(dock.support.layer) > layers.index(later)
    assert layers.index(dock.preview.layers["labels"]) > layers.index(later)
    assert layers.selection.active is dock.support.layer
    order = list(layers)
    dock.volume.layers.setCurrentIndex(0)
    dock.volume.layers.activated.emit(0)
    dock.support.take_brush()
    qtbot.waitUntil(lambda: dock.preview.layers["labels"].visible, timeout=60_000)
    assert list(layers) == order  # they lie above this image already


@pytest.fixture
def docked(viewer, open_dock):
    """Opens a dock within a frame, as napari does; the function that comes with it takes the dock out again."""
    from qtpy.QtWidgets import QDockWidget

    def opened():
        dock = open_dock(viewer)
        dock.frame = QDockWidget()  # it lives as long as the dock
        dock.frame.setWidget(dock)
        return dock, lambda: dock.setParent(None)

    return opened


def test_a_dock_that_is_closed_by_mistake_comes_back_with_its_session(
    viewer, nuclei, sample, docked, student, painted_truth, qtbot, tmp_path
):
    series = np.stack([sample.image[::-1], sample.image])
    viewer.add_image(series, name="series", scale=(1, 2.5, 1, 1), units=("pixel", "um", "um", "um"))
    first, close_first = docked()
    first.volume.layers.setCurrentIndex(1)
    first.volume.layers.activated.emit(1)
    first.volume.lead["t"].setValue(1)
    first.session.annotations.put(3, painted_truth[3])
    first.session.painted()
    first.support.count.setValue(3)
    first.support.way.setCurrentText("evenly")
    first.support.suggest_slices()
    previewed(qtbot, first, student)
    out = tmp_path / "elsewhere.ome.zarr"
    first.apply.out.setText(str(out))
    first.apply.start()
    qtbot.waitUntil(lambda: not first.session.busy and first.session.applied is not None, timeout=120_000)
    first.preview.source.setCurrentText("instant")
    first.preview.drawn_as.setCurrentText("outlines")
    first.preview.on.setChecked(False)
    first.distill.settings.setPreset("quick")
    first.sections[first.distill].heading.setChecked(False)
    created, layers = first.session.model.created, list(viewer.layers)
    close_first()
    assert first.session.annotations is None

    second, close_second = docked()
    assert second.volume.value().name == "series"
    assert second.session.volume.lead == {"t": 1}
    assert second.session.annotations.planes() == [3]
    assert second.support.suggested == first.support.suggested
    assert second.session.applied.out == out
    assert second.apply.out.text() == str(out)
    assert second.apply.layer is first.apply.layer
    qtbot.waitUntil(lambda: second.session.model is not None and not second.session.busy, timeout=60_000)
    assert second.session.model.created == created
    assert second.session.model_path == student
    assert second.preview.source.currentText() == "instant"
    assert second.preview.drawn_as.currentText() == "outlines"
    assert not second.preview.on.isChecked()
    assert second.distill.settings.preset.currentText() == "quick"
    assert not second.sections[second.distill].heading.isChecked()
    assert second.support.count.value() == 3
    assert list(viewer.layers) == layers
    close_second()
    assert len([layer for layer in viewer.layers if "distillfss_session" in layer.metadata]) == 1


def test_a_model_that_could_not_be_saved_is_there_again(viewer, nuclei, docked, student, qtbot):
    first, close_first = docked()
    previewed(qtbot, first, student)
    model = first.session.model
    first.session.set_model(model, path=None, training=None)
    close_first()
    second, _ = docked()
    assert second.session.model is model
    assert second.session.model_path is None
    assert second.preview.on.isChecked()


def test_a_layer_that_has_changed_since_begins_a_session_of_its_own(viewer, nuclei, docked, sample):
    series = viewer.add_image(np.stack([sample.image] * 3), name="series")
    first, close_first = docked()
    first.volume.layers.setCurrentIndex(1)
    first.volume.layers.activated.emit(1)
    first.volume.lead["t"].setValue(2)
    close_first()
    series.data = np.zeros((2, 2, 2, 8, 96, 96), np.uint8)  # of too many axes
    second, _ = docked()
    assert second.session.volume.layer is nuclei


def test_the_menu_of_napari_opens_a_closed_dock_with_its_session(
    display, npe2pm, make_napari_viewer, root, monkeypatch, tmp_path, sample
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    from npe2 import PluginManifest

    npe2pm.register(PluginManifest.from_file(root / "src" / "napari_distillfss" / "napari.yaml"))
    viewer = make_napari_viewer()
    for name in ("first", "second"):
        viewer.add_image(sample.image if name == "first" else sample.image[::-1].copy(), name=name)

    def open_by_menu():
        return viewer.window.add_plugin_dock_widget("napari-distillfss", "Label, distill, segment")

    frame, dock = open_by_menu()
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    dock.session.annotations.put(2, np.ones((96, 96), np.uint8))
    dock.session.painted()
    frame.setFloating(True)
    frame.close()  # by the frame of the system: hidden, and shown again
    assert open_by_menu() == (frame, dock)
    assert dock.session.annotations.planes() == [2]
    frame.destroyOnClose()  # by napari's button
    assert dock.session.annotations is None
    _, again = open_by_menu()
    assert again is not dock
    assert again.session.volume.name == "second"
    assert again.session.annotations.planes() == [2]
    again.session.close()


def test_labels_that_were_written_elsewhere_are_found_by_the_next_napari(
    viewer, nuclei, open_dock, painted_truth, qtbot, tmp_path
):
    import zarr

    from napari_distillfss._session import Applied

    out = tmp_path / "elsewhere.ome.zarr"
    zarr.create_array(out / "0", data=painted_truth)
    dock = open_dock(viewer)
    default = dock.apply.out.text()
    dock.session.annotations.put(1, painted_truth[1])
    dock.session.set_applied(Applied(dock.session.volume, out, "planes", None, None, ("object",)))
    close(qtbot, dock)
    again = open_dock(viewer)
    assert (again.session.applied.out, again.session.applied.is_earlier) == (out, True)
    assert again.apply.out.text() == str(out)
    (layer,) = [layer for layer in viewer.layers if layer.name == "elsewhere"]
    assert not layer.visible
    assert "elsewhere" in again.apply.message.text()
    assert np.array_equal(np.asarray(layer.data[0][2]), painted_truth[2])
    assert viewer.layers.selection.active is not layer
    again.volume.layers.activated.emit(again.volume.layers.currentIndex())
    close(qtbot, again)
    third = open_dock(viewer)
    assert [layer.name for layer in viewer.layers].count("elsewhere") == 1
    close(qtbot, third)
    out.rename(out.with_name("moved.ome.zarr"))
    assert open_dock(viewer).apply.out.text() == default


def test_labels_of_before_are_read_when_they_are_seen(
    viewer, nuclei, open_dock, painted_truth, qtbot, tmp_path, monkeypatch
):
    import zarr

    from napari_distillfss._layers import OnGrid
    from napari_distillfss._session import Applied

    out, reads, read = tmp_path / "elsewhere.ome.zarr", [], OnGrid._read

    def spy(self, key):
        if isinstance(self._array, zarr.Array):  # not the empty one of a layer that is made
            reads.append(key)
        return read(self, key)

    zarr.create_array(out / "0", data=painted_truth)
    dock = open_dock(viewer)
    dock.session.annotations.put(1, painted_truth[1])
    dock.session.set_applied(Applied(dock.session.volume, out, "planes", None, None, ("object",)))
    close(qtbot, dock)
    monkeypatch.setattr(OnGrid, "_read", spy)
    open_dock(viewer)
    (layer,) = [layer for layer in viewer.layers if layer.name == "elsewhere"]
    assert reads == []
    layer.visible = True
    assert reads
    z = choose_layer(nuclei).plane_on(viewer.dims)
    np.testing.assert_array_equal(layer._slice.image.raw, painted_truth[z])


def test_the_preview_of_a_volume_that_was_removed_asks_for_another(viewer, nuclei, open_dock, student, qtbot):
    dock = open_dock(viewer)
    previewed(qtbot, dock, student)
    viewer.layers.remove(nuclei)
    assert dock.preview.message.text() == "Choose a volume first"


@pytest.mark.parametrize("is_reopened", [True, False])
def test_a_training_goes_on_when_its_dock_is_closed(
    viewer, nuclei, docked, painted_truth, few, qtbot, told, is_reopened
):
    first, close_first = docked()
    first.session.annotations.put(2, painted_truth[2])
    first.session.painted()
    first.distill.settings.setValue(few if not is_reopened else replace(few, steps=100_000))
    steps = []
    first.distill.job.stepped.connect(steps.append)
    first.distill.start()
    qtbot.waitUntil(lambda: bool(steps), timeout=60_000)
    close_first()
    assert told()[-1] == "DistillFSS: Training goes on; open the dock again to see it"
    assert first.session.busy == "Training"
    if is_reopened:
        second, close_second = docked()
        assert second is first
        qtbot.waitUntil(lambda: len(second.distill.plot.losses) > 2, timeout=60_000)
        second.distill.job.cancel()
        qtbot.waitUntil(lambda: second.session.model is not None, timeout=60_000)
        assert second.session.annotations is not None
        close_second()  # nothing runs
    else:
        qtbot.waitUntil(lambda: first.session.annotations is None, timeout=60_000)
        assert told()[-1] == "DistillFSS: Training is finished"
    third, _ = docked()
    assert third is not first
    qtbot.waitUntil(lambda: third.session.model is not None and not third.session.busy, timeout=60_000)
    assert third.session.students() == [third.session.model_path]
    assert third.session.annotations.planes() == [2]


def test_a_closed_dock_whose_job_goes_on_ends_with_its_window(viewer, nuclei, open_dock, qtbot):
    from threading import Event

    from qtpy.QtWidgets import QDockWidget, QMainWindow

    def endless(stop):
        yield 1
        while not stop.wait(0.01):
            yield 2

    window, frame = QMainWindow(), QDockWidget()
    dock = open_dock(viewer)
    frame.setWidget(dock)
    window.addDockWidget(Qt.DockWidgetArea.RightDockWidgetArea, frame)
    window.show()
    job, stopped = dock.distill.job, Event()
    job.ended.connect(stopped.set)
    job.start(endless)
    dock.setParent(None)
    assert job.running
    assert not job.stopping
    with qtbot.waitSignal(window.destroyed):
        window.deleteLater()
    qtbot.waitUntil(stopped.is_set)
    assert dock.session.annotations is None
    assert open_dock(viewer) is not dock


def test_the_table_of_objects_comes_back_and_strokes_can_be_undone(
    viewer, nuclei, docked, student, painted_truth, qtbot, tmp_path
):
    first, close_first = docked()
    first.support.take_brush()
    first.support.layer.data_setitem((np.array([3]), np.array([5]), np.array([6])), 2)
    first.support.layer.data_setitem((np.array([3]), np.array([7]), np.array([6])), 2)
    first.support.layer.undo()
    previewed(qtbot, first, student)
    first.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    first.apply.start()
    qtbot.waitUntil(lambda: not first.session.busy and first.session.applied is not None, timeout=120_000)
    first.objects.start()
    qtbot.waitUntil(lambda: not first.session.busy and not first.objects.table.isHidden(), timeout=120_000)
    rows = first.objects.table.model.values
    assert len(rows)
    close_first()

    second, close_second = docked()
    assert not second.objects.table.isHidden()
    np.testing.assert_array_equal(second.objects.table.model.values, rows)
    assert second.objects.message.text().startswith(f"{len(rows)} object")
    assert second.objects.layer is first.objects.layer
    second.objects.layer.selected_label = int(rows[-1, 0])
    chosen = second.objects.table.view.currentIndex()
    assert second.objects.table.model.order[chosen.row()] == len(rows) - 1
    assert second.objects._first_output(second.session.applied) in second.objects._own  # replaced, as before
    array = second.session.annotations.array
    assert (array[3, 5, 6], array[3, 7, 6]) == (2, 0)
    second.support.layer.redo()
    assert array[3, 7, 6] == 2
    second.support.layer.undo()
    second.support.layer.undo()
    assert array[3, 5, 6] == 0
    close_second()
    second.objects.layer.selected_label = 1  # nothing listens any more


def test_strokes_that_something_was_painted_after_are_not_undone(viewer, nuclei, docked, painted_truth):
    first, close_first = docked()
    first.support.take_brush()
    first.support.layer.data_setitem((np.array([3]), np.array([5]), np.array([6])), 2)
    folder = first.session.annotations.folder
    close_first()
    later = Annotations(folder, (8, 96, 96), lambda z: (z,))
    later.put(3, painted_truth[3])
    later.close()
    second, _ = docked()
    second.support.layer.undo()
    np.testing.assert_array_equal(second.session.annotations.plane(3), painted_truth[3])
