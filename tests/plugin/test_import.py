"""Annotations are imported from layers of labels and of shapes, in their place, or one sentence says why not."""

import numpy as np
import pytest
from napari.utils.notifications import notification_manager

from napari_distillfss._annotations import Class

UM = ("um",) * 3


def finish(qtbot, dock):
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=60_000)


def painted(dock, z):
    return dock.session.annotations.plane(z)


@pytest.fixture
def dock(viewer, nuclei, open_dock):
    return open_dock(viewer)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("masks", {0: 1, 1: 2, 2: 2}), ("classes", {0: 1, 1: 2, 2: 3}), ("scribbles", {0: 0, 1: 1, 2: 2})],
)
def test_labels_of_a_layer_become_annotations(dock, viewer, qtbot, kind, expected):
    dock.support.classes.setValue((Class("a", "#111111"), Class("b", "#222222")))
    labels = np.zeros((8, 96, 96), np.uint16)
    labels[3, :10], labels[5, 20:30] = 1, 2
    layer = viewer.add_labels(labels, name="theirs", scale=(2.5, 1, 1), units=UM)
    dock.support.import_from(layer, kind)
    finish(qtbot, dock)
    assert dock.session.annotations.planes() == [3, 5]
    for z in (3, 5):
        np.testing.assert_array_equal(painted(dock, z), np.vectorize(expected.get)(labels[z]))


def test_labels_of_a_plane_go_to_the_plane_on_screen_and_undo_takes_them_back(dock, viewer, qtbot):
    before = np.full((96, 96), 1, np.uint8)
    dock.session.annotations.put(4, before)
    plane = np.zeros((96, 96), np.int32)
    plane[5:9, 5:9] = 7
    layer = viewer.add_labels(plane, name="plane")
    dock.support.go_to(4)
    dock.support.import_from(layer)
    finish(qtbot, dock)
    np.testing.assert_array_equal(painted(dock, 4), (plane > 0) + 1)
    dock.support.layer.undo()
    np.testing.assert_array_equal(painted(dock, 4), before)


@pytest.mark.parametrize(("place", "count"), [({}, 0), ({"translate": (0, 20)}, 1), ({"scale": (2, 2)}, 1)])
def test_labels_that_lie_elsewhere_are_taken_with_a_warning(dock, viewer, qtbot, place, count):
    plane = np.zeros((96, 96), np.int32)
    plane[5:9, 5:9] = 7
    notification_manager.records.clear()
    dock.support.import_from(viewer.add_labels(plane, name="plane", **place))
    finish(qtbot, dock)
    messages = [record.message for record in notification_manager.records]
    assert sum("layer 'plane' does not lie on 'nuclei'" in message for message in messages) == count
    np.testing.assert_array_equal(painted(dock, dock.support.plane()), (plane > 0) + 1)


def test_labels_that_do_not_fit_change_nothing_and_are_one_sentence(dock, viewer, qtbot):
    before = np.full((96, 96), 2, np.uint8)
    dock.session.annotations.put(1, before)
    small = viewer.add_labels(np.ones((8, 95, 96), int), name="small")
    dock.support.import_from(small)
    finish(qtbot, dock)
    assert dock.support.message.text().startswith("small: is (8, 95, 96), the volume (8, 96, 96)")
    many = np.zeros((8, 96, 96), int)
    many[1, 3, 3], many[2, 4, 4], many[6, 5, 5] = 1, 1, 9
    dock.support.import_from(viewer.add_labels(many, name="many"), "classes")
    finish(qtbot, dock)
    assert "many plane 6: holds the label 9" in dock.support.message.text()
    assert dock.session.annotations.planes() == [1]
    np.testing.assert_array_equal(painted(dock, 1), before)


RECTANGLE = np.array([[2, 10, 20], [2, 10, 39], [2, 29, 39], [2, 29, 20]], float)


@pytest.mark.parametrize("kind", ["masks", "scribbles"])
def test_shapes_are_drawn_in_the_class_of_the_brush_where_they_lie(dock, viewer, qtbot, kind):
    dock.session.annotations.put(2, np.pad(np.full((5, 5), 1, np.uint8), ((0, 91), (0, 91))))
    layer = viewer.add_shapes(
        [RECTANGLE * (2.5 / 5, 2, 2) / (1, 1, 1), RECTANGLE * (0, 1, 1) + (2.5, 0, 0)],
        scale=(5, 0.5, 0.5), units=UM, shape_type=["rectangle", "ellipse"],
    )  # fmt: skip
    dock.support.classes.setBrush(2)
    dock.support.import_from(layer, kind)
    finish(qtbot, dock)
    rest = 1 if kind == "masks" else 0
    expected = np.full((96, 96), rest, np.uint8)
    expected[:5, :5] = 1
    expected[10:30, 20:40] = 2
    np.testing.assert_array_equal(painted(dock, 2), expected)
    ellipse = painted(dock, 5) == 2
    y, x = np.nonzero(ellipse)
    assert abs(ellipse.sum() - np.pi / 4 * 9.5 * 9.5) < 8  # half a micrometer a pixel of the layer
    np.testing.assert_allclose((y.mean(), x.mean()), (9.75, 14.75), atol=0.3)


