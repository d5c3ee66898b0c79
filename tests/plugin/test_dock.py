"""The dock as a user meets it: what goes wrong is one sentence, and nothing painted is lost."""

import os
import re
import threading
from pathlib import Path
from threading import Event, current_thread, main_thread

import dask.array as da
import numpy as np
import pytest
import tifffile
import zarr
from napari.plugins import _initialize_plugins
from napari.utils import progress
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QPushButton, QWidget

from distillfss_core import StudentModel
from distillfss_core.models.card import read_card
from distillfss_core.segmentation.lazy import segment_lazy
from napari_distillfss._annotations import Annotations, Class
from napari_distillfss._format import short
from napari_distillfss._layers import ANNOTATIONS, choose_layer
from napari_distillfss._session import Applied
from napari_distillfss._students import KeptStudent
from napari_distillfss._widgets import support
from napari_distillfss._widgets._common import JobBar


def finish(qtbot, dock, timeout=60_000):
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=timeout)


def paint(dock, painted, planes):
    for z in planes:
        dock.session.annotations.put(z, painted[z])
        dock.session.painted()


TEACHER, PROTOTYPES = "teacher (untrained)", "prototypes (untrained)"


def choose_source(dock, name):
    dock.preview.source.setCurrentText(name)
    dock.preview.source.activated.emit(dock.preview.source.currentIndex())


@pytest.fixture
def dock(viewer, nuclei, open_dock, few):
    opened = open_dock(viewer)
    opened.distill.settings.setValue(few)
    return opened


