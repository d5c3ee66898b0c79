"""Many volumes are segmented from the dock: files of a folder, image layers, and all their time points."""

import csv
import threading

import numpy as np
import pytest
import tifffile
import zarr

from distillfss_core import StudentModel, open_volume, segment_lazy
from napari_distillfss._widgets.batch import FILES, LAYERS, LIST, SELECTED


def finish(qtbot, dock):
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=120_000)


def labels_of(path):
    return zarr.open_array(path / "0", mode="r")[:]


def report_of(out, name="report.csv"):
    with open(out / name, newline="") as file:
        return list(csv.DictReader(file))


def statuses(batch):
    return [[batch.rows.item(r, c).text() for c in range(2)] for r in range(batch.rows.rowCount())]


@pytest.fixture
def batch(viewer, open_dock, qtbot, student, tmp_path):
    dock = open_dock(viewer)
    assert not dock.apply.batch.run.isEnabled()
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.apply.batch.out.setText(str(tmp_path / "out"))
    return dock.apply.batch


@pytest.fixture
def predicted(student):
    model = StudentModel.load(student)

    def predict(stack):
        volume = open_volume(stack)
        return np.asarray(segment_lazy(volume, model, what="labels"))

    return predict


def test_the_files_of_a_folder_are_segmented_and_one_that_fails_is_a_row(batch, qtbot, tmp_path, sample, predicted):
    folder = tmp_path / "volumes"
    folder.mkdir()
    step = {"photometric": "minisblack"}
    tifffile.imwrite(folder / "a.tif", sample.image[:2], metadata={"axes": "ZYX"}, **step)
    (folder / "b.tif").write_bytes(b"II*\0broken")
    series = np.stack([sample.image[2:4], sample.image[4:6]])
    tifffile.imwrite(folder / "c.tif", series, metadata={"axes": "TZYX"}, **step)
    assert batch.what.currentText() == FILES
    batch.folder.setText(str(folder))
    batch.start()
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    out = tmp_path / "out"
    for name, stack in (("a", sample.image[:2]), ("c_t0", series[0]), ("c_t1", series[1])):
        np.testing.assert_array_equal(labels_of(out / f"{name}.ome.zarr"), predicted(stack))
    shown = [["a.tif", "done"], ["b.tif", "failed"], ["c.tif, time 0", "done"], ["c.tif, time 1", "done"]]
    assert statuses(batch) == shown
    assert [row["status"] for row in report_of(out)] == ["done", "failed", "done", "done"]
    assert "3 of 4 volumes segmented" in batch.message.text()
    assert batch.message.warns
    note = batch.rows.item(1, 2).text()
    assert note
    assert str(folder) not in note
    batch.rows.setCurrentCell(1, 0)
    assert "b.tif" in batch.message.text()
    batch.start()  # again: what is there is taken up, and the first report is kept
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    assert [row["shards_computed"] for row in report_of(out, "report-again.csv")] == ["0", "", "0", "0"]
    assert [row["status"] for row in report_of(out)] == ["done", "failed", "done", "done"]


def test_chosen_files_of_several_folders_are_segmented(batch, qtbot, tmp_path, sample, predicted, monkeypatch):
    from qtpy.QtWidgets import QFileDialog

    paths = [tmp_path / "one" / "a.tif", tmp_path / "two" / "b.tif", tmp_path / "two" / "gone.tif"]
    for path, planes in zip(paths, (slice(0, 2), slice(2, 4)), strict=False):
        path.parent.mkdir()
        tifffile.imwrite(path, sample.image[planes], photometric="minisblack", metadata={"axes": "ZYX"})
    batch.what.setCurrentText(LIST)
    batch.start()
    assert batch.message.text() == "no file is chosen; choose some with …"
    monkeypatch.setattr(QFileDialog, "getOpenFileNames", lambda *_: ([str(path) for path in paths], ""))
    batch.browse_folder.click()
    batch.start()
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    assert statuses(batch) == [["a.tif", "done"], ["b.tif", "done"], ["gone.tif", "failed"]]
    for name, planes in (("a", slice(0, 2)), ("b", slice(2, 4))):
        np.testing.assert_array_equal(labels_of(tmp_path / "out" / f"{name}.ome.zarr"), predicted(sample.image[planes]))


