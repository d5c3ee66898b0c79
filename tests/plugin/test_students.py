"""The history of students: every one is kept, restored by a click, and compared with another."""

import shutil
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
from qtpy.QtWidgets import QApplication, QMessageBox

import distillfss_core as core
from napari_distillfss._presets import OWN
from napari_distillfss._students import KeptStudent, Training, differences, read_training, write_record
from napari_distillfss._widgets.students import move_to_trash


def finish(qtbot, dock):
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=60_000)


def paint(dock, painted, planes):
    for z in planes:
        dock.session.annotations.put(z, painted[z])
    dock.session.painted()


def texts(items):
    return [items.item(i).text() for i in range(items.count())]


def wait_for_students(qtbot, dock, count):
    qtbot.waitUntil(lambda: len(dock.model.history.students()) == count, timeout=60_000)


def iterate(run):
    try:
        while True:
            next(run)
    except StopIteration as end:
        return end.value


@pytest.fixture(scope="module")
def students(tmp_path_factory, few, sample):
    """A folder with a student, and another that was refined from it on one slice more."""
    from napari_distillfss._tasks import iter_training

    folder = tmp_path_factory.mktemp("students")
    start, start_path = None, None
    for number, (settings, planes) in enumerate([(few, [1, 4]), (replace(few, steps=4, seed=3), [1, 4, 6])], 1):
        slices = [
            core.AnnotatedSlice(sample.image[z], (sample.labels[z] > 0).astype(np.uint8), f"plane {z}") for z in planes
        ]
        support = core.SupportSet(slices, pixel_size=(1.0, 1.0), planes_of_one_volume=True)
        path = folder / f"student-{number}.safetensors"
        run = iter_training(lambda made=support: made, settings, start, path, Event())
        start = iterate(run).model
        write_record(Training(settings.changed(), start_path, ("object",), (1.0, 1.0), path.with_suffix(""), OWN))
        start_path = path
    return folder


@pytest.fixture
def trained(viewer, nuclei, open_dock, students, qtbot, painted_truth):
    """A dock on a volume with the two students, the second of them in use."""
    dock = open_dock(viewer)
    paint(dock, painted_truth, [1, 4, 6])
    shutil.copytree(students, dock.session.annotations.folder, dirs_exist_ok=True)
    dock.session.choose_volume(dock.session.volume)
    finish(qtbot, dock)
    wait_for_students(qtbot, dock, 2)
    return dock


def reopened(dock, sample, open_dock):
    from napari.components import ViewerModel

    dock.session.close()
    viewer = ViewerModel()
    viewer.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    return open_dock(viewer)


def test_students_that_are_trained_are_listed_the_latest_first_with_their_origin(
    viewer, nuclei, open_dock, few, qtbot, painted_truth
):
    dock = open_dock(viewer)
    dock.distill.settings.setValue(few)
    assert dock.model.history.isHidden()
    paint(dock, painted_truth, [1, 4])
    dock.distill.start()
    finish(qtbot, dock)
    paint(dock, painted_truth, [6])
    dock.distill.settings.setValue(replace(few, steps=20))
    dock.distill.start_refining()
    finish(qtbot, dock)
    wait_for_students(qtbot, dock, 2)
    history, folder = dock.model.history, dock.session.annotations.folder
    second, first = history.students()
    assert [second.path, first.path] == [folder / "model-2.safetensors", folder / "model-1.safetensors"]
    assert texts(history.list) == [
        f"in use: {second.time}, own settings\nmodel 2: refined from model 1, 3 slices, 4 steps\n"
        "no IoU to expect, as it went on from another model",
        f"{first.time}, own settings\nmodel 1: 2 slices, 3 steps\nno IoU to expect, as its zoom was given",
    ]
    assert not history.isHidden()
    assert not history.restore.isEnabled()  # none is chosen
    assert not history.compare.isEnabled()


def test_the_iou_to_expect_is_that_of_each_model_and_never_of_an_earlier_one(
    viewer, nuclei, open_dock, students, few, qtbot, painted_truth
):
    dock = open_dock(viewer)
    paint(dock, painted_truth, [1, 4])
    folder = dock.session.annotations.folder
    measured = core.StudentModel.load(students / "student-1.safetensors")
    measured.training["expected_iou"], measured.training["no_expectation"] = 0.714, None
    measured.save(folder / "model-1.safetensors")
    dock.model.load_from(folder / "model-1.safetensors")
    finish(qtbot, dock)
    wait_for_students(qtbot, dock, 1)
    phrase = "IoU 0.71 ± 0.15 expected on new slices of these kinds"
    assert dock.model.history.list.item(0).text().splitlines()[2] == phrase
    assert phrase in dock.model.card.toPlainText()
    dock.distill.settings.setValue(few)
    dock.distill.start_refining()
    finish(qtbot, dock)
    wait_for_students(qtbot, dock, 2)
    refined, first = texts(dock.model.history.list)
    assert phrase in first
    reason = "no IoU to expect, as it went on from another model"
    for text in (refined, dock.distill.message.text(), dock.model.card.toPlainText()):
        assert reason in text
        assert "expected" not in text
    assert not dock.distill.plot.isHidden()
    dock.model.history.choose(folder / "model-1.safetensors")
    dock.model.history.restore.click()
    finish(qtbot, dock)
    assert phrase in dock.model.card.toPlainText()
    assert dock.distill.message.text() == "Ready to train on the slices that are ticked"
    assert dock.distill.plot.isHidden()