LAYERS = {
    "2d": lambda s: (s[0], {}),
    "4d": lambda s: (np.stack([s, s]), {}),
    "rgb": lambda s: (np.stack([s // 64] * 3, -1).astype(np.uint8), {"rgb": True}),
    "multiscale": lambda s: ([s, s[:, ::2, ::2]], {"multiscale": True}),
    "dask": lambda s: (da.from_array(s, chunks=(1, 96, 96)), {}),
    "zarr": lambda s: (zarr.array(s), {}),
    "scaled": lambda s: (s, {"scale": (5, 0.5, 0.5), "translate": (3, 2, 1)}),
    "rotated": lambda s: (s, {"rotate": 30.0, "scale": (2, 1, 1)}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_every_kind_are_painted_previewed_and_applied(
    kind, viewer, open_dock, qtbot, sample, student, tmp_path
):
    data, about = LAYERS[kind](sample.image[:3])
    viewer.add_image(data, name="image", **about)
    dock = open_dock(viewer)
    dock.support.suggest_slices()
    dock.support.fill_rest()
    painted = dock.session.annotations.planes()
    assert painted == [0]
    np.testing.assert_array_equal(dock.support.layer.extent.world[0], viewer.layers["image"].extent.world[0])
    dock.model.load_from(student)
    finish(qtbot, dock)
    if kind == "rgb":
        assert dock.session.model is not None
    qtbot.waitUntil(lambda: "is ready" in dock.preview.message.text(), timeout=60_000)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    assert dock.apply.message.text().startswith("Done")
    assert dock.apply.layer.ndim == viewer.layers["image"].ndim
    np.testing.assert_allclose(dock.apply.layer.extent.world[:, -2:], viewer.layers["image"].extent.world[:, -2:])


def test_what_cannot_be_segmented_is_said(viewer, open_dock):
    viewer.add_image(np.zeros((2, 2, 2, 2, 16, 16)), name="too much")
    dock = open_dock(viewer)
    assert "6 dimensions" in dock.volume.message.text()
    assert dock.volume.value() is None


def test_without_a_volume_everything_says_so(viewer, open_dock):
    dock = open_dock(viewer)
    for action, message in [
        (dock.support.suggest_slices, dock.support.message),
        (dock.support.fill_rest, dock.support.message),
        (dock.distill.start, dock.distill.message),
        (dock.apply.start, dock.apply.message),
    ]:
        action()
        assert "choose an image layer first" in message.text()
    dock.objects.start()
    assert "apply a model, or open a labels layer" in dock.objects.message.text()
    dock.distill.start_refining()
    assert "no model to refine" in dock.distill.message.text()


def test_a_volume_that_cannot_be_read_says_why_it_keeps_no_annotations(dock):
    from napari.layers import Image

    from distillfss_core import InputFileError, open_volume
    from napari_distillfss._layers import ChosenVolume

    class Broken:
        shape, dtype = (3, 20, 30), np.dtype("u1")

        def __getitem__(self, box):
            raise OSError("disk is away")

    chosen = ChosenVolume(Image(np.zeros(Broken.shape), name="broken"), open_volume(Broken()))
    with pytest.raises(InputFileError, match="disk is away"):
        dock.session.choose_volume(chosen)
    assert dock.session.volume is chosen
    assert dock.session.annotations is None
    assert "disk is away" in dock.support.message.text()


def test_without_support_distill_says_so(dock):
    dock.distill.start()
    assert "no slice is annotated" in dock.distill.message.text()
    dock.session.annotations.put(2, np.ones((96, 96), np.uint8))
    dock.session.painted()
    assert dock.distill.message.text() == "Ready to train on the slices that are ticked"


def test_a_class_without_pixels_is_named(dock, qtbot, painted_truth):
    paint(dock, painted_truth, [2])
    dock.support.classes.add.click()
    dock.distill.start()
    finish(qtbot, dock)
    assert "no slice has a pixel of class 'class 2'" in dock.distill.message.text()


def test_no_part_of_the_dock_hides_a_function_of_qt(dock):
    """As a button named ``screen`` did."""
    for widget in (dock.apply, dock.support, dock.preview, dock.distill, dock.model, dock.volume):
        hidden = {name for name in vars(widget) if hasattr(QWidget, name)}
        assert not hidden, type(widget).__name__


def test_collections_are_rare_while_a_dock_is_open(viewer, open_dock, tmp_path):
    import gc

    before = gc.get_threshold()
    docks = [open_dock(viewer), open_dock(viewer, tmp_path / "other")]
    for dock in docks:
        assert gc.get_threshold() == (*before[:2], max(200, before[2]))
        dock.session.close()
        dock.session.close()  # as when napari ends
    assert gc.get_threshold() == before


def test_boxes_of_settings_are_made_when_they_are_asked_for(dock, few):
    from dataclasses import replace

    from napari_distillfss._widgets._common import WheelGuard

    settings = dock.distill.settings
    settings.setValue(few)
    assert not settings.form.findChildren(QWidget)
    settings.more.setCurrentIndex(1)
    assert settings.form.boxes["steps"].value == few.steps
    assert settings.form.findChildren(WheelGuard)
    settings.form.boxes["steps"].value = 7
    assert settings.value() == replace(few, steps=7)
    assert settings.preset.currentText() == "own settings"


def test_impossible_settings_are_said(dock, painted_truth):
    paint(dock, painted_truth, [2])
    dock.distill.settings.form.boxes["crop_size"].value = 100
    dock.distill.start()
    assert "multiple of 32" in dock.distill.message.text()


def test_a_second_run_waits_for_the_first(dock, qtbot, painted_truth):
    paint(dock, painted_truth, [2])
    dock.distill.start()
    assert not dock.distill.distill.isEnabled()
    dock.distill.start()
    assert "Training is running; cancel it, or wait" in dock.distill.message.text()
    finish(qtbot, dock)
    assert dock.distill.distill.isEnabled()


def test_cancelling_keeps_the_best_so_far(dock, qtbot, painted_truth, few):
    from dataclasses import replace

    paint(dock, painted_truth, [2])
    dock.distill.settings.setValue(replace(few, steps=100_000))
    dock.distill.start()
    qtbot.waitUntil(lambda: len(dock.distill.plot.losses) > 2, timeout=60_000)
    dock.distill.job.cancel()
    finish(qtbot, dock)
    assert dock.session.model is not None
    assert dock.distill.message.text().startswith("Stopped: ")


def test_deleting_the_layer_while_distilling_loses_nothing(viewer, dock, nuclei, qtbot, painted_truth):
    paint(dock, painted_truth, [2])
    dock.distill.start()
    viewer.layers.remove(nuclei)
    assert "was removed" in dock.volume.message.text()
    finish(qtbot, dock)
    assert dock.session.model is not None
    viewer.add_layer(nuclei)
    assert dock.session.annotations.planes() == [2]


def test_closing_while_distilling_ends_the_work(viewer, nuclei, qtbot, tmp_path, painted_truth, few):
    from dataclasses import replace

    from napari_distillfss._widgets.dock import DistillDock

    dock = DistillDock(viewer, tmp_path / "kept")
    paint(dock, painted_truth, [2])
    dock.distill.settings.setValue(replace(few, steps=100_000))
    dock.distill.start()
    session = dock.session
    with qtbot.waitSignal(dock.destroyed):
        dock.deleteLater()
    del dock
    qtbot.waitUntil(lambda: not any("training" in t.name for t in threading.enumerate()), timeout=60_000)
    assert session.volume is None
    assert not progress._all_instances  # the activity dock shows nothing
    viewer.dims.set_point(0, 5)  # nothing listens any more


def test_closing_while_a_gpu_is_looked_for_leaves_nothing_to_answer(viewer, nuclei, qtbot, tmp_path, monkeypatch):
    from threading import Event, enumerate

    from napari_distillfss._widgets import volume
    from napari_distillfss._widgets.dock import DistillDock

    closed = Event()

    def wait(stop):
        closed.wait(60)
        yield from ()
        return "a GPU"

    monkeypatch.setattr(volume, "iter_device", wait)
    dock = DistillDock(viewer, tmp_path / "kept")
    looking = dock.volume._job  # as a thread's last signal would keep it
    dock.session.close()
    with qtbot.waitSignal(dock.destroyed):
        dock.deleteLater()
    del dock
    with qtbot.waitSignal(looking.ended):  # an error in between fails this test
        closed.set()
    qtbot.waitUntil(lambda: not any("distillfss" in t.name for t in enumerate()), timeout=60_000)


def test_no_delayed_call_outlives_the_dock(viewer, nuclei, qtbot, tmp_path):
    from superqt.utils import QSignalDebouncer

    from napari_distillfss._widgets.dock import DistillDock

    dock = DistillDock(viewer, tmp_path / "kept")
    owners = [dock, *dock.findChildren(QWidget)]
    kind = QSignalDebouncer.__base__
    places = [(type(owner).__name__, later) for owner in owners for later in vars(owner).values()]
    delayed = [later for _, later in places if isinstance(later, kind)]
    sections = {name for name, later in places if isinstance(later, kind)}
    assert sections == {"VolumePicker", "SupportWidget", "PreviewWidget", "ApplyWidget"}
    called = []
    for later in delayed:
        later.setTimeout(20)
        later.triggered.connect(lambda: called.append(None))
        later()
    dock.session.close()
    delayed[0]()  # also one that comes late
    with qtbot.waitSignal(dock.destroyed):
        dock.deleteLater()
    qtbot.wait(100)
    assert not called


def test_written_pieces_are_shown_now_and_then(dock, qtbot):
    looks = []
    dock.apply.layer = type("Layer", (), {"refresh": lambda self: looks.append(None)})()
    step = type("Step", (), {"level": 0})()
    dock.apply._soon.setTimeout(100)
    for _ in range(3):
        dock.apply._on_job_stepped(step)
    assert not looks
    qtbot.waitUntil(lambda: bool(looks))
    qtbot.wait(150)
    assert len(looks) == 1


def test_written_pieces_are_read_in_another_thread(dock, viewer, qtbot):
    class Pieces:
        shape, dtype, value = (8, 96, 96), np.dtype(np.uint8), 1

        def __getitem__(self, key):
            threads.append(current_thread())
            return np.broadcast_to(np.uint8(self.value), self.shape)[key]

    threads = []
    chosen, pieces = dock.session.volume, Pieces()
    dock.apply._running = Applied(chosen, Path("out.ome.zarr"), "planewise", None, None, ("object",))
    dock.apply._show(chosen.pyramid([pieces], shown=[chosen.plane_on(viewer.dims)]))
    assert np.unique(dock.apply.layer._slice.image.raw).tolist() == [1]
    threads.clear()
    pieces.value = 2
    dock.apply._on_job_stepped(type("Step", (), {"level": 0})())
    dock.apply._show_again()
    qtbot.waitUntil(lambda: np.unique(dock.apply.layer._slice.image.raw).tolist() == [2])
    assert threads
    assert main_thread() not in threads


def test_memory_of_a_preview_is_there_before_the_window_writes_into_it(dock, student, qtbot, monkeypatch):
    from napari_distillfss._widgets import preview

    filled, fill = [], preview.iter_filled

    def spy(arrays, parts):
        filled.append((arrays, current_thread()))
        for array in arrays:
            array[...] = 1  # as memory is that was used before
        return (yield from fill(arrays, parts))

    monkeypatch.setattr(preview, "iter_filled", spy)
    dock.model.load_from(student)
    finish(qtbot, dock)
    qtbot.waitUntil(lambda: "is ready" in dock.preview.message.text() and not dock.preview.busy, timeout=60_000)
    arrays, thread = filled[-1]
    assert thread is not main_thread()
    assert any(array is dock.preview._probabilities for array in arrays)
    for own in dock.preview._arrays.values():
        assert any(array is own for array in arrays)
    assert dock.preview._probabilities.min() < 1
    shown = dock.preview._probabilities.copy()
    dock.preview._ask()
    qtbot.waitUntil(lambda: len(filled) > 1 and not dock.preview.busy)
    assert filled[-1][0] == []  # what is painted stays
    np.testing.assert_array_equal(dock.preview._probabilities, shown)


def test_two_viewers_on_one_image_do_not_share_annotations(dock, sample, open_dock, tmp_path):
    from napari.components import ViewerModel

    other = ViewerModel()
    other.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    second = open_dock(other, tmp_path / "kept")
    assert second.session.annotations.folder != dock.session.annotations.folder


def test_strokes_are_kept_and_found_again_after_a_crash(viewer, nuclei, open_dock, qtbot, tmp_path, sample):
    from napari.components import ViewerModel

    first = open_dock(viewer)
    first.support.suggest_slices()
    first.support.go_to(3)
    first.support.layer.paint((3, 40, 40), 2)
    qtbot.waitUntil(lambda: first.support.list.count() and "plane 3: <1 %" in _texts(first.support.list))
    (first.session.annotations.folder / "owner").unlink()  # as after a crash: nobody is there any more
    other = ViewerModel()
    other.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    second = open_dock(other)
    assert "1 slice of this volume, painted earlier, is back" in second.support.message.text()
    assert second.support.layer.metadata[ANNOTATIONS]
    assert second.session.annotations.planes() == [3]


def _texts(items):
    return "\n".join(items.item(i).text() for i in range(items.count()))


def test_the_rest_of_a_slice_becomes_background_and_undo_takes_it_back(dock, viewer):
    dock.support.suggest_slices()
    dock.support.go_to(4)
    dock.support.layer.paint((4, 40, 40), 2)
    dock.support.fill_rest()
    assert dock.session.annotations.counts(4)[0] == 0
    dock.support.layer.undo()
    dock.session.painted()
    assert dock.session.annotations.counts(4)[1] == 0
    assert dock.session.annotations.counts(4)[2] > 0


def test_undo_takes_a_corrected_plane_back_in_the_file_and_the_list(
    viewer, open_dock, qtbot, student, tmp_path, sample
):
    viewer.add_image(np.stack([sample.image[:3]] * 2), name="4d")
    dock = open_dock(viewer)
    dock.support.suggest.click()
    dock.support.go_to(2)
    dock.support.layer.paint((0, 2, 40, 40), 2)
    qtbot.waitUntil(lambda: "plane 2: <1 %" in _texts(dock.support.list))
    before = dock.session.annotations.plane(2)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    dock.preview.take.click()
    corrected = dock.session.annotations.plane(2)
    assert corrected.all()
    np.testing.assert_array_equal(corrected[before > 0], before[before > 0])
    assert "plane 2: 100 %" in _texts(dock.support.list)
    dock.support.go_to(0)
    dock.support.layer.undo()
    on_disk = zarr.open_array(dock.session.annotations.folder / "labels.zarr", mode="r")
    np.testing.assert_array_equal(on_disk[0, 2], before)
    qtbot.waitUntil(lambda: "plane 2: <1 %" in _texts(dock.support.list))
    dock.support.go_to(2)
    np.testing.assert_array_equal(dock.support.layer._slice.image.raw, before)
    dock.support.layer.redo()
    np.testing.assert_array_equal(on_disk[0, 2], corrected)


def test_a_slice_is_left_out_removed_and_gone_to_from_the_list(dock, viewer, painted_truth):
    from qtpy.QtCore import Qt

    paint(dock, painted_truth, [2, 5])
    items = dock.support.list
    items.item(0).setCheckState(Qt.CheckState.Unchecked)
    assert [s.enabled for s in dock.session.annotations.slices()] == [False, True]
    items.itemClicked.emit(items.item(1))
    assert dock.support.plane() == 5
    items.setCurrentRow(1)
    dock.support.remove.click()
    assert dock.session.annotations.planes() == [2]
    dock.support.layer.undo()
    dock.session.painted()
    np.testing.assert_array_equal(dock.session.annotations.plane(5), painted_truth[5])


def test_the_brush_and_the_layer_agree(dock):
    dock.support.paint.click()
    dock.support.classes.setBrush(1)
    assert dock.support.layer.selected_label == 1
    dock.support.layer.selected_label = 2
    assert dock.support.classes.brush() == 2


@pytest.mark.parametrize(
    "place", [{}, {"scale": (2, 0.325, 0.325)}, {"scale": (2, 0.325, 0.325), "units": ("um",) * 3}]
)
def test_size_pixel_and_memory_of_a_volume_are_a_line_each(viewer, open_dock, place, qtbot):
    image = da.zeros((1200, 4096, 4096), dtype=np.uint16, chunks=(1, 4096, 4096))
    viewer.add_image(image, contrast_limits=(0, 1), multiscale=False, cache=False, **place)
    dock = open_dock(viewer)
    dock.resize(380, 700)
    qtbot.waitUntil(lambda: dock.volume.value() is not None)  # a large array is read in another thread
    text = dock.volume.message
    lines = text.text().splitlines()
    assert len(lines) == 3
    widest = max(text.fontMetrics().horizontalAdvance(line) for line in lines)
    assert widest <= 360


def test_the_hint_of_a_training_follows_the_slices(dock, painted_truth):
    assert dock.distill.message.text() == "Annotate some slices, then press Train"
    paint(dock, painted_truth, [0])
    assert dock.distill.message.text() == "Ready to train on the slices that are ticked"
    dock.session.annotations.remove(0)
    dock.session.painted()
    assert dock.distill.message.text() == "Annotate some slices, then press Train"


def test_the_training_of_another_volume_is_not_shown(dock, viewer, sample, qtbot, painted_truth):
    paint(dock, painted_truth, [2])
    dock.distill.start()
    finish(qtbot, dock)
    assert dock.distill.message.text().startswith("Done: ")
    assert not dock.distill.plot.isHidden()
    dock.session.choose_volume(dock.session.volume)
    assert dock.distill.message.text().startswith("Done: ")  # it is the same volume
    viewer.add_image(sample.image[:4] * 2, name="another")
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    assert dock.distill.plot.isHidden()
    assert dock.distill.message.text() == "Annotate some slices, then press Train"
    dock.volume.layers.setCurrentIndex(0)
    dock.volume.layers.activated.emit(0)
    assert dock.distill.plot.isHidden()
    assert dock.distill.message.text() == "Ready to train on the slices that are ticked"


def test_labels_go_home_where_the_folder_of_the_image_cannot_be_written(
    viewer, open_dock, open_path, tmp_path, sample, monkeypatch
):
    tifffile.imwrite(tmp_path / "cells.tif", sample.image, photometric="minisblack")
    dock = open_dock(viewer)
    open_path(dock, tmp_path / "cells.tif")
    assert Path(dock.apply.out.text()) == tmp_path / "cells-labels.ome.zarr"
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)
    dock.volume.setValue(None)
    dock.volume.setValue(choose_layer(viewer.layers[0]))
    assert Path(dock.apply.out.text()) == Path.home() / "cells-labels.ome.zarr"


def test_removing_the_annotation_layer_keeps_what_is_painted(dock, viewer, painted_truth):
    paint(dock, painted_truth, [2])
    dock.support.paint.click()
    viewer.layers.remove(dock.support.layer)
    assert "Paint brings it back" in dock.support.message.text()
    dock.support.paint.click()
    assert dock.support.layer in viewer.layers
    assert np.asarray(dock.support.layer.data[2]).any()


def test_starting_over_asks_names_the_folder_and_is_restored(dock, painted_truth, monkeypatch):
    from qtpy.QtWidgets import QInputDialog, QMessageBox

    buttons, questions = QMessageBox.StandardButton, []
    reply = {"is": buttons.No}
    monkeypatch.setattr(QMessageBox, "question", lambda *text: questions.append(text[2]) or reply["is"])
    monkeypatch.setattr(QInputDialog, "getItem", lambda *how: (how[3][0], True))
    assert not dock.support.restore.isEnabled()
    dock.support.anew.click()
    assert not questions  # nothing would be set aside
    paint(dock, painted_truth, [2, 5])
    folder = dock.session.annotations.folder
    dock.support.anew.click()
    assert dock.session.annotations.planes() == [2, 5]
    assert str(folder) in questions[0]
    assert "2 slices" in questions[0]
    reply["is"] = buttons.Yes
    dock.support.anew.click()
    assert dock.session.annotations.planes() == []
    assert f"{folder}.old1" in dock.support.message.text()
    assert dock.support.restore.isEnabled()
    paint(dock, painted_truth, [7])
    dock.support.restore.click()
    assert dock.session.annotations.planes() == [2, 5]
    np.testing.assert_array_equal(dock.session.annotations.plane(5), painted_truth[5])
    assert f"{folder}.old2" in dock.support.message.text()
    dock.support.restore.click()  # what was painted in between is not lost either
    assert dock.session.annotations.planes() == [7]


def test_labels_of_a_file_are_imported(dock, qtbot, tmp_path, sample):
    labels = sample.labels.copy()
    labels[[0, 2, 3, 5, 6, 7]] = 0
    tifffile.imwrite(tmp_path / "truth.tif", labels, metadata={"axes": "ZYX"})
    dock.support.import_labels(tmp_path / "truth.tif", "masks")
    finish(qtbot, dock)
    assert dock.session.annotations.planes() == [1, 4]
    painted = dock.session.annotations.plane(4)
    tifffile.imwrite(tmp_path / "plane.tif", np.eye(96, dtype=np.uint8))
    dock.support.go_to(4)
    dock.support.import_labels(tmp_path / "plane.tif", "classes")
    finish(qtbot, dock)
    assert dock.session.annotations.counts(4)[2] == 96
    assert "Ctrl+Z brings back what 1 of them had" in dock.support.message.text()
    dock.support.layer.undo()
    np.testing.assert_array_equal(dock.session.annotations.plane(4), painted)


def test_slices_that_differ_take_the_place_of_even_ones(viewer, open_dock, qtbot):
    from distillfss_core import open_volume, suggest_diverse_planes, suggest_planes

    planes = np.random.default_rng(0).normal(100, 10, (30, 64, 64))
    planes[17:20] += 200
    viewer.add_image(planes)
    dock = open_dock(viewer)
    dock.support.count.setValue(4)
    dock.support.suggest.click()
    assert dock.support.suggested == suggest_planes(30, 4)
    qtbot.waitUntil(lambda: not dock.support.selecting.running)
    assert dock.support.suggested == suggest_diverse_planes(open_volume(planes), 4)
    assert set(dock.support.suggested) & {17, 18, 19}
    assert dock.support.plane() == dock.support.suggested[0]


def test_the_plane_stays_where_it_is_painted_while_slices_are_looked_for(viewer, open_dock, qtbot):
    planes = np.random.default_rng(0).normal(100, 10, (30, 64, 64))
    planes[17:20] += 200
    viewer.add_image(planes)
    dock = open_dock(viewer)
    dock.support.count.setValue(3)
    dock.support.go_to(0)
    dock.support.rest.click()
    dock.support.suggest.click()
    even, at = dock.support.suggested, dock.support.plane()
    dock.support.layer.paint((at, 20, 20), 2)
    qtbot.waitUntil(lambda: not dock.support.selecting.running)
    assert dock.support.suggested != even
    assert dock.support.plane() == at == 0


def test_looking_for_slices_that_differ_ends_when_asked_and_answers_the_last_question(viewer, open_dock, qtbot):
    class Slow:
        shape, dtype, ndim = (500, 64, 64), np.dtype(np.uint8), 3
        asked, go_on = threading.Event(), threading.Event()

        def __getitem__(self, key):
            if threading.current_thread() is not threading.main_thread():
                self.asked.set()
                assert self.go_on.wait(20)
            return np.zeros(self.shape, np.uint8)[key]

    viewer.add_image(Slow(), contrast_limits=(0, 255))
    dock = open_dock(viewer)
    dock.support.suggest.click()
    assert Slow.asked.wait(20)
    even = dock.support.suggested
    dock.support.selecting.cancel()
    Slow.go_on.set()
    qtbot.waitUntil(lambda: not dock.support.selecting.running)
    assert dock.support.suggested == even
    Slow.go_on.clear()
    dock.support.suggest.click()
    dock.support.count.setValue(3)
    dock.support.suggest.click()
    dock.support.layer.paint((250, 30, 30), 2)  # the user has begun: what is suggested stays
    Slow.go_on.set()
    qtbot.waitUntil(lambda: not dock.support.selecting.running)
    assert dock.support.suggested == [0, 249, 499]


def test_the_planes_least_sure_are_suggested(dock, qtbot, student):
    dock.support.way.setCurrentText("least sure")
    dock.support.suggest_slices()
    assert "no model yet" in dock.support.message.text()
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.support.count.setValue(2)
    dock.support.suggest_slices()
    finish(qtbot, dock)
    assert len(dock.support.suggested) == 2
    first = dock.support.suggested[0]
    assert dock.support.plane() == first
    other, third = [z for z in range(8) if z not in dock.support.suggested][:2]
    for go_on in (lambda: dock.support.go_to(third), dock.support.rest.click):  # the view stays where the user is
        dock.support.go_to(other)
        dock.support.suggest_slices()
        go_on()
        at = dock.support.plane()
        finish(qtbot, dock)
        assert dock.support.plane() == at


def test_disputed_planes_are_suggested_from_what_is_annotated_without_a_model(dock, qtbot, painted_truth):
    dock.support.way.setCurrentText("disputed")
    dock.support.suggest_slices()
    assert "no slice is annotated" in dock.support.message.text()
    paint(dock, painted_truth, [2])
    dock.support.count.setValue(3)
    dock.support.suggest_slices()
    finish(qtbot, dock)
    assert len(dock.support.suggested) == 3
    assert 2 not in dock.support.suggested
    assert dock.support.plane() == dock.support.suggested[0]


def test_a_teacher_answers_before_any_training(dock, qtbot, painted_truth):
    paint(dock, painted_truth, [2])
    for source in (TEACHER, PROTOTYPES):
        choose_source(dock, source)
        finish(qtbot, dock)
        with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
            pass
        assert dock.preview.layers["labels"].data.any()


def test_the_preview_follows_and_shows_what_is_asked(dock, qtbot, viewer, student):
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    for z in (1, 2, 3, 6):
        dock.support.go_to(z)
    qtbot.waitUntil(lambda: dock.preview.plane == 6 and "is ready" in dock.preview.message.text(), timeout=60_000)
    assert set(dock.preview.layers) == {"labels"}
    dock.preview.shown["uncertainty"].setChecked(True)
    dock.preview.shown["probability"].setChecked(True)
    assert set(dock.preview.layers) == {"labels", "uncertainty", "probability"}
    student_ = dock.session.model
    expected = student_.predict(dock.session.volume.volume.plane(6))
    np.testing.assert_array_equal(dock.preview.layers["labels"].data[0], expected.labels)
    np.testing.assert_allclose(dock.preview.layers["probability"].data[0], expected.probabilities[1])
    np.testing.assert_allclose(dock.preview.layers["uncertainty"].data[0], expected.uncertainty)
    viewer.dims.ndisplay = 3
    qtbot.waitUntil(lambda: "show the volume in 2D" in dock.preview.message.text())
    dock.preview.on.setChecked(False)
    assert not dock.preview.layers


def test_a_folder_that_cannot_be_written_is_one_sentence(dock, viewer, nuclei, qtbot, student, tmp_path):
    dock.model.load_from(student)
    finish(qtbot, dock)
    viewer.layers.selection.active = nuclei
    dock.apply.out.setText(str(tmp_path / "nowhere" / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    assert "there is no folder" in dock.apply.message.text()
    assert "out" not in [layer.name for layer in viewer.layers]  # nothing is left of what was not begun
    assert viewer.layers.selection.active is nuclei
    dock.apply.out.setText(str(tmp_path / "out.tif"))
    dock.apply.start()
    assert "end the name in .ome.zarr" in dock.apply.message.text()
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
        dock.apply.start()
        finish(qtbot, dock)
        tmp_path.chmod(0o700)
        assert "cannot write" in dock.apply.message.text()


def test_a_full_disk_loses_no_stroke_and_raises_nothing(
    dock, viewer, nuclei, qtbot, painted_truth, tmp_path, monkeypatch, told
):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    paint(dock, painted_truth, [0])
    dock.support.take_brush()
    layer, session, message = dock.support.layer, dock.session, dock.support.message
    folder = session.annotations.folder
    with monkeypatch.context() as full:
        full.setattr("zarr.Array.__setitem__", fail)
        full.setattr("zarr.create_array", fail)
        full.setattr("napari_distillfss._annotations.write_json", fail)
        dock.support.go_to(3)
        layer.paint((3, 40, 40), 2)
        assert "No space left on device" in message.text()
        assert "in memory only" in message.text()
        dock.support.go_to(5)
        actions = (dock.support.fill_rest, layer.undo, layer.redo, dock.support.classes.add.click)
        for action in actions:
            message.tell("")
            action()
            assert message.warns, action
        dock.support.list.setCurrentRow(0)
        dock.support.remove.click()
        session.painted()
        assert session.annotations.planes() == [3, 5]
        expected = np.asarray(session.annotations.array)
        tifffile.imwrite(tmp_path / "truth.tif", painted_truth, metadata={"axes": "ZYX"})
        dock.support.import_labels(tmp_path / "truth.tif")
        finish(qtbot, dock)
        assert "No space left on device" in message.text()
        np.testing.assert_array_equal(session.annotations.array, expected)
        other = viewer.add_image(np.zeros((4, 64, 64), np.uint8), name="other")
        dock.volume.setValue(choose_layer(other))
        assert any(folder.name in text for text in told())
    dock.volume.setValue(choose_layer(nuclei))
    assert session.annotations.folder == folder
    session.painted()
    on_disk = zarr.open_array(folder / "labels.zarr", mode="r")
    np.testing.assert_array_equal(on_disk, expected)
    assert session.annotations.class_names == ("object", "class 2")


def test_on_a_full_disk_a_brush_of_three_dimensions_is_kept_in_memory(dock, viewer, nuclei, qtbot, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    dock.support.take_brush()
    layer, session, message = dock.support.layer, dock.session, dock.support.message
    viewer.dims.ndisplay, layer.n_edit_dimensions, layer.brush_size = 3, 3, 9
    with monkeypatch.context() as full:
        full.setattr("zarr.Array.__setitem__", fail)
        full.setattr("zarr.create_array", fail)
        for action in (
            lambda: layer.paint((3, 40, 40), 2),
            lambda: layer.fill((3, 40, 40), 1),
            layer.undo,
            layer.redo,
            lambda: layer.fill((0, 0, 0), 2),
        ):
            message.tell("")
            action()
            assert "in memory only" in message.text()
            assert message.warns
        assert session.annotations.planes() == list(range(8))
        expected = np.asarray(session.annotations.array)
    assert set(np.unique(expected)) == {1, 2}
    session.annotations.save()
    np.testing.assert_array_equal(zarr.open_array(session.annotations.folder / "labels.zarr", mode="r"), expected)


def test_where_annotations_cannot_be_kept_a_student_is_still_applied(
    viewer, nuclei, open_dock, qtbot, student, tmp_path
):
    (tmp_path / "file").write_text("")  # root feels this one too
    dock = open_dock(viewer, tmp_path / "file" / "kept")
    for action in (dock.support.suggest.click, dock.support.rest.click, dock.support.paint.click):
        dock.support.message.tell("")
        action()
        assert "annotations cannot be kept in" in dock.support.message.text()
    dock.distill.start()
    assert "annotations cannot be kept in" in dock.distill.message.text()
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    dock.apply.out.setText(str(tmp_path / "file" / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    assert "file" in dock.apply.message.text()
    assert "Done" not in dock.apply.message.text()
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    assert dock.apply.message.text().startswith("Done")


@pytest.mark.filterwarnings("ignore::distillfss_core.IntensityWarning")
def test_intensities_unlike_those_that_were_learned_are_named(viewer, open_dock, qtbot, student, sample, tmp_path):
    """The preview and the labels of a negative name both ranges in red; those of the stack itself do not."""
    negative = viewer.add_image(4095 - sample.image, name="negative")
    dock = open_dock(viewer)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    qtbot.waitUntil(lambda: "contrast seems to be inverted" in dock.preview.message.text(), timeout=60_000)
    assert dock.preview.message.warns
    dock.apply.out.setText(str(tmp_path / "negative.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    assert "contrast seems to be inverted" in dock.apply.message.text()
    assert dock.apply.message.warns
    viewer.layers.remove(negative)
    viewer.layers.clear()
    viewer.layers.selection.active = viewer.add_image(sample.image, name="as learned")
    qtbot.waitUntil(lambda: dock.session.volume is not None and dock.session.volume.name == "as learned")
    qtbot.waitUntil(lambda: dock.preview.message.text().endswith("is ready"), timeout=60_000)
    assert not dock.preview.message.warns


def test_applying_a_student_leaves_no_empty_annotations(viewer, nuclei, qtbot, student, tmp_path):
    from napari_distillfss._widgets.dock import ApplyDock

    dock = ApplyDock(viewer, tmp_path / "kept")
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    dock.session.close()
    dock.deleteLater()
    assert not list((tmp_path / "kept" / "annotations").iterdir())


def test_a_file_that_is_no_student_is_one_sentence(dock, qtbot, tmp_path):
    (tmp_path / "x.safetensors").write_text("nothing")
    dock.model.load_from(tmp_path / "x.safetensors")
    finish(qtbot, dock)
    assert str(tmp_path / "x.safetensors") in dock.model.message.text()


def test_a_region_is_applied_and_another_adds_to_it(dock, qtbot, student, tmp_path):
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.region.setValue(((0, 2), (0, 96), (0, 96)))
    dock.apply.start()
    finish(qtbot, dock)
    first = zarr.open_array(tmp_path / "out.ome.zarr" / "0")[:]
    assert not first[2:].any()
    dock.apply.region.setValue(None)
    dock.apply.start()
    finish(qtbot, dock)
    whole = zarr.open_array(tmp_path / "out.ome.zarr" / "0")[:]
    np.testing.assert_array_equal(first[:2], whole[:2])
    expected = StudentModel.load(student).predict(dock.session.volume.volume.plane(5)).labels
    np.testing.assert_array_equal(whole[5], expected)


def test_the_preview_and_applied_labels_are_not_seen_on_one_another(dock, viewer, qtbot, student, tmp_path):
    def seen():
        layers = (dock.preview._layers["labels"], dock.apply.layer)
        return [layer is not None and layer.visible for layer in layers]

    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    finish(qtbot, dock)
    assert seen() == [True, False]
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    for _ in range(2):  # the second time all of it is found finished
        dock.apply.start()
        finish(qtbot, dock)
        assert seen() == [False, True]
        assert not dock.preview.on.isChecked()
        assert "Switched off, as the applied labels are shown" in dock.preview.message.text()
        assert dock.apply.message.text().startswith("Done")
        with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
            dock.preview.on.setChecked(True)
        assert seen() == [True, False]
        assert "Hidden while the preview is on; the eye of 'out' shows the labels" in dock.apply.message.text()
    dock.apply.layer.visible = True  # by its eye: both, as the user wants it
    assert seen() == [True, True]
    assert dock.preview.on.isChecked()
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):  # a model that arrives is previewed
        dock.model.load_from(student)
    assert seen() == [True, True]
    dock.apply.start()
    finish(qtbot, dock)
    dock.model.load_from(student)
    qtbot.waitUntil(lambda: seen() == [True, False], timeout=60_000)
    viewer.add_image(np.zeros((4, 64, 64), np.uint8), name="other")
    dock.apply.start()
    finish(qtbot, dock)
    dock.volume.setValue(choose_layer(viewer.layers["other"]))
    assert "applied labels" not in dock.preview.message.text()
    assert dock.preview.on.isChecked()
    assert dock.apply.layer.visible


@pytest.fixture
def held(monkeypatch):
    """Apply writes a plane a piece, and waits after the second until it is told to go on or to stop."""
    from distillfss_core.labelstore import layout as label_layout
    from napari_distillfss._widgets import apply

    monkeypatch.setattr(label_layout, "_SHARD", 1)
    go_on, original = threading.Event(), apply.iter_applying

    def held_applying(volume, model, out, stop, **how):
        run = original(volume, model, out, stop, **how)
        pieces = 0
        while True:
            try:
                step = next(run)
            except StopIteration as end:
                return end.value
            yield step
            pieces += hasattr(step, "total")
            while pieces == 2 and not stop.is_set() and not go_on.wait(0.01):
                pass

    monkeypatch.setattr(apply, "iter_applying", held_applying)
    yield go_on
    go_on.set()


@pytest.fixture
def applying(dock, qtbot, student, tmp_path, held):
    """A dock that has written two planes of eight, and waits."""
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.preview.on.setChecked(False)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    apply_two_more(qtbot, dock)
    return dock


def apply_two_more(qtbot, dock):
    steps = []
    dock.apply.job.stepped.connect(steps.append)
    dock.apply.apply.click()
    qtbot.waitUntil(lambda: sum(hasattr(step, "total") for step in steps) == 2, timeout=60_000)
    dock.apply.job.stepped.disconnect(steps.append)


def assert_written(folder, student, image):
    model = StudentModel.load(student)
    expected = np.stack([model.predict(plane).labels for plane in image])
    np.testing.assert_array_equal(zarr.open_array(folder / "out.ome.zarr" / "0")[:], expected)


def test_apply_is_stopped_and_gone_on_with_in_the_same_and_in_a_new_dock(
    applying, held, viewer, qtbot, sample, student, open_dock, tmp_path
):
    from napari.components import ViewerModel

    def stop():
        buttons = applying.apply.findChildren(QPushButton)
        (cancel,) = [b for b in buttons if b.text() == "Cancel" and b.isVisibleTo(applying.apply)]
        cancel.click()
        finish(qtbot, applying)
        assert "Stopped; what is written is kept" in applying.apply.message.text()
        assert applying.apply.layer in viewer.layers

    stop()
    apply_two_more(qtbot, applying)
    stop()
    applying.session.close()
    held.set()
    other = ViewerModel()
    other.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    dock = open_dock(other)
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.apply.click()
    finish(qtbot, dock)
    computed, found = map(int, re.search(r"(\d+) piece.* (\d+) found", dock.apply.message.text()).groups())
    assert computed + found == 8
    assert found >= 3
    assert_written(tmp_path, student, sample.image)
    np.testing.assert_array_equal(np.asarray(dock.apply.layer.data), zarr.open_array(tmp_path / "out.ome.zarr" / "0"))


@pytest.mark.parametrize("where", ["engines are timed", "intensities are compared", "the first plane"])
def test_cancel_in_the_preparation_of_apply_ends_at_once_and_leaves_nothing(
    dock, qtbot, student, sample, tmp_path, monkeypatch, where
):
    from distillfss_core.segmentation.lazy import VolumeSegmenter
    from distillfss_core.segmentation.modes import PlanewiseLabels

    entered, go_on = threading.Event(), threading.Event()
    kind, name = {
        "engines are timed": (StudentModel, "iter_calibrated"),
        "intensities are compared": (VolumeSegmenter, "match"),
        "the first plane": (PlanewiseLabels, "iter_labels"),
    }[where]
    original = getattr(kind, name)

    def held_up(self, *args, **options):
        entered.set()
        assert go_on.wait(30)
        return original(self, *args, **options)

    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.preview.on.setChecked(False)
    qtbot.waitUntil(lambda: not dock.preview.busy, timeout=60_000)
    monkeypatch.setattr(kind, name, held_up)
    out = tmp_path / "out.ome.zarr"
    dock.apply.out.setText(str(out))
    dock.apply.apply.click()
    qtbot.waitUntil(entered.is_set, timeout=60_000)
    (cancel,) = [b for b in dock.apply.findChildren(QPushButton) if b.text() == "Cancel" and b.isVisibleTo(dock.apply)]
    cancel.click()
    assert dock.session.busy == ""
    assert dock.apply.message.text().startswith("Stopped")
    go_on.set()
    qtbot.waitUntil(lambda: not any("Segmentation" in t.name for t in threading.enumerate()), timeout=60_000)
    assert not out.exists()
    dock.apply.apply.click()
    finish(qtbot, dock)
    assert dock.apply.message.text().startswith("Done")
    assert_written(tmp_path, student, sample.image)


def test_a_second_run_waits_until_applying_has_ended(applying, held, viewer, qtbot, painted_truth):
    paint(applying, painted_truth, [2])
    layer = applying.apply.layer
    assert not applying.apply.apply.isEnabled()
    for section, start in ((applying.apply, applying.apply.start), (applying.distill, applying.distill.start)):
        start()
        assert "Segmentation is running; cancel it, or wait" in section.message.text()
    assert applying.apply.layer is layer
    held.set()
    finish(qtbot, applying)
    assert applying.apply.message.text().startswith("Done")


@pytest.mark.parametrize("what", ["deleted", "changed"])
def test_applying_goes_on_when_its_layer_is_deleted_or_another_is_chosen(
    what, applying, held, viewer, nuclei, qtbot, sample, student, tmp_path
):
    if what == "deleted":
        viewer.layers.remove(nuclei)
        assert applying.session.volume is None
    else:
        viewer.add_image(np.zeros((3, 40, 50)), name="another", scale=(1, 3, 3))
        applying.volume.layers.setCurrentIndex(1)
        applying.volume.layers.activated.emit(1)
        assert applying.session.volume.name == "another"
    held.set()
    finish(qtbot, applying)
    assert applying.apply.message.text().startswith("Done")
    assert_written(tmp_path, student, sample.image)
    np.testing.assert_allclose(applying.apply.layer.extent.world, nuclei.extent.world)
    applying.objects.start()  # of the volume that was applied to
    finish(qtbot, applying)
    assert "object" in applying.objects.message.text()


def test_a_student_belongs_to_the_volume_it_was_learned_from(dock, viewer, qtbot, painted_truth):
    from qtpy.QtWidgets import QApplication

    paint(dock, painted_truth, [2])
    folder = dock.session.annotations.folder
    dock.distill.start()
    viewer.add_image(np.zeros((3, 40, 50)), name="another")
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    finish(qtbot, dock)
    assert dock.session.model_path.parent == folder
    dock.model.copy_command()
    assert str(folder / "model-1" / "images") in QApplication.clipboard().text()
    assert "--pixel-size 1.0,1.0" in QApplication.clipboard().text()
    assert [f.name for f in (folder / "model-1" / "images").iterdir()] == ["plane_0002.tif"]


def test_a_script_names_the_slices_that_were_learned_from_whatever_is_painted_later(
    dock, qtbot, painted_truth, monkeypatch
):
    from qtpy.QtWidgets import QApplication, QMessageBox

    from distillfss_core import load_support

    paint(dock, painted_truth, [1, 3])
    dock.distill.start()
    finish(qtbot, dock)
    paint(dock, painted_truth, [5])
    monkeypatch.setattr(QMessageBox, "question", lambda *_: QMessageBox.StandardButton.Yes)
    dock.support.anew.click()
    dock.model.copy_python()
    script = QApplication.clipboard().text()
    support = dock.session.training.support
    assert support.parent.name.endswith(".old1")
    assert str(support / "images") in script
    assert dock.session.model_path.is_file()
    assert str(dock.session.model_path) in script
    again = load_support(support / "images", support / "labels", classes=["object"], scribbles=True, same_volume=True)
    assert [s.source for s in again.slices] == ["plane_0001.tif", "plane_0003.tif"]
    assert again.planes_of_one_volume


def test_planes_without_labels_are_learned_from_and_belong_to_the_script(
    dock, qtbot, painted_truth, sample, few, monkeypatch
):
    from dataclasses import replace

    import torch
    from qtpy.QtWidgets import QApplication

    import distillfss_core.training.distillation as module
    from distillfss_core import StudentModel
    from distillfss_core.nn.backbones import load_backbone

    # a foundation model that is quick
    monkeypatch.setattr(module, "load_backbone", lambda name: load_backbone(name, "random"))
    paint(dock, painted_truth, [1, 3])
    dock.distill.settings.setValue(replace(few, foundation="lcnet_050"))
    dock.distill.start()
    finish(qtbot, dock)
    card = dock.session.model.training
    assert (card["foundation"], card["unlabeled"]) == ("lcnet_050", len(sample.image) - 2)
    dock.model.copy_command()
    folder = dock.session.training.support / "unlabeled"
    assert f"--unlabeled {folder}" in QApplication.clipboard().text()
    dock.model.copy_python()
    exec(QApplication.clipboard().text(), {})
    again = StudentModel.load(dock.session.model_path.with_name("model-1-again.safetensors"))
    for name, value in dock.session.model.head.state_dict().items():
        assert torch.equal(value, again.head.state_dict()[name]), name


def test_a_script_segments_with_the_student_that_did(dock, qtbot, student, tmp_path):
    from qtpy.QtWidgets import QApplication

    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    (tmp_path / "other.safetensors").write_bytes(student.read_bytes())
    dock.model.load_from(tmp_path / "other.safetensors")
    finish(qtbot, dock)
    dock.model.copy_command()
    assert f"-m {student}" in QApplication.clipboard().text()
    dock.model.copy_python()
    assert f"StudentModel.load('{student}')" in QApplication.clipboard().text()


def test_apply_turns_the_image_where_test_time_augmentation_is_ticked(dock, qtbot, student, tmp_path):
    from qtpy.QtWidgets import QApplication

    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.apply.tta.setChecked(True)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    volume, model = dock.session.volume.volume, dock.session.model
    expected, plain = (segment_lazy(volume, m)[2].compute() for m in (model.with_tta(), model))
    written = zarr.open_array(tmp_path / "out.ome.zarr" / "0", mode="r")[2]
    np.testing.assert_array_equal(written, expected)
    assert (written != plain).any()
    dock.model.copy_command()
    assert "--tta" in QApplication.clipboard().text()
    dock.model.copy_python()
    assert "segment_to_zarr(volume, model.with_tta()," in QApplication.clipboard().text()
    dock.apply.tta.setChecked(False)
    dock.apply.start()
    finish(qtbot, dock)
    assert "another test-time augmentation" in dock.apply.message.text()
    assert dock.apply.anew.isVisibleTo(dock.apply)


def test_a_student_that_cannot_be_kept_can_be_saved_elsewhere(dock, qtbot, painted_truth, monkeypatch, tmp_path):
    from distillfss_core import OutputError

    def full(self, path, **options):
        raise OutputError(f"cannot write {path}: no space left on device")

    paint(dock, painted_truth, [2])
    with monkeypatch.context() as patch:
        patch.setattr(StudentModel, "save", full)
        dock.distill.start()
        finish(qtbot, dock)
    assert "press Save and choose another place" in dock.distill.message.text()
    assert dock.session.model_path is None
    dock.model.save_to(tmp_path / "elsewhere.safetensors")
    assert StudentModel.load(tmp_path / "elsewhere.safetensors").class_names == ("object",)


def test_a_student_never_takes_the_place_of_another(dock, painted_truth):
    paint(dock, painted_truth, [2])
    folder = dock.session.annotations.folder
    (folder / "student-2.safetensors").write_text("")  # the first was deleted
    assert dock.session.next_model_path() == folder / "model-3.safetensors"


def test_stopped_before_the_first_step_the_student_there_was_stays(dock, qtbot, painted_truth, student):
    dock.model.load_from(student)
    finish(qtbot, dock)
    model = dock.session.model
    paint(dock, painted_truth, [2])
    dock.distill.start_refining()
    dock.distill.job.cancel()
    finish(qtbot, dock)
    assert dock.session.model is model
    assert "nothing was changed" in dock.distill.message.text()
    assert not list(dock.session.annotations.folder.glob("model-*"))


def test_a_stopped_load_changes_nothing(dock, qtbot, student):
    dock.model.load_from(student)
    dock.model.job.cancel()
    finish(qtbot, dock)
    assert dock.session.model is None
    assert "nothing was loaded" in dock.model.message.text()


def test_the_layer_that_is_chosen_is_the_one_that_is_shown_in_whatever_order_they_are(dock, viewer):
    viewer.add_image(np.zeros((3, 40, 50)), name="another")
    viewer.layers.move(1, 0)
    assert [dock.volume.layers.itemText(i) for i in range(2)] == ["another", "nuclei"]
    assert dock.volume.layers.currentText() == "nuclei"
    dock.volume.layers.setCurrentIndex(0)
    dock.volume.layers.activated.emit(0)
    assert dock.volume.value().name == "another"
    viewer.layers["another"].name = "renamed"
    assert dock.volume.layers.currentText() == "renamed"


def test_the_teacher_that_answers_is_the_one_that_was_chosen_last(dock, qtbot, painted_truth):
    paint(dock, painted_truth, [2])
    dock.preview.on.setChecked(True)
    for source in (TEACHER, PROTOTYPES):  # the first is still being told
        choose_source(dock, source)
    qtbot.waitUntil(lambda: dock.preview.model() is not None, timeout=60_000)
    assert type(dock.preview.model().teacher).__name__ == "PrototypeTeacher"
    for source in (TEACHER, PROTOTYPES, TEACHER):
        choose_source(dock, source)
    qtbot.waitUntil(lambda: dock.preview.model() is not None, timeout=60_000)
    assert type(dock.preview.model().teacher).__name__ == "DcamaTeacher"


def test_a_teacher_told_of_one_volume_does_not_answer_for_another(dock, viewer, qtbot, painted_truth):
    paint(dock, painted_truth, [2])
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        choose_source(dock, PROTOTYPES)
    viewer.add_image(np.zeros((3, 40, 50)), name="another")
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    assert dock.preview.model() is None
    assert "no slice is annotated" in dock.preview.message.text()


def test_planes_of_one_volume_are_not_suggested_for_another(dock, viewer, qtbot, student):
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.support.way.setCurrentText("least sure")
    dock.support.suggest.click()
    viewer.add_image(np.zeros((3, 40, 50)), name="another")
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    finish(qtbot, dock)
    assert dock.support.suggested == []


def test_two_viewers_distill_at_the_same_time(dock, sample, open_dock, qtbot, tmp_path, few, painted_truth):
    from napari.components import ViewerModel

    other = ViewerModel()
    other.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    second = open_dock(other, tmp_path / "kept")
    second.distill.settings.setValue(few)
    for each in (dock, second):
        paint(each, painted_truth, [2])
        each.distill.start()
    for each in (dock, second):
        finish(qtbot, each)
        assert each.session.model is not None
    assert dock.session.model_path.parent != second.session.model_path.parent


def test_opening_a_file_shows_it_lazily_and_chooses_it(viewer, open_dock, open_path, tmp_path, sample):
    tifffile.imwrite(tmp_path / "stack.tif", sample.image, photometric="minisblack", metadata={"axes": "ZYX"})
    dock = open_dock(viewer)
    open_path(dock, tmp_path / "stack.tif")
    assert dock.volume.value().volume.path == tmp_path / "stack.tif"
    assert viewer.layers[0].axis_labels == ("z", "y", "x")
    assert not isinstance(viewer.layers[0].data, np.ndarray)
    open_path(dock, tmp_path / "none.tif")
    assert "no such file" in dock.volume.message.text()


def test_an_address_is_opened_lazily_in_another_thread(viewer, open_dock, tmp_path, qtbot, monkeypatch):
    pytest.importorskip("aiohttp", reason="needs aiohttp: pip install aiohttp")
    from servers import serve_http
    from volumes import noise, write_ome_zarr

    monkeypatch.setattr("distillfss_core.volumes.remote.PAUSES", ())
    image = noise((2, 4, 40, 36))
    write_ome_zarr(tmp_path / "a.ome.zarr", image, axes="czyx", scale=(1, 2, 0.5, 0.5))
    dock = open_dock(viewer)
    with serve_http(tmp_path) as server:
        dock.volume.open_path(f"{server.address}/a.ome.zarr")
        qtbot.waitUntil(lambda: dock.volume.value() is not None, timeout=60_000)
        assert viewer.layers[0].name == "a.ome.zarr"
        dock.volume.lead["c"].setValue(1)
        volume = dock.volume.value().volume
        assert volume.address == f"{server.address}/a.ome.zarr"
        np.testing.assert_array_equal(volume.plane(3), image[1, 3])
        np.testing.assert_array_equal(np.asarray(viewer.layers[0].data[0][0, 2]), image[0, 2])
        assert tuple(volume.scale) == (2, 0.5, 0.5)
        dock.volume.open_path(f"{server.address}/none.zarr")
        qtbot.waitUntil(lambda: "no zarr is there" in dock.volume.message.text(), timeout=60_000)
        assert f"{server.address}/none.zarr" in dock.volume.message.text()
        assert len(viewer.layers) == 1


@pytest.mark.parametrize(("axes", "chosen"), [("TZYX", (2,)), ("CZYX", (1,)), ("TZCYX", (2, 1))])
def test_of_a_file_with_times_and_channels_one_is_chosen_in_the_dock(
    axes, chosen, viewer, open_dock, open_path, tmp_path
):
    sizes = {"T": 3, "C": 2, "Z": 4, "Y": 40, "X": 50}
    data = np.random.default_rng(0).integers(0, 999, [sizes[a] for a in axes]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "many.ome.tif", data, photometric="minisblack", metadata={"axes": axes})
    dock = open_dock(viewer)
    open_path(dock, tmp_path / "many.ome.tif")
    letters = axes.lower().replace("z", "").removesuffix("yx")
    for letter, at in zip(letters, chosen, strict=True):
        dock.volume.lead[letter].setValue(at)
    volume = dock.volume.value().volume
    assert volume.path == tmp_path / "many.ome.tif"
    at = dict(zip(letters, chosen, strict=True))
    index = tuple(at.get(a, 3 if a == "z" else slice(None)) for a in axes.lower())
    np.testing.assert_array_equal(volume.plane(3), data[index])
    shown = viewer.layers[0].data[(*chosen, 3)]
    np.testing.assert_array_equal(np.asarray(shown), data[index])


def test_the_line_below_the_list_sums_up_the_ticked_slices(viewer, nuclei, open_dock, painted_truth):
    dock = open_dock(viewer)
    total = dock.support.total
    assert total.isHidden()
    annotations = dock.session.annotations
    for z in (2, 5):
        annotations.put(z, painted_truth[z])
    half = np.zeros_like(painted_truth[6])
    half[:48] = 1
    annotations.put(6, half)
    dock.session.painted()
    pixels = [int((painted_truth[[2, 5]] == label).sum()) for label in (1, 2)]
    text = f"3 slices, 83 % labeled; pixels: background {short(pixels[0] + 48 * 96)}, object {short(pixels[1])}"
    assert total.text() == text
    assert not total.isHidden()
    dock.support.list.item(2).setCheckState(Qt.CheckState.Unchecked)
    assert total.text().startswith("2 slices, 100 % labeled")
    dock.session.set_classes((Class("nucleus of a cell", "#ff0000"),))
    assert f"nucleus of a cell {short(pixels[1])}" in total.text()
    for z in (2, 5, 6):
        annotations.put(z, np.zeros_like(half))
    dock.session.painted()
    assert total.isHidden()


def test_channels_are_chosen_by_the_names_in_the_file(viewer, open_dock, open_path, tmp_path):
    data = np.random.default_rng(0).integers(0, 999, (2, 4, 40, 50)).astype(np.uint16)
    about = {"axes": "CZYX", "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(tmp_path / "two.ome.tif", data, photometric="minisblack", metadata=about)
    dock = open_dock(viewer)
    open_path(dock, tmp_path / "two.ome.tif")
    box = dock.volume.lead["c"]
    assert [box.itemText(n) for n in range(box.count())] == ["DAPI", "GFP"]
    box.setCurrentText("GFP")
    np.testing.assert_array_equal(dock.volume.value().volume.plane(3), data[1, 3])
    assert viewer.dims.current_step[0] == 1
    layer = viewer.layers[0]
    viewer.add_image(np.stack([data[0]] * 3), name="plain", axis_labels=("c", "z", "y", "x"))
    for name, texts in (("plain", ["0", "1", "2"]), (layer.name, ["DAPI", "GFP"])):
        row = dock.volume.layers.findText(name)
        dock.volume.layers.setCurrentIndex(row)
        dock.volume.layers.activated.emit(row)
        assert [box.itemText(n) for n in range(box.count())] == texts


def test_a_layer_that_napari_has_opened_has_the_names_of_its_channels_too(viewer, open_dock, tmp_path):
    data = np.random.default_rng(0).integers(0, 999, (2, 4, 40, 50)).astype(np.uint16)
    about = {"axes": "CZYX", "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(tmp_path / "two.ome.tif", data, photometric="minisblack", metadata=about)
    _initialize_plugins()
    viewer.open(tmp_path / "two.ome.tif", plugin="napari")
    box = open_dock(viewer).volume.lead["c"]
    assert [box.itemText(n) for n in range(box.count())] == ["DAPI", "GFP"]


def send_wheel(box):
    from qtpy.QtCore import QPoint, QPointF, Qt
    from qtpy.QtGui import QWheelEvent
    from qtpy.QtWidgets import QApplication

    place, down = QPointF(5, 5), QPoint(0, -120)
    buttons, keys = Qt.MouseButton.NoButton, Qt.KeyboardModifier.NoModifier
    event = QWheelEvent(place, place, down, down, buttons, keys, Qt.ScrollPhase.NoScrollPhase, False)
    QApplication.sendEvent(box, event)
    return event


def test_the_wheel_changes_no_box_that_has_no_focus(dock):
    from qtpy.QtWidgets import QAbstractSpinBox, QComboBox

    dock.distill.settings.more.setCurrentIndex(1)
    boxes = [box for kind in (QComboBox, QAbstractSpinBox) for box in dock.widget().findChildren(kind)]
    assert {dock.distill.settings.preset, dock.support.count, dock.objects.radius} <= set(boxes)
    texts = [box.currentText() if isinstance(box, QComboBox) else box.text() for box in boxes]
    events = [send_wheel(box) for box in boxes]
    assert [box.currentText() if isinstance(box, QComboBox) else box.text() for box in boxes] == texts
    assert not any(event.isAccepted() for event in events[:1])


@pytest.mark.parametrize("letter", ["t", "c"])
def test_sliders_of_time_and_channel_are_those_of_the_dock(letter, viewer, open_dock, qtbot, sample):
    image = np.stack([sample.image] * 4)
    viewer.add_image(image, name="series", axis_labels=(letter, "z", "y", "x"), translate=(7, 0, 0, 0))
    dock = open_dock(viewer)
    box = dock.volume.lead[letter]
    dock.support.paint.click()
    viewer.dims.set_current_step(0, 3)
    qtbot.waitUntil(lambda: box.value() == 3)
    assert dock.session.volume.lead == {letter: 3}
    dock.support.paint.click()
    dock.support.layer.paint((0, 4, 40, 40), 2)
    assert dock.session.annotations.planes() == [4]
    box.setValue(1)
    assert viewer.dims.point[0] == 8
    assert dock.session.annotations.planes() == []


def test_labels_of_a_volume_with_more_axes_are_shown_where_the_sliders_are(viewer, open_dock, qtbot, sample, student):
    viewer.add_image(sample.image, name="stack")
    viewer.add_image(np.stack([sample.image] * 3), name="series", axis_labels=("t", "z", "y", "x"))
    dock = open_dock(viewer)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    viewer.dims.set_current_step(0, 2)
    for name in ("stack", "series", "stack", "series"):
        row = dock.volume.layers.findText(name)
        dock.volume.layers.setCurrentIndex(row)
        with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
            dock.volume.layers.activated.emit(row)
        dock.support.rest.click()
        preview = dock.preview.layers["labels"]
        for layer, expected in ((dock.support.layer, 1), (preview, preview.data[..., 40, 40].item())):
            point = (2, dock.support.plane(), 40, 40)[-layer.ndim :]
            assert layer.get_value(point, world=True) == expected
    assert dock.session.volume.lead == {"t": 2}


def test_the_annotation_layer_of_a_closed_dock_is_taken_up(viewer, nuclei, open_dock):
    first = open_dock(viewer)
    first.support.paint.click()
    layer, z = first.support.layer, first.support.plane()
    layer.paint((z, 20, 20), 2)
    first.session.close()
    layer.paint((z, 60, 60), 2)  # after the dock was closed
    again = open_dock(viewer, first.session.folder)
    assert again.support.layer is layer
    assert [other.name for other in viewer.layers] == ["nuclei", "nuclei annotations"]
    layer.paint((z, 40, 40), 2)
    painted = again.session.annotations.plane(z)
    assert [painted[k, k] for k in (20, 40, 60)] == [2, 2, 2]
    again.session.close()
    viewer.layers.remove(nuclei)
    assert open_dock(viewer, first.session.folder).support.layer is None
    assert not layer.visible


def test_classes_and_brush_are_those_of_all_time_points(viewer, open_dock, sample):
    from napari_distillfss._annotations import Class

    viewer.add_image(np.stack([sample.image] * 3), name="series", axis_labels=("t", "z", "y", "x"))
    dock = open_dock(viewer)
    dock.volume.lead["t"].setValue(0)
    dock.support.rest.click()  # while there is one class
    dock.volume.lead["t"].setValue(1)
    dock.support.classes.setValue((Class("object", "#111111"), Class("debris", "#222222")))
    dock.support.classes.setBrush(3)
    for t in (2, 0):
        dock.volume.lead["t"].setValue(t)
        assert dock.session.annotations.class_names == ("object", "debris")
        assert dock.support.classes.brush() == dock.support.layer.selected_label == 3
    folder = dock.session.annotations.folder
    assert Annotations(folder, (1, 8, 96, 96), lambda z: (0, z)).class_names == ("object", "debris")
    dock.volume.lead["t"].setValue(2)
    folder = dock.session.annotations.folder
    assert not (folder / "notes.json").exists()
    dock.support.layer.paint((0, 4, 40, 40), 3)
    assert Annotations(folder, (1, 8, 96, 96), lambda z: (0, z)).class_names == ("object", "debris")
    dock.support.classes.setValue((Class("cell", "#111111"), Class("debris", "#222222")))
    dock.volume.lead["t"].setValue(0)
    assert dock.session.annotations.class_names == ("object", "debris")  # painted under these names


def test_a_layer_with_another_name_keeps_its_annotations(viewer, open_dock, sample):
    layer = viewer.add_image(np.stack([sample.image] * 2), name="series", axis_labels=("t", "z", "y", "x"))
    dock = open_dock(viewer)
    dock.support.rest.click()
    folder, planes = dock.session.annotations.folder, dock.session.annotations.planes()
    layer.name = "embryo"
    for t in (1, 0):
        dock.volume.lead["t"].setValue(t)
    assert dock.session.annotations.folder == folder
    assert dock.session.annotations.planes() == planes != []
    assert dock.session.volume.name == "embryo"
    dock.session.close()
    again = open_dock(viewer, dock.session.folder)
    assert again.session.annotations.planes() == planes


def test_the_preview_of_a_corrected_plane_is_hidden_until_it_is_wanted_again(dock, viewer, qtbot, student):
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    layer = dock.preview.layers["labels"]
    assert layer.visible
    dock.preview.take.click()
    assert not layer.visible
    assert "hidden while you correct it" in dock.preview.message.text()
    z = dock.preview.plane
    dock.support.go_to(z + 1)
    qtbot.waitUntil(lambda: dock.preview.plane == z + 1 and layer.visible, timeout=60_000)


def test_a_teacher_follows_strokes_on_a_slice_that_had_labels(dock, qtbot, painted_truth):
    paint(dock, painted_truth, [2])
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        choose_source(dock, PROTOTYPES)
    first = dock.preview.model()
    dock.support.paint.click()
    painted = painted_truth[2].copy()
    painted[:, :] = painted[::-1]  # as many pixels of each label as before
    dock.session.annotations.put(2, painted)
    dock.session.painted()
    qtbot.waitUntil(lambda: dock.preview.model() is not first, timeout=60_000)


def test_colors_of_the_preview_are_those_of_the_classes_of_the_same_name(dock, qtbot, student):
    from napari_distillfss._annotations import Class

    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    layer = dock.preview.layers["labels"]
    dock.support.classes.setValue((Class("other", "#00ff00"), Class("object", "#0000ff")))
    np.testing.assert_allclose(layer.colormap.map(np.array([1]))[0, :3], (0, 0, 1))


def test_colors_of_applied_labels_follow_the_classes_of_the_same_name(dock, viewer, qtbot, student, sample, tmp_path):
    from napari_distillfss._annotations import Class

    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.support.classes.setValue((Class("other", "#00ff00"), Class("object", "#0000ff"), Class("third", "#ff0000")))
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)

    def color():
        return dock.apply.layer.colormap.map(np.array([1]))[0, :3]

    np.testing.assert_allclose(color(), (0, 0, 1))
    dock.support.classes.setValue((Class("object", "#ffff00"),))
    np.testing.assert_allclose(color(), (1, 1, 0))
    viewer.add_image(sample.image[:4] * 2, name="another")
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    dock.support.classes.setValue((Class("object", "#ff0000"),))
    np.testing.assert_allclose(color(), (1, 1, 0))  # of another volume


def test_labels_of_another_student_name_the_box_that_replaces_them(dock, qtbot, student, few, tmp_path, sample):
    from dataclasses import replace

    from distillfss_core import AnnotatedSlice, SupportSet, distill

    other = distill(SupportSet([AnnotatedSlice(sample.image[0], (sample.labels[0] > 0).astype(np.uint8))]),
                    replace(few, seed=9))  # fmt: skip
    other.save(tmp_path / "other.safetensors")
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    for path in (student, tmp_path / "other.safetensors"):
        dock.model.load_from(path)
        finish(qtbot, dock)
        dock.apply.start()
        finish(qtbot, dock)
    assert dock.apply.replace.text() in dock.apply.message.text()
    dock.apply.replace.setChecked(True)
    dock.apply.start()
    finish(qtbot, dock)
    assert dock.apply.message.text().startswith("Done")


def test_the_watershed_takes_the_radius_of_annotated_objects_within_its_limit(viewer, sample, open_dock, qtbot, student,
                                                                              tmp_path, monkeypatch):  # fmt: skip
    viewer.add_image(sample.image, name="nuclei", scale=(0.5, 0.25, 0.25), units=("um",) * 3)
    dock = open_dock(viewer)
    yy, xx = np.mgrid[:96, :96]
    disk = ((yy - 40) ** 2 + (xx - 40) ** 2 <= 10**2).astype(np.uint8) + 1
    dock.session.annotations.put(2, disk)
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    readers = set()
    plane = Annotations.plane
    monkeypatch.setattr(Annotations, "plane", lambda *args: readers.add(current_thread()) or plane(*args))
    dock.objects.method.setCurrentIndex(1)
    assert not dock.objects.count.isEnabled()  # it would take another radius
    qtbot.waitUntil(dock.objects.count.isEnabled)
    assert readers
    assert main_thread() not in readers
    assert dock.objects.radius.value() == pytest.approx(2.5, rel=0.02)  # 10 pixels of 0.25 µm
    assert dock.objects.radius.suffix() == " µm"
    dock.objects.start()
    finish(qtbot, dock)
    assert "object" in dock.objects.message.text()
    assert not dock.objects.message.warns


def test_a_probe_is_trained_previewed_and_refined(dock, qtbot, painted_truth, sample):
    paint(dock, painted_truth, [2])
    dock.distill.settings.setPreset("probe")
    dock.show()
    for start, planes in ((dock.distill.start, [2]), (dock.distill.start_refining, [2, 5])):
        paint(dock, painted_truth, planes)
        start()
        finish(qtbot, dock)
        assert dock.distill.message.text().startswith("Done: probe in ")
        assert not dock.distill.plot.isVisible()
        model = dock.session.model
        assert model.training["support"] == [f"plane {z}" for z in planes]
        found, truth = model.predict_labels(sample.image[6]) > 0, sample.labels[6] > 0
        assert (found & truth).sum() > 0.6 * (found | truth).sum()
    kept = [KeptStudent(path, read_card(path)) for path in dock.session.students()]
    shown = [student.describe().splitlines()[1:] for student in kept]
    reason = "no IoU to expect, as a probe is not measured"
    assert [(line.rpartition(", ")[2], why) for line, why in shown] == [("probe", reason)] * 2


@pytest.mark.parametrize(("preset", "steps"), [("quick", 16), ("thorough", 240), ("default", 0), ("own settings", 9)])
def test_refining_takes_a_fifth_of_the_steps(preset, steps, dock, qtbot, student, painted_truth, monkeypatch):
    from napari_distillfss._widgets import distill

    seen = []

    def note(maker, settings, model, keep, stop, volume):
        seen.append(settings.steps)
        assert volume is None  # without a foundation model, no planes without labels are read
        yield from ()
        return None

    dock.model.load_from(student)
    finish(qtbot, dock)
    paint(dock, painted_truth, [2])
    monkeypatch.setattr(distill, "iter_training", note)
    if preset == "own settings":
        dock.distill.settings.setPreset("quick")
        dock.distill.settings.form.boxes["steps"].value = 5 * steps
    else:
        dock.distill.settings.setPreset(preset)
    assert dock.distill.settings.preset.currentText() == preset
    for start in (dock.distill.start_refining, dock.distill.start):
        start()
        finish(qtbot, dock)
    assert seen == [steps, 5 * steps]


@pytest.mark.parametrize("has_begun", [False, True])
def test_cancel_is_acknowledged_while_a_training_starts_or_goes_on(dock, qtbot, painted_truth, monkeypatch, has_begun):
    """What is only prepared ends at once; a training ends its step, and its student is kept."""
    from distillfss_core import TrainStep
    from napari_distillfss._tasks import Doing
    from napari_distillfss._widgets import distill

    go_on = threading.Event()

    def starting(*_):
        yield TrainStep(1, 9, stage="joint" if has_begun else "zoom")
        yield Doing("reading the annotated slices")
        go_on.wait(20)
        yield Doing("loading the backbone")

    monkeypatch.setattr(distill, "iter_training", starting)
    paint(dock, painted_truth, [2])
    dock.distill.start()
    (bar,) = dock.distill.findChildren(JobBar)
    qtbot.waitUntil(lambda: "Reading" in bar.text.text())
    (cancel,) = [b for b in bar.findChildren(QPushButton) if b.text() == "Cancel"]
    shown = []
    dock.distill.job.stepped.connect(lambda _: shown.append(bar.text.text()))
    cancel.click()
    assert bool(dock.session.busy) is has_begun
    if not has_begun:
        assert "nothing was changed" in dock.distill.message.text()
        assert dock.distill.distill.isEnabled()
    go_on.set()
    finish(qtbot, dock)
    qtbot.waitUntil(lambda: not any("Training" in thread.name for thread in threading.enumerate()))
    qtbot.wait(20)
    assert shown == (["Stopping…"] if has_begun else [])


@pytest.mark.parametrize("is_import", [False, True])
def test_an_import_ends_its_step_and_a_suggestion_at_once(dock, qtbot, is_import):
    """An import changes annotations: what it has taken over is shown."""
    go_on = threading.Event()

    def work(_):
        yield
        go_on.wait(20)

    dock.support._start(support._IMPORT if is_import else support._SUGGESTION, work, lambda _: None)
    (bar,) = [bar for bar in dock.support.findChildren(JobBar) if bar._job is dock.support.job]
    bar.stop()
    assert bool(dock.session.busy) is is_import
    go_on.set()
    finish(qtbot, dock)


def reopened(dock, sample, open_dock, tmp_path):
    """Another session on the same volume, after the first has ended."""
    from napari.components import ViewerModel

    dock.session.close()
    viewer = ViewerModel()
    viewer.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    return open_dock(viewer)


def test_a_reopened_volume_has_its_latest_student_again(dock, qtbot, painted_truth, student, sample, open_dock,
                                                        tmp_path, monkeypatch):  # fmt: skip
    from qtpy.QtWidgets import QFileDialog

    paint(dock, painted_truth, [2])
    folder = dock.session.annotations.folder
    for number in (2, 10):
        (folder / f"student-{number}.safetensors").write_bytes(student.read_bytes())
    again = reopened(dock, sample, open_dock, tmp_path)
    finish(qtbot, again)
    assert again.session.model is not None
    assert again.session.model_path == folder / "student-10.safetensors"
    begun_in = []
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *how: begun_in.append(how[2]) or ("", ""))
    again.model.load.click()
    assert begun_in[0].startswith(str(folder))


def test_another_volume_has_its_own_student_but_one_of_a_file_stays(dock, qtbot, painted_truth, student, sample):
    def choose(name):
        place = dock.volume.layers.findText(name)
        dock.volume.layers.setCurrentIndex(place)
        dock.volume.layers.activated.emit(place)
        finish(qtbot, dock)

    paint(dock, painted_truth, [2])
    first = dock.session.annotations.folder / "student-1.safetensors"
    first.write_bytes(student.read_bytes())
    dock.viewer.add_image(255 - sample.image, name="second")
    choose("second")
    assert dock.session.model is None
    paint(dock, painted_truth, [3])
    second = dock.session.annotations.folder / "student-1.safetensors"
    second.write_bytes(student.read_bytes())
    for name, path in (("nuclei", first), ("second", second), ("nuclei", first)):
        choose(name)
        assert dock.session.model_path == path
    dock.model.load_from(student)
    finish(qtbot, dock)
    choose("second")
    assert dock.session.model_path == student


def test_objects_of_labels_written_before_are_counted(viewer, open_dock, open_path, qtbot, student, tmp_path, sample):
    from napari.components import ViewerModel

    tifffile.imwrite(tmp_path / "stack.tif", sample.image, photometric="minisblack", metadata={"axes": "ZYX"})
    first = open_dock(viewer)
    open_path(first, tmp_path / "stack.tif")
    first.model.load_from(student)
    finish(qtbot, first)
    first.apply.start()
    finish(qtbot, first)
    first.session.close()
    dock = open_dock(ViewerModel())
    assert not dock.objects.count.isEnabled()
    open_path(dock, tmp_path / "stack.tif")
    assert dock.objects.count.isEnabled()
    dock.objects.start()
    finish(qtbot, dock)
    assert "object" in dock.objects.message.text()
    assert (tmp_path / "stack-labels-objects.csv").is_file()


def test_a_second_window_says_where_its_annotations_are_kept(dock, sample, open_dock, tmp_path):
    from napari.components import ViewerModel

    other = ViewerModel()
    other.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    second = open_dock(other, tmp_path / "kept")
    assert second.support.message.warns
    assert "open in another window" in second.support.message.text()
    assert re.search(rf"\(process {os.getpid()}, since \d\d:\d\d\)", second.support.message.text())
    assert str(second.session.annotations.folder) in second.support.message.text()
    assert not dock.support.message.warns


@pytest.mark.parametrize("painted_first", [[], [1, 3]])
def test_what_is_painted_in_a_second_window_is_offered_and_comes_back(
    dock, sample, open_dock, qtbot, tmp_path, painted_truth, painted_first, monkeypatch
):
    from napari.components import ViewerModel
    from qtpy.QtWidgets import QInputDialog

    def opened():
        viewer = ViewerModel()
        viewer.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
        return open_dock(viewer, tmp_path / "kept")

    paint(dock, painted_truth, painted_first)
    second = opened()
    paint(second, painted_truth, [5])
    assert not second.support.restore.isEnabled()  # what the first window has is its own
    for window in (second, dock):
        window.session.close()
    again = opened()
    assert again.session.annotations.planes() == painted_first
    assert "painted in a second window: Restore… has them" in again.support.message.text()
    assert not again.support.message.warns
    monkeypatch.setattr(
        QInputDialog, "getItem", lambda *asked: (asked[3][0], "painted in a second window" in asked[3][0])
    )
    again.support.restore.click()
    assert again.session.annotations.planes() == [5]
    np.testing.assert_array_equal(again.session.annotations.plane(5), painted_truth[5])
    assert "second window" not in again.support.message.text()
    assert len(again.session.restorable()) == bool(painted_first)
    if painted_first:
        again.session.restore(again.session.restorable()[0])
        assert again.session.annotations.planes() == painted_first


def test_a_second_window_that_outlives_the_first_restores_into_the_volume(
    dock, sample, open_dock, tmp_path, painted_truth
):
    from napari.components import ViewerModel

    other = ViewerModel()
    other.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    second = open_dock(other, tmp_path / "kept")
    paint(dock, painted_truth, [1])
    paint(second, painted_truth, [5])
    second.session.use_also([second.session.others()[0].key])
    own, apart = dock.session.annotations.folder, second.session.annotations.folder
    dock.session.close()
    assert second.session.restorable() == [own]
    second.session.restore(own)
    assert second.session.annotations.folder == own
    assert second.session.annotations.planes() == [1]
    second.session.restore(second.session.restorable()[0])
    assert second.session.annotations.planes() == [5]
    assert second.session.annotations.also == ()  # its own slices are not those of another volume
    assert not apart.exists()


@pytest.fixture
def second(applying, sample, open_dock, qtbot, student, tmp_path):
    """The same volume in another window, while the first one applies a model."""
    from napari.components import ViewerModel

    other = ViewerModel()
    other.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    second = open_dock(other, tmp_path / "kept")
    second.model.load_from(student)
    finish(qtbot, second)
    second.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    return second


def test_two_windows_that_write_the_same_labels_lose_nothing(applying, second, qtbot, student, tmp_path, sample, held):
    second.apply.start()
    finish(qtbot, second)
    assert "another run is writing here; wait for it, or stop it" in second.apply.message.text()
    assert second.apply.message.warns
    assert not second.apply.layer.visible
    assert second.preview.on.isChecked()  # nothing is shown in its place
    assert applying.apply.job.running
    held.set()
    finish(qtbot, applying)
    assert applying.apply.message.text().startswith("Done")
    second.apply.start()
    finish(qtbot, second)
    assert "8 found finished" in second.apply.message.text()
    assert_written(tmp_path, student, sample.image)


@pytest.mark.parametrize("is_closed", ["session", "layers"])
def test_the_first_window_is_closed_while_the_second_works(
    is_closed, applying, second, viewer, qtbot, student, tmp_path, sample, held, painted_truth
):
    paint(second, painted_truth, [4])
    folder = second.session.annotations.folder
    assert second.session.first_window is not None
    if is_closed == "session":
        applying.session.close()
    else:
        viewer.layers.clear()
        held.set()
    finish(qtbot, applying)
    second.apply.start()  # goes on from there
    held.set()
    finish(qtbot, second)
    assert second.apply.message.text().startswith("Done")
    assert "found finished" in second.apply.message.text()
    assert_written(tmp_path, student, sample.image)
    assert (second.session.annotations.folder, second.session.annotations.planes()) == (folder, [4])
    paint(second, painted_truth, [5])
    np.testing.assert_array_equal(zarr.open_array(folder / "labels.zarr", mode="r")[5], painted_truth[5])


@pytest.mark.parametrize(("planes", "text"), [(1, "Paint in plane 0: some"), (8, "Paint in planes 0, 7: some")])
def test_the_planes_to_paint_are_named_in_their_number(viewer, open_dock, qtbot, planes, text):
    viewer.add_image(np.zeros((planes, 32, 32), np.uint8), name="stack")
    dock = open_dock(viewer)
    dock.support.count.setValue(2)
    dock.support.way.setCurrentText("evenly")
    dock.support.suggest_slices()
    qtbot.waitUntil(lambda: not dock.support.selecting.running)
    assert dock.support.message.text().startswith(text)


def test_a_model_that_is_loaded_is_not_notified_but_one_that_is_missing_is(dock, qtbot, student, tmp_path, told):
    assert not dock.model.isVisible()  # where the end of other jobs is notified
    dock.model.load_from(student)
    finish(qtbot, dock)
    assert told() == []
    dock.model.load_from(tmp_path / "none.safetensors")
    finish(qtbot, dock)
    assert "Model loading has failed" in " ".join(told())


def test_rows_of_slices_name_the_present_classes(dock, painted_truth):
    from napari_distillfss._annotations import Class

    paint(dock, painted_truth, [2])
    assert "object" in _texts(dock.support.list)
    dock.support.classes.setValue((Class("nucleus", "#112233"),))
    assert "nucleus" in _texts(dock.support.list)
    assert "object" not in _texts(dock.support.list)


def test_the_table_and_messages_of_a_volume_end_with_it(dock, viewer, qtbot, student, tmp_path):
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    dock.objects.start()
    finish(qtbot, dock)
    assert not dock.objects.table.isHidden()
    viewer.add_image(np.zeros((3, 40, 50)), name="another")
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    assert dock.objects.table.isHidden()
    assert "object" in dock.objects.message.text()
    assert "measures in" not in dock.objects.message.text()
    assert not dock.apply.message.text().startswith("Done")


def test_the_dock_for_a_student_shows_the_student_before_preview_and_apply(viewer, nuclei, qtbot, tmp_path):
    from napari_distillfss._widgets.dock import ApplyDock

    dock = ApplyDock(viewer, tmp_path / "kept")
    layout = dock.widget().layout()
    sections = [layout.itemAt(row).widget() for row in range(layout.count()) if layout.itemAt(row).widget()]
    shown = [section.heading.text() for section in sections if not section.isHidden()]
    assert shown == ["1  Volume", "2  Model", "3  Preview", "4  Apply", "5  Objects"]
    assert sections[1].heading.isChecked()
    dock.session.close()
    dock.deleteLater()


def test_the_dock_for_a_student_asks_for_nothing_that_it_has_not(viewer, sample, qtbot, student, tmp_path):
    from qtpy.QtWidgets import QAbstractButton

    from napari_distillfss._widgets._common import Message
    from napari_distillfss._widgets.dock import ApplyDock

    dock = ApplyDock(viewer, tmp_path / "kept")
    hidden = [dock.sections[part] for part in (dock.support, dock.distill)]
    hidden += [dock.preview.live, dock.preview.source.parentWidget(), dock.preview.take]

    def asked():
        parts = [w for w in dock.widget().findChildren(QWidget) if not any(h is w or h.isAncestorOf(w) for h in hidden)]
        texts = [w.toolTip() for w in parts] + [w.text() for w in parts if isinstance(w, (Message, QAbstractButton))]
        assert len(texts) > 50
        return [t for t in texts if re.search(r"\b(train|refine|paint|annotate|suggest)\b", t, re.IGNORECASE)]

    assert asked() == []
    assert dock.apply.message.text() == "Load a model first"
    layer = viewer.add_image(sample.image, name="nuclei")
    assert asked() == []
    for start in (dock.apply.start, dock.apply.batch.start, dock.objects.start, dock.preview.on.click):
        start()
    assert asked() == []
    assert dock.apply.message.text() == dock.apply.batch.message.text() == "there is no model yet; load one first"
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    assert dock.apply.message.text().startswith("Ready")
    assert dock.apply.batch.message.text() == ""
    viewer.layers.remove(layer)
    assert asked() == []
    dock.session.close()
    dock.deleteLater()


def test_a_copied_path_is_one_that_is_free(tmp_path):
    from napari_distillfss._scripts import free_name

    path = tmp_path / "a b.ome.zarr"
    assert free_name(path) == path
    path.mkdir()
    assert free_name(path) == tmp_path / "a b-again.ome.zarr"
    (tmp_path / "a b-again.ome.zarr").mkdir()
    assert free_name(path) == tmp_path / "a b-again2.ome.zarr"


def test_cancel_at_the_end_of_a_training_keeps_its_student_at_once(dock, qtbot, painted_truth, few, monkeypatch):
    """All steps are made; how far tiles have to overlap is still being measured."""
    from distillfss_core import StudentModel
    from distillfss_core.models.segmenter import Segmenter

    measuring, go_on = Event(), Event()
    monkeypatch.setattr(Segmenter, "fit_halo", lambda self, image: measuring.set() or go_on.wait(60))
    paint(dock, painted_truth, [2])
    dock.distill.settings.setValue(few)
    dock.distill.start()
    (bar,) = dock.distill.findChildren(JobBar)
    qtbot.waitUntil(lambda: measuring.is_set() and dock.distill._kept is not None, timeout=60_000)
    bar.cancel.click()
    assert not dock.session.busy
    assert dock.distill.message.text().startswith("Stopped: 3 steps")
    path = dock.session.model_path
    written = path.read_bytes()
    assert StudentModel.load(path).halo == dock.session.model.halo
    go_on.set()
    qtbot.waitUntil(lambda: not [t for t in threading.enumerate() if t.name == "distillfss Training"], timeout=60_000)
    assert path.read_bytes() == written


def test_a_disabled_button_says_why(viewer, open_dock, nuclei, painted_truth):
    dock = open_dock(viewer)
    dock.objects.of_class.addItem("object")
    explained = [w for w in dock.widget().findChildren(QPushButton) if not w.isEnabled() and not w.isHidden()]
    assert {dock.distill.distill, dock.distill.refine, dock.support.remove, dock.apply.apply} <= set(explained)
    assert not [w.text() for w in explained if "Not now: " not in w.toolTip()]
    paint(dock, painted_truth, [2])
    assert dock.distill.distill.isEnabled()
    assert "Not now" not in dock.distill.distill.toolTip()
    dock.session.busy = "Segmentation"
    assert "Not now: Segmentation is running" in dock.distill.distill.toolTip()
    dock.session.busy = ""


def test_a_training_that_cannot_start_leaves_no_empty_plot(dock, qtbot, painted_truth):
    paint(dock, np.where(painted_truth == 2, 2, 0).astype(np.uint8), [2])
    dock.distill.start()
    finish(qtbot, dock)
    assert "background" in dock.distill.message.text()
    assert dock.distill.plot.isHidden()


def test_who_corrects_a_plane_has_the_brush(dock, qtbot, student):
    dock.model.load_from(student)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        finish(qtbot, dock)
    dock.preview.take.click()
    assert dock.viewer.layers.selection.active is dock.support.layer
    assert str(dock.support.layer.mode) == "paint"