def test_image_layers_and_their_time_points_are_segmented(batch, viewer, qtbot, tmp_path, sample, predicted):
    series = np.stack([sample.image[:2], sample.image[2:4], sample.image[4:6]])
    viewer.add_image(series, name="series", axis_labels=("t", "z", "y", "x"))
    viewer.add_image(sample.image[6], name="a/b.tif")
    viewer.add_image(sample.image[7], name="a:b.tif")
    viewer.add_image(np.zeros((2, 2, 2, 2, 8, 8)), name="too many")
    batch.what.setCurrentText(LAYERS)
    batch.start()
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    out = tmp_path / "out"
    for time, stack in enumerate(series):
        np.testing.assert_array_equal(labels_of(out / f"series_t{time}.ome.zarr"), predicted(stack))
    np.testing.assert_array_equal(labels_of(out / "a_b.ome.zarr"), predicted(sample.image[6:7]))
    np.testing.assert_array_equal(labels_of(out / "a_b-2.ome.zarr"), predicted(sample.image[7:8]))
    rows = report_of(out)
    assert [(row["status"], row["time"]) for row in rows] == [
        ("done", "0"),
        ("done", "1"),
        ("done", "2"),
        ("done", ""),
        ("done", ""),
        ("failed", ""),
    ]
    assert "6 dimensions" in rows[-1]["error"]


def test_without_all_time_points_the_slider_chooses(batch, viewer, qtbot, tmp_path, sample, predicted):
    series = np.stack([sample.image[:2], sample.image[2:4]])
    layer = viewer.add_image(series, name="series", axis_labels=("t", "z", "y", "x"))
    viewer.add_image(sample.image, name="other")
    viewer.layers.selection = {layer}
    viewer.dims.set_point(0, 1)
    batch.what.setCurrentText(SELECTED)
    batch.all_times.setChecked(False)
    batch.start()
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    assert [path.name for path in (tmp_path / "out").glob("*.zarr")] == ["series_t1.ome.zarr"]
    np.testing.assert_array_equal(labels_of(tmp_path / "out" / "series_t1.ome.zarr"), predicted(series[1]))


def test_a_cancel_keeps_what_is_finished_and_reports_it(batch, viewer, qtbot, tmp_path, sample, predicted):
    for name in ("first", "second"):
        viewer.add_image(sample.image[:2], name=name)
    batch.what.setCurrentText(LAYERS)
    batch.job.stepped.connect(lambda step: batch.job.cancel() if getattr(step, "row", None) else None)
    batch.start()
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    np.testing.assert_array_equal(labels_of(tmp_path / "out" / "first.ome.zarr"), predicted(sample.image[:2]))
    assert report_of(tmp_path / "out")[0]["status"] == "done"
    assert batch.message.text().startswith("Stopped")


def test_a_volume_that_fails_leaves_no_folder(batch, viewer, qtbot, tmp_path, sample):
    viewer.add_image(np.full((2, 96, 96), np.nan, np.float32), name="dark")
    viewer.add_image(sample.image[:2], name="good")
    batch.what.setCurrentText(LAYERS)
    batch.start()
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    assert statuses(batch) == [["dark", "failed"], ["good", "done"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.ome.zarr", "report.csv"]


def test_cancel_of_a_batch_ends_at_once_and_leaves_nothing_half_written(
    batch, viewer, qtbot, tmp_path, sample, monkeypatch, predicted
):
    from qtpy.QtWidgets import QPushButton

    entered, go_on, original = threading.Event(), threading.Event(), StudentModel.iter_calibrated

    def held_up(self, *args, **options):
        entered.set()
        assert go_on.wait(30)
        return original(self, *args, **options)

    monkeypatch.setattr(StudentModel, "iter_calibrated", held_up)
    viewer.add_image(sample.image[:2], name="first")
    batch.what.setCurrentText(LAYERS)
    batch.start()
    qtbot.waitUntil(entered.is_set, timeout=60_000)
    (cancel,) = [b for b in batch.findChildren(QPushButton) if b.text() == "Cancel" and b.isVisibleTo(batch)]
    cancel.click()
    assert not batch.job.running
    assert batch.message.text().startswith("Stopped")
    batch.start()  # at once: it waits for the thread
    go_on.set()
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    np.testing.assert_array_equal(labels_of(tmp_path / "out" / "first.ome.zarr"), predicted(sample.image[:2]))
    assert [row["status"] for row in report_of(tmp_path / "out")][-1] in ("done", "interrupted")


@pytest.mark.parametrize("fault", ["no folder", "missing", "same", "empty", "no layer", "unwritable"])
def test_what_a_batch_lacks_is_one_sentence(batch, qtbot, tmp_path, fault):
    (tmp_path / "volumes").mkdir()
    (tmp_path / "file").write_text("")
    batch.folder.setText("" if fault == "no folder" else str(tmp_path / ("none" if fault == "missing" else "volumes")))
    if fault == "same":
        batch.out.setText(str(tmp_path / "volumes"))
    if fault == "unwritable":
        batch.out.setText(str(tmp_path / "file" / "out"))
    if fault == "no layer":
        batch.what.setCurrentText(LAYERS)
    batch.start()
    qtbot.waitUntil(lambda: not batch.job.running, timeout=120_000)
    said = {
        "no folder": "no folder of the volumes",
        "missing": "there is no such folder",
        "same": "would be volumes next time",
        "empty": "holds no volume",
        "no layer": "there is no such image layer",
        "unwritable": "cannot make",
    }
    assert said[fault] in batch.message.text()
    assert batch.message.warns
