"""Every editor keeps its contract: value, setValue, valueChanged."""

from fractions import Fraction

import numpy as np
import pytest
from qtpy.QtCore import Qt

from distillfss_core import DistillSettings
from napari_distillfss._annotations import Class
from napari_distillfss._layers import choose_layer
from napari_distillfss._presets import PRESETS
from napari_distillfss._session import Session
from napari_distillfss._widgets.classes import ClassList
from napari_distillfss._widgets.plot import TrainingPlot
from napari_distillfss._widgets.region import RegionEdit
from napari_distillfss._widgets.settings import PresetPicker, SettingsForm
from napari_distillfss._widgets.table import ObjectTable
from napari_distillfss._widgets.volume import VolumePicker


def region_edit(viewer, tmp_path):
    edit = RegionEdit()
    edit.setShape((10, 20, 30))
    return edit, [((1, 5), (2, 20), (0, 30)), None]


def settings_form(viewer, tmp_path):
    first = DistillSettings(steps=7, student="published", learning_rate=0.00015, zoom=Fraction(1, 2))
    return SettingsForm(), [first, DistillSettings(validation_slice=None, invert_prob=0.25, learning_rate=1e-7)]


def preset_picker(viewer, tmp_path):
    return PresetPicker(), [DistillSettings(steps=7), DistillSettings()]


def class_list(viewer, tmp_path):
    return ClassList(), [(Class("nucleus", "#112233"), Class("debris", "#445566"))]


def volume_picker(viewer, tmp_path):
    layers = [viewer.add_image(np.zeros((4, 3, 5))), viewer.add_image(np.ones((7, 8)))]
    return VolumePicker(Session(tmp_path), viewer), [choose_layer(layer) for layer in reversed(layers)]


@pytest.mark.parametrize("make", [region_edit, settings_form, preset_picker, class_list, volume_picker])
def test_what_is_set_is_the_value_and_is_told(make, viewer, tmp_path, qtbot):
    editor, values = make(viewer, tmp_path)
    qtbot.addWidget(editor)
    for value in values:
        with qtbot.waitSignal(editor.valueChanged) as changed:
            editor.setValue(value)
        assert editor.value() == value
        assert changed.args[0] == value


def test_an_edited_box_changes_the_value(qtbot):
    form = SettingsForm()
    qtbot.addWidget(form)
    with qtbot.waitSignal(form.valueChanged):
        form.boxes["steps"].value = 11
    assert form.value().steps == 11


def test_impossible_settings_are_said_and_not_taken(qtbot):
    form = SettingsForm()
    qtbot.addWidget(form)
    form.boxes["crop_size"].value = 100
    assert "multiple of 32" in form.error
    assert form.value().crop_size == 256
    form.boxes["crop_size"].value = 128
    assert not form.error


def test_every_setting_has_a_box_with_its_help(qtbot):
    form = SettingsForm()
    qtbot.addWidget(form)
    assert [box.name for box in form.boxes] == list(DistillSettings.__dataclass_fields__)
    assert all(box.native.toolTip() and box.label for box in form.boxes)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_recognized(name, qtbot):
    picker = PresetPicker()
    qtbot.addWidget(picker)
    picker.setPreset(name)
    assert picker.preset.currentText() == name
    picker.form.boxes["seed"].value = 5
    assert picker.preset.currentText() == "own settings"


def test_classes_are_added_renamed_and_taken_away(qtbot):
    classes = ClassList()
    qtbot.addWidget(classes)
    classes.add.click()
    assert [c.name for c in classes.value()] == ["object", "class 2"]
    assert classes.brush() == 3
    classes.list.item(2).setText("nucleus")
    assert [c.name for c in classes.value()] == ["nucleus", "class 2"]
    with qtbot.waitSignal(classes.brushChanged) as brush:  # the class that was painted is gone
        classes.remove.click()
    assert brush.args == [2]
    assert [c.name for c in classes.value()] == ["nucleus"]
    assert not classes.remove.isEnabled()


def test_the_plot_draws_what_it_is_told(qtbot):
    plot = TrainingPlot()
    qtbot.addWidget(plot)
    plot.resize(300, 110)
    empty = plot.grab().toImage()
    for step in range(1, 50):
        plot.add(step, 100, 1 / step, 0.5 if step % 10 == 0 else None)
    assert plot.grab().toImage() != empty
    plot.clear()
    assert plot.grab().toImage() == empty


def test_the_line_of_a_training_has_the_loss_of_the_plot(qtbot, tmp_path):
    from distillfss_core import TrainStep
    from napari_distillfss._session import Session
    from napari_distillfss._widgets._common import JobBar
    from napari_distillfss._widgets.distill import DistillWidget

    widget = DistillWidget(Session(tmp_path))
    qtbot.addWidget(widget)
    (bar,) = widget.findChildren(JobBar)
    for index, loss in enumerate((1.0, 0.2, 0.9), 1):
        widget.job.stepped.emit(TrainStep(index, 100, {"student": loss - 0.1, "teacher": 0.1}, stage="joint"))
    assert widget.plot.loss == pytest.approx(0.8 * (0.8 + 0.2 * 0.2) + 0.2 * 0.9)
    assert bar.text.text().startswith("Training, 3 of 100, loss 0.85")
    widget.job.stepped.emit(TrainStep(1, 4, stage="zoom"))
    assert "loss" not in bar.text.text()


