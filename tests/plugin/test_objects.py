"""Objects of any labels layer are counted, found again in the table and exported."""

import csv
import threading
from threading import Event

import numpy as np
import pytest
import tifffile
import zarr
from qtpy.QtWidgets import QFileDialog, QMessageBox

import distillfss_core as core
from napari_distillfss import _tasks
from napari_distillfss._tasks import iter_exporting, open_levels
from napari_distillfss._widgets.apply import NUMBERED
from napari_distillfss._widgets.mark import middle_of
from napari_distillfss._widgets.table import ObjectTable


def finish(qtbot, dock):
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=60_000)


@pytest.fixture
def blocks():
    """Labels (z, y, x): two objects that touch, of numbers 3 and 7, and one of number 3 apart from them."""
    labels = np.zeros((8, 96, 96), np.int32)
    labels[1:4, 10:20, 10:20] = 3
    labels[1:4, 10:20, 20:30] = 7
    labels[5:8, 60:70, 40:60] = 3
    return labels


@pytest.fixture
def dock(viewer, nuclei, open_dock, blocks):
    viewer.add_labels(blocks, name="by hand", scale=(2.5, 1, 1), units=("um",) * 3)
    return open_dock(viewer)


def test_objects_of_a_labels_layer_are_counted_without_any_student(dock, viewer, nuclei, qtbot, blocks):
    assert dock.objects.count.isEnabled()
    dock.objects.start()
    finish(qtbot, dock)
    values = {c: dock.objects.table.model.values[:, i] for i, c in enumerate(dock.objects.table.model.columns)}
    np.testing.assert_array_equal(values["voxels"], [600, 600])  # both that touch are one
    np.testing.assert_allclose(values["volume_um3"], [1500, 1500])
    means = [nuclei.data[part][blocks[part] > 0].mean() for part in (slice(4), slice(4, 8))]
    np.testing.assert_allclose(values["mean_intensity"], means)
    layer = dock.objects.layer
    np.testing.assert_array_equal(layer.extent.world, viewer.layers["by hand"].extent.world)
    assert str(dock.session.folder) in dock.objects.message.text()


def test_napari_reads_no_objects_from_disk_when_their_layer_is_made(dock, viewer, qtbot, monkeypatch):
    class Spy:
        """Notes the threads in which an array is read."""

        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __getitem__(self, key):
            threads.add(threading.current_thread())
            return self.array[key]

    threads = set()
    monkeypatch.setattr(_tasks, "open_levels", lambda path: [Spy(array) for array in open_levels(path)])
    viewer.dims.set_point(0, 2 * 2.5)
    dock.objects.start()
    finish(qtbot, dock)
    assert threads
    assert threading.main_thread() not in threads
    assert np.unique(dock.objects.layer._slice.image.raw).tolist() == [0, 1]
    viewer.dims.set_point(0, 6 * 2.5)
    assert np.unique(dock.objects.layer._slice.image.raw).tolist() == [0, 2]
    assert threading.main_thread() in threads


def test_measures_are_never_powers_of_ten(qtbot, tmp_path):
    (tmp_path / "t.csv").write_text("label,voxels,volume_um3,mean\n1,3017190,1885743.75,0.0625\n2,20,12.345678,3\n")
    table = ObjectTable()
    qtbot.addWidget(table)
    table.read(tmp_path / "t.csv")
    shown = [[table.model.data(table.model.index(row, column)) for column in range(4)] for row in range(2)]
    assert shown == [["1", "3017190", "1885744", "0.0625"], ["2", "20", "12.3457", "3"]]


@pytest.mark.parametrize(
    ("method", "of_class", "voxels"),
    [("connected", "selected label", [300]), (NUMBERED, "any label", [900, 300])],
)
def test_one_label_or_the_numbers_of_a_layer_are_the_objects(dock, viewer, qtbot, method, of_class, voxels):
    viewer.layers["by hand"].selected_label = 7
    dock.objects.of_class.setCurrentText(of_class)
    dock.objects.method.setCurrentText(method)
    assert dock.objects.of_class.isEnabled() is (method != NUMBERED)
    dock.objects.start()
    finish(qtbot, dock)
    np.testing.assert_array_equal(dock.objects.table.model.values[:, 1], voxels)