def test_a_student_is_restored_with_all_that_a_script_needs(trained, qtbot):
    history, folder = trained.model.history, trained.session.annotations.folder
    labels = {name: core.StudentModel.load(folder / f"{name}.safetensors") for name in ("student-1", "student-2")}
    history.choose(folder / "student-1.safetensors")
    history.restore.click()
    finish(qtbot, trained)
    plane = trained.session.volume.volume.plane(0)
    np.testing.assert_array_equal(
        trained.session.model.predict(plane).probabilities, labels["student-1"].predict(plane).probabilities
    )
    assert trained.session.model_path == folder / "student-1.safetensors"
    assert trained.session.training.start is None
    assert trained.session.training.settings["steps"] == 3
    assert trained.session.training.support == folder / "student-1"
    wait_for_students(qtbot, trained, 2)
    assert texts(history.list)[1].startswith("in use: ")
    assert not texts(history.list)[0].startswith("in use: ")
    trained.model.copy_command()
    command = QApplication.clipboard().text()
    assert str(folder / "student-1" / "images") in command
    assert "--steps 3" in command
    history.choose(folder / "student-2.safetensors")
    history.restore.click()
    finish(qtbot, trained)
    assert trained.session.training.start == folder / "student-1.safetensors"
    assert trained.session.training.settings["steps"] == 4
    assert len(list(folder.glob("student-*.safetensors"))) == 2


def test_two_students_are_compared_by_settings_slices_and_iou(trained, qtbot, sample):
    history, folder = trained.model.history, trained.session.annotations.folder
    painted = (sample.labels > 0).astype(np.uint8) + 1
    paint(trained, painted, [7])  # neither learned from it
    other = painted[4].copy()
    other[:9] = 1
    trained.session.annotations.put(4, other)
    trained.session.painted()
    history.choose(*(folder / f"student-{n}.safetensors" for n in (1, 2)))
    history.compare.click()
    finish(qtbot, trained)
    lines = history.message.text().splitlines()
    assert lines[0] == "Model 1 → model 2"
    assert "Steps: 3 → 4" in lines
    assert "Seed: 0 → 3" in lines
    assert "slices added: plane 6" in lines
    assert not any(line.startswith(("slices removed", "slices painted further", "Crops")) for line in lines)
    truth = {1: painted[1] - 1, 4: other - 1, 6: painted[6] - 1, 7: painted[7] - 1}
    models = [core.StudentModel.load(folder / f"student-{n}.safetensors") for n in (1, 2)]
    for planes, start in (((1, 4, 6, 7), "IoU on 4 annotated slices: "), ((7,), "of these, planes that neither")):
        expected = [core.evaluate([(m.predict(sample.image[z]).labels, truth[z]) for z in planes], 1) for m in models]
        (line,) = [line for line in lines if line.startswith(start)]
        assert line.endswith(": " + " → ".join("-" if np.isnan(s.iou) else f"{s.iou:.3f}" for s in expected))


def test_students_are_compared_without_slices_too(trained, qtbot):
    history, folder = trained.model.history, trained.session.annotations.folder
    for z in (1, 4, 6):
        trained.session.annotations.remove(z)
    trained.session.painted()
    history.choose(*(folder / f"student-{n}.safetensors" for n in (1, 2)))
    history.compare.click()
    finish(qtbot, trained)
    assert "Steps: 3 → 4" in history.message.text()
    assert "no IoU: no slice is annotated" in history.message.text()


def test_the_history_is_there_again_after_reopening_and_after_starting_over(
    trained, qtbot, sample, open_dock, monkeypatch
):
    from qtpy.QtWidgets import QInputDialog

    folder = trained.session.annotations.folder
    monkeypatch.setattr(QMessageBox, "question", lambda *_: QMessageBox.StandardButton.Yes)
    monkeypatch.setattr(QInputDialog, "getItem", lambda *how: (how[3][0], True))
    trained.support.anew.click()
    assert trained.model.history.isHidden()
    trained.support.restore.click()
    wait_for_students(qtbot, trained, 2)
    again = reopened(trained, sample, open_dock)
    finish(qtbot, again)
    wait_for_students(qtbot, again, 2)
    assert again.session.model_path == folder / "student-2.safetensors"
    assert again.session.training.start == folder / "student-1.safetensors"
    assert texts(again.model.history.list)[0].startswith("in use: ")