def test_the_table_sorts_by_number_and_tells_which_object(qtbot, tmp_path):
    columns = "label,voxels,box_z0,box_z1,box_y0,box_y1,box_x0,box_x1"
    (tmp_path / "t.csv").write_text(f"{columns}\n1,100,0,1,0,11,0,21\n2,20,2,3,4,5,6,7\n")
    table = ObjectTable()
    qtbot.addWidget(table)
    table.read(tmp_path / "t.csv")
    table.view.sortByColumn(1, table.view.horizontalHeader().sortIndicatorOrder().AscendingOrder)
    assert table.view.model().index(0, 0).data() == "2"
    with qtbot.waitSignal(table.chosen) as chosen:
        table.choose(0)
    assert chosen.args == [1, ((0, 1), (0, 11), (0, 21))]
    table.select(2)
    assert table.view.selectionModel().selectedRows()[0].data() == "2"


def test_objects_are_sorted_as_whole_columns_and_missing_measures_come_last(qtbot, tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("label,area\n1,3\n2,nan\n3,1\n4,2\n")
    table = ObjectTable()
    qtbot.addWidget(table)
    table.read(tmp_path / "t.csv")
    table.select(4)
    monkeypatch.setattr(table.model, "data", lambda *_: pytest.fail("cells were compared one by one"))
    table.view.sortByColumn(1, Qt.SortOrder.DescendingOrder)
    assert list(table.model.order + 1) == [1, 4, 3, 2]
    table.view.sortByColumn(1, Qt.SortOrder.AscendingOrder)
    assert list(table.model.order + 1) == [3, 4, 1, 2]
    assert table.view.currentIndex().row() == 1  # the chosen object stays chosen


def test_headings_of_the_table_have_units_as_one_writes_them(qtbot, tmp_path):
    (tmp_path / "t.csv").write_text("label,volume_um3,centroid_z_um,volume_voxels,um\n1,2,3,4,5\n")
    table = ObjectTable()
    qtbot.addWidget(table)
    table.read(tmp_path / "t.csv")
    headings = [table.view.model().headerData(i, Qt.Orientation.Horizontal) for i in range(5)]
    assert headings == ["label", "volume (µm³)", "centroid z (µm)", "volume voxels", "um"]
    assert "volume_um3" in table.features()


@pytest.mark.parametrize("name", ["nucleus", " Nucleus ", "background"])
def test_a_class_keeps_its_name_where_another_has_the_new_one(name, qtbot):
    classes = ClassList()
    qtbot.addWidget(classes)
    classes.setValue((Class("nucleus", "#112233"), Class("debris", "#445566")))
    with qtbot.waitSignal(classes.refused) as refused:
        classes.list.item(3).setText(name)
    assert refused.args == [f"there is a class {name.strip()!r} already; give another name"]
    assert [c.name for c in classes.value()] == ["nucleus", "debris"]
    assert classes.list.item(3).text() == "debris"
    classes.list.item(3).setText("Debris")  # its own name in other letters
    assert [c.name for c in classes.value()] == ["nucleus", "Debris"]


def test_noise_of_the_loss_is_not_drawn_as_a_rise(qtbot):
    """A training that goes on from a model has a flat loss: its curve stays in the upper part of the plot."""
    from qtpy.QtGui import QColor

    from napari_distillfss._widgets._colors import LOSS

    plot = TrainingPlot()
    qtbot.addWidget(plot)
    plot.resize(300, 110)
    for step in range(1, 40):
        plot.add(step, 40, 0.5 + 0.01 * (-1) ** step, None)
    picture, color = plot.grab().toImage(), LOSS.on(plot.palette().window().color()).name()
    rows = [y for y in range(20, 110) for x in range(10, 290) if QColor(picture.pixel(x, y)).name() == color]
    assert rows
    assert max(rows) - min(rows) < 30


def test_a_widget_that_is_not_allowed_says_why(qtbot):
    from qtpy.QtWidgets import QPushButton

    from napari_distillfss._widgets._common import allow

    part = QPushButton("Train")
    qtbot.addWidget(part)
    part.setToolTip("Learns")
    for reason, text in (("no slice", "Learns. Not now: no slice"), ("busy", "Learns. Not now: busy"), ("", "Learns")):
        allow(part, reason)
        assert (part.isEnabled(), part.toolTip()) == (not reason, text)


def test_a_long_choice_is_elided_in_the_middle_and_whole_in_the_tooltip(qtbot):
    from qtpy.QtCore import QEvent, QPoint
    from qtpy.QtGui import QHelpEvent
    from qtpy.QtWidgets import QApplication, QToolTip

    from napari_distillfss._widgets._common import combo

    name = "experiment-2026-11-30-nuclei-in-the-first-well-of-the-second-plate-deconvolved.ome.zarr"
    box = combo("The image to segment", (name, "short"))
    qtbot.addWidget(box)
    box.resize(180, 24)
    box.show()

    def tooltip():
        QApplication.sendEvent(box, QHelpEvent(QEvent.Type.ToolTip, QPoint(5, 5), box.mapToGlobal(QPoint(5, 5))))
        return QToolTip.text()

    assert box.shown().startswith("exp")
    assert box.shown().endswith("arr")
    assert "…" in box.shown()
    assert box.fontMetrics().horizontalAdvance(box.shown()) < 180
    assert tooltip() == f"{name}\nThe image to segment"
    assert box.currentText() == name
    box.setCurrentIndex(1)
    assert box.shown() == "short"
    assert tooltip() == "The image to segment"