def test_the_layer_of_objects_has_the_columns_of_the_table_as_features(dock, viewer, qtbot):
    dock.objects.start()
    finish(qtbot, dock)
    viewer.dims.set_point(0, 6 * 2.5)
    layer = dock.objects.layer
    assert list(layer.features["index"]) == [1, 2]
    assert set(dock.objects.table.model.columns) <= set(layer.features)
    position = layer.data_to_world((6, 65, 50))
    status = layer.get_status(position, view_direction=None, dims_displayed=[1, 2], world=True)
    assert "voxels: 600" in str(status)
    assert "box_z0: 5" in str(status)


def test_a_row_selects_shows_and_marks_its_object(dock, viewer, qtbot):
    dock.objects.start()
    finish(qtbot, dock)
    view = dock.objects.table.view
    view.setCurrentIndex(view.model().index(1, 0))  # as the arrow keys do
    assert dock.objects.layer.selected_label == 2
    assert viewer.dims.point[0] == 6 * 2.5
    ring = dock.objects.mark.layer
    assert ring.visible
    np.testing.assert_allclose(ring.data_to_world(ring.data[0]), (15, 64.5, 49.5))
    view.setCurrentIndex(view.model().index(0, 0))
    assert dock.objects.mark.layer is ring
    np.testing.assert_allclose(ring.data_to_world(ring.data[0]), (5, 14.5, 19.5))
    assert ring.units == dock.objects.layer.units  # napari warns of layers with other units
    before = viewer.dims.point
    dock.objects.layer.selected_label = 2  # picked in the layer: its row, without a move
    assert view.currentIndex().row() == 1
    assert viewer.dims.point == before


def test_the_ring_lies_in_a_plane_that_is_shown():
    """The middle of four planes is between two."""
    assert [middle_of(((start, stop), (0, 1), (0, 1)))[0] for start, stop in ((2, 6), (2, 5), (4, 5))] == [3, 3, 4]


def test_of_a_series_the_time_point_on_screen_is_counted(viewer, nuclei, open_dock, qtbot, blocks):
    series = np.stack([blocks, np.zeros_like(blocks), blocks * (np.arange(8) < 4)[:, None, None]])
    viewer.add_labels(series, name="series", scale=(1, 2.5, 1, 1))
    dock = open_dock(viewer)
    for time, objects in ((0, 2), (1, 0), (2, 1)):
        viewer.dims.set_point(0, time)
        dock.objects.start()
        finish(qtbot, dock)
        assert len(dock.objects.table.model.values) == objects, dock.objects.message.text()
        assert dock.objects.layer.data_to_world((0, 0, 0, 0))[0] == time


def test_objects_of_an_earlier_session_are_not_replaced(dock, qtbot, tmp_path):
    folder = dock.session.folder / "objects"
    folder.mkdir(parents=True)
    (folder / "by_hand-objects.csv").write_text("mine")
    for smallest, count in ((1, 2), (601, 0)):  # the second replaces the first, which is of this session
        dock.objects.smallest.setValue(smallest)
        dock.objects.start()
        finish(qtbot, dock)
        assert len(dock.objects.table.model.values) == count
    assert (folder / "by_hand-objects.csv").read_text() == "mine"
    assert sorted(p.name for p in folder.glob("*.ome.zarr")) == ["by_hand-objects-again.ome.zarr"]


def test_layers_of_the_dock_itself_are_not_offered(dock, viewer):
    dock.support.paint.click()
    offered = [dock.objects.labels.itemText(i) for i in range(dock.objects.labels.count())]
    assert offered == ["by hand"]
    viewer.layers.remove("by hand")
    assert dock.objects.labels.count() == 0
    assert not dock.objects.count.isEnabled()