def test_students_are_removed_after_a_question_only_and_never_the_present_one(trained, qtbot, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))  # where Qt keeps the trash
    history, folder = trained.model.history, trained.session.annotations.folder
    history.choose(folder / "student-2.safetensors")
    assert not history.discard.isEnabled()
    history.choose(folder / "student-1.safetensors")
    buttons, questions = QMessageBox.StandardButton, []
    reply = {"is": buttons.No}
    monkeypatch.setattr(QMessageBox, "question", lambda *text: questions.append(text[2]) or reply["is"])
    history.discard.click()
    assert "(model 1; " in questions[0]
    assert (folder / "student-1.safetensors").is_file()
    reply["is"] = buttons.Yes
    history.discard.click()
    assert sorted(p.name for p in folder.glob("student-*")) == ["student-2", "student-2.safetensors"]
    assert [s.name for s in history.students()] == ["model 2"]
    kept = {p.name for p in (tmp_path / "data" / "Trash" / "files").iterdir()}
    assert kept == {"student-1", "student-1.safetensors"}
    assert trained.session.next_model_path() == folder / "model-3.safetensors"


def test_without_a_trash_nothing_is_removed(tmp_path, monkeypatch):
    from napari_distillfss._widgets import students

    class NoTrash:
        def __init__(self, path): ...

        def moveToTrash(self):
            return False

    monkeypatch.setattr(students, "QFile", NoTrash)
    path = tmp_path / "student-1.safetensors"
    path.write_text("")
    with pytest.raises(core.OutputError, match=r"student-1\.safetensors: the system has no trash"):
        move_to_trash(path)
    assert path.is_file()


def test_a_student_that_cannot_be_read_is_listed_as_such(trained, qtbot):
    folder = trained.session.annotations.folder
    (folder / "student-9.safetensors").write_text("nothing")
    trained.session.model_changed.emit()
    wait_for_students(qtbot, trained, 3)
    assert texts(trained.model.history.list)[0] == "model 9: cannot be read"
    trained.model.history.choose(folder / "student-9.safetensors")
    assert not trained.model.history.restore.isEnabled()


def kept(tmp_path, name, settings, support, classes=("object",), iou=None):
    record = {"settings": settings.to_json(), "support": support, "steps": settings.steps, "validation_iou": iou}
    card = {"created": "2026-11-28T12:00:00+00:00", "classes": list(classes), "training": record}
    return KeptStudent(tmp_path / f"{name}.safetensors", card)


def test_differences_name_preset_settings_classes_and_slices(tmp_path):
    import tifffile

    quick, thorough = (
        core.DistillSettings(steps=80, crops=96),
        core.DistillSettings(steps=1200, crops=384, cache_mb=1200),
    )
    old = kept(tmp_path, "student-1", quick, ["plane 1", "plane 2", "plane 3"])
    new = kept(tmp_path, "student-2", thorough, ["plane 2", "plane 3", "plane 12"], ("object", "debris"), iou=0.5)
    for name, value in (("student-1", 1), ("student-2", 2)):
        (tmp_path / name / "labels").mkdir(parents=True)
        for plane, labels in ((2, [[0, value]]), (3, [[0, 1]])):
            tifffile.imwrite(tmp_path / name / "labels" / f"plane_{plane:04d}.tif", np.array(labels, np.uint8))
    assert differences(old, new) == [
        "preset: quick → thorough",
        "Steps: 80 → 1200",
        "Crops: 96 → 384",
        "Cache: 600 → 1200",
        "classes: object → object, debris",
        "steps made: 80 → 1200",
        "slices added: plane 12",
        "slices removed: plane 1",
        "slices painted further: plane 2",
    ]
    assert differences(old, old) == []
    first, second = new.describe().splitlines()
    assert first.endswith(", thorough")
    assert second.endswith(" steps, IoU 0.500")
    assert second.startswith("model 2: ")
    assert kept(tmp_path, "my nuclei-2", quick, ["plane 1"]).name == "my nuclei-2"


@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_a_record_is_read_as_it_was_written_also_after_its_folder_was_moved(place, tmp_path):
    folder = tmp_path / "nuclei"
    (folder / "student-2").mkdir(parents=True)
    start = folder / "student-1.safetensors" if place == "beside" else tmp_path / "away" / "s.safetensors"
    training = Training({"steps": 16}, start, ("object",), (0.5, 0.5), folder / "student-2", "quick")
    write_record(training)
    assert read_training(folder / "student-2.safetensors", ("object",), (0.5, 0.5)) == training
    folder.rename(tmp_path / "nuclei.old1")
    moved = read_training(tmp_path / "nuclei.old1" / "student-2.safetensors", ("object",), (0.5, 0.5))
    assert moved.start == (tmp_path / "nuclei.old1" / "student-1.safetensors" if place == "beside" else start)
    assert read_training(tmp_path / "student-7.safetensors", ("object",), None) is None