def test_lines_and_classes_of_shapes(dock, viewer, qtbot):
    dock.support.classes.setValue((Class("a", "#111111"), Class("b", "#222222")))
    path = np.array([[10, 10], [10, 50], [40, 50]], float)
    layer = viewer.add_shapes(
        [path, path + np.array([40, 0]), RECTANGLE[:, 1:]], shape_type=["path", "path", "rectangle"], edge_width=3,
        features={"class": ["b", "0", 1]},
    )  # fmt: skip
    dock.support.go_to(6)
    dock.support.import_from(layer, "scribbles")
    finish(qtbot, dock)
    plane = painted(dock, 6)
    assert (plane[10:12, 20] == 3).sum() == 0  # the rectangle is over it
    np.testing.assert_array_equal(plane[8:13, 15], [0, 3, 3, 3, 0])
    np.testing.assert_array_equal(plane[48:53, 15], [0, 1, 1, 1, 0])
    assert (plane == 2).sum() == 400


@pytest.mark.parametrize("fault", ["none", "across", "outside", "beyond", "class", "eraser"])
def test_shapes_that_do_not_fit_change_nothing_and_are_one_sentence(dock, viewer, qtbot, fault):
    shape, features = RECTANGLE.copy(), {}
    shape[:, 0] *= 2.5
    if fault == "across":
        shape[2:, 0] += 2.5
    if fault == "outside":
        shape[:, 1] += 500
    if fault == "beyond":
        shape[:, 0] = 100
    if fault == "class":
        features = {"class": ["tree"]}
    dock.support.classes.setBrush(0 if fault == "eraser" else 2)
    layer = viewer.add_shapes([] if fault == "none" else [shape], name="drawn", ndim=3, features=features or None)
    dock.support.import_from(layer)
    finish(qtbot, dock)
    said = {
        "none": "holds no shape",
        "across": "shape 0: spans planes 2 to 3",
        "outside": "shape 0: lies outside of 'nuclei', which has planes 0 to 7 of 96 × 96 pixels",
        "beyond": "shape 0: lies outside",
        "class": "has the class 'tree', which is none of object",
        "eraser": "the eraser is chosen",
    }
    assert said[fault] in dock.support.message.text()
    assert dock.support.message.warns
    assert dock.session.annotations.planes() == []


def test_layers_of_labels_and_shapes_are_offered_but_not_those_of_the_dock(dock, viewer, qtbot, monkeypatch):
    from qtpy.QtWidgets import QInputDialog

    dock.support.import_layer.click()
    assert "no layer of labels or shapes" in dock.support.message.text()
    dock.support.paint.click()
    viewer.add_labels(np.ones((8, 96, 96), int), name="theirs")
    viewer.add_shapes([RECTANGLE], name="drawn")
    viewer.add_points(np.zeros((1, 3)), name="points")
    offered = []
    monkeypatch.setattr(QInputDialog, "getItem", lambda *how: offered.append(how[3]) or ("theirs", True))
    dock.support.import_layer.click()
    finish(qtbot, dock)
    assert offered == [["theirs", "drawn"]]
    assert len(dock.session.annotations.planes()) == 8


def test_an_import_is_one_step_of_the_history_also_where_nothing_was_painted(dock, viewer, qtbot):
    before = np.full((96, 96), 1, np.uint8)
    dock.session.annotations.put(4, before)
    labels = np.zeros((8, 96, 96), np.uint16)
    labels[3:6, 20:30] = 7
    dock.support.import_from(viewer.add_labels(labels, name="theirs", scale=(2.5, 1, 1), units=UM))
    finish(qtbot, dock)
    assert dock.support.message.text().endswith("Ctrl+Z brings back what 1 of them had, and clears the others")
    dock.support.layer.undo()
    assert dock.session.annotations.planes() == [4]
    np.testing.assert_array_equal(painted(dock, 4), before)
    dock.support.layer.redo()
    assert dock.session.annotations.planes() == [3, 4, 5]
    np.testing.assert_array_equal(painted(dock, 5), (labels[5] > 0) + 1)


def test_an_import_that_is_too_large_to_be_undone_does_not_promise_it(dock, viewer, qtbot, monkeypatch):
    from napari_distillfss import _tasks

    monkeypatch.setattr(_tasks, "_UNDOABLE", 96 * 96)
    labels = np.zeros((8, 96, 96), np.uint16)
    labels[3:6, 20:30] = 7
    dock.support.import_from(viewer.add_labels(labels, name="theirs", scale=(2.5, 1, 1), units=UM))
    finish(qtbot, dock)
    assert "Ctrl+Z" not in dock.support.message.text()
    assert dock.session.annotations.planes() == [3, 4, 5]
    dock.support.layer.undo()
    assert dock.session.annotations.planes() == [3, 4, 5]