def test_labels_are_exported_as_tiff_with_their_voxel_size(dock, qtbot, tmp_path, blocks):
    dock.objects.export_labels(tmp_path / "labels.tif")
    finish(qtbot, dock)
    with tifffile.TiffFile(tmp_path / "labels.tif") as file:
        np.testing.assert_array_equal(file.asarray(), blocks)
        assert file.series[0].axes == "ZYX"
        assert 'PhysicalSizeZ="2.5"' in file.ome_metadata
        assert 'PhysicalSizeX="1.0"' in file.ome_metadata
    assert str(tmp_path / "labels.tif") in dock.objects.message.text()


def test_counted_objects_are_exported_as_tiff_and_csv(dock, qtbot, tmp_path, monkeypatch):
    assert not dock.objects.save_table.isEnabled()
    dock.objects.start()
    finish(qtbot, dock)
    dock.objects.labels.setCurrentText(dock.objects.layer.name)
    dock.objects.export_labels(tmp_path / "objects.tif")
    finish(qtbot, dock)
    objects = zarr.open_array(dock.session.folder / "objects" / "by_hand-objects.ome.zarr" / "0")[:]
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "objects.tif"), objects)
    (tmp_path / "table.csv").write_text("mine")
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(tmp_path / "table"), ""))
    monkeypatch.setattr(QMessageBox, "question", lambda *_: QMessageBox.StandardButton.No)
    dock.objects.save_table.click()
    assert (tmp_path / "table.csv").read_text() == "mine"
    monkeypatch.setattr(QMessageBox, "question", lambda *_: QMessageBox.StandardButton.Yes)
    dock.objects.save_table.click()
    with open(tmp_path / "table.csv", newline="") as file:
        assert [row["voxels"] for row in csv.DictReader(file)] == ["600", "600"]


def test_objects_that_cannot_be_written_have_a_remedy(dock, qtbot):
    dock.session.folder.mkdir(exist_ok=True)
    (dock.session.folder / "objects").write_text("")  # root feels this one too
    dock.objects.start()
    finish(qtbot, dock)
    assert dock.objects.message.text().startswith(f"cannot make {dock.session.folder / 'objects'}: ")
    assert "make room or let it be written, or save the layer as a file and count that" in dock.objects.message.text()
    assert dock.objects.message.warns


def test_labels_are_hidden_under_their_objects_and_those_of_the_user_are_not(dock, viewer, qtbot, student, tmp_path):
    dock.model.load_from(student)
    finish(qtbot, dock)
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    assert dock.apply.layer.visible
    dock.objects.labels.setCurrentText("by hand")
    dock.objects.start()
    finish(qtbot, dock)
    assert dock.apply.layer.visible
    dock.objects.labels.setCurrentIndex(0)
    assert dock.objects.labels.currentText() == "applied: out.ome.zarr"
    dock.objects.start()
    finish(qtbot, dock)
    assert not dock.apply.layer.visible
    assert dock.objects.layer.visible
    assert viewer.layers["by hand"].visible


def test_an_export_that_fails_is_one_sentence_and_leaves_nothing(dock, qtbot, tmp_path):
    dock.objects.export_labels(tmp_path / "no folder" / "labels.tif")
    finish(qtbot, dock)
    assert "there is no folder" in dock.objects.message.text()
    assert dock.objects.message.warns
    dock.objects.export_table(tmp_path / "t.csv")
    assert "nothing is counted" in dock.objects.message.text()
    assert list(tmp_path.glob("*.csv")) == []


def test_a_tiff_of_labels_that_are_not_finished_warns(sample, student, tmp_path, caplog):
    """An Apply was stopped, and its labels are exported after the image was opened again."""
    out, file = tmp_path / "labels.ome.zarr", tmp_path / "labels.tif"
    with core.open_volume(sample.image) as volume:
        core.segment_to_zarr(volume, core.StudentModel.load(student), out, region=((0, 2), (0, 96), (0, 96)))
    for _ in iter_exporting(out, file, Event()):
        pass
    assert "labels.ome.zarr: only z 0:2, y 0:96, x 0:96 is finished (25% of the voxels)" in caplog.text
    assert tifffile.imread(file).shape == sample.image.shape
