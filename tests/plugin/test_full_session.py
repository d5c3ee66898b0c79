"""From opening the sample to reopening the student, as a user does it."""

import contextlib
import io
import shlex
from fractions import Fraction

import numpy as np
import pytest
import zarr
from qtpy.QtWidgets import QApplication

from distillfss_core import DistillSettings, StudentModel
from distillfss_core.cli.main import main


def finish(qtbot, dock):
    qtbot.waitUntil(lambda: not dock.session.busy, timeout=300_000)


def iou(found, truth):
    return float(np.logical_and(found, truth).sum() / np.logical_or(found, truth).sum())


def test_a_user_annotates_five_slices_and_gets_the_stack(viewer, open_dock, qtbot, tmp_path):
    from distillfss_core.samples import generate_sample

    made = generate_sample(planes=12, size=192)
    truth = made.labels > 0
    viewer.add_image(made.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    dock = open_dock(viewer)
    dock.distill.settings.setValue(
        DistillSettings(steps=150, crops=64, crop_size=128, queries=2, shots=2, zoom=Fraction(2))
    )

    dock.support.count.setValue(5)
    dock.support.suggest_slices()
    qtbot.waitUntil(lambda: not dock.support.selecting.running)
    assert len(dock.support.suggested) == 5
    for z in dock.support.suggested:  # nuclei by the brush, the rest by the button
        dock.support.go_to(z)
        objects = np.nonzero(truth[z])
        dock.support.layer.data_setitem((np.full(len(objects[0]), z), *objects), 2)
        dock.support.fill_rest()
    assert dock.session.annotations.planes() == dock.support.suggested

    dock.distill.start()
    finish(qtbot, dock)
    assert dock.session.model is not None, dock.distill.message.text()

    wrong = next(z for z in range(12) if z not in dock.support.suggested)
    dock.support.go_to(wrong)
    qtbot.waitUntil(lambda: dock.preview.plane == wrong and "is ready" in dock.preview.message.text(), timeout=60_000)
    dock.preview.take.click()
    painted = dock.session.annotations.plane(wrong)
    np.testing.assert_array_equal(painted, dock.preview.layers["labels"].data[0] + 1)
    misses = np.nonzero(painted != truth[wrong] + 1)  # what the brush has to correct
    corrected = truth[wrong][misses].astype(np.uint8) + 1
    dock.support.layer.data_setitem((np.full(len(misses[0]), wrong), *misses), corrected)
    np.testing.assert_array_equal(dock.session.annotations.plane(wrong), truth[wrong] + 1)

    first = dock.session.model_path
    dock.distill.settings.setValue(DistillSettings(steps=40, crops=32, crop_size=128, queries=2, shots=2))
    dock.distill.start_refining()
    finish(qtbot, dock)
    assert dock.session.training.start == first
    assert len(dock.session.model.training["support"]) == 6

    dock.apply.out.setText(str(tmp_path / "labels.ome.zarr"))
    dock.apply.start()
    finish(qtbot, dock)
    assert dock.apply.layer in viewer.layers
    labels = zarr.open_array(tmp_path / "labels.ome.zarr" / "0")[:]
    others = [z for z in range(12) if z not in dock.session.annotations.planes()]
    assert iou(labels[others] > 0, truth[others]) >= 0.85

    dock.objects.start()
    finish(qtbot, dock)
    assert len(dock.objects.table.model.values) > 5
    dock.objects.table.choose(3)
    assert dock.objects.layer.selected_label == 4

    dock.model.save_to(tmp_path / "student.safetensors")
    again = StudentModel.load(tmp_path / "student.safetensors")
    np.testing.assert_array_equal(again.predict(made.image[others[0]]).labels, labels[others[0]])


@pytest.fixture
def scripted(viewer, open_dock, open_path, qtbot, tmp_path, few, sample, painted_truth):
    """A dock in which a volume of a file was distilled, applied and counted."""
    import tifffile

    path = tmp_path / "stack.tif"
    step = {"metadata": {"axes": "ZYX", "spacing": 2.5, "unit": "um"}, "resolution": (1, 1)}
    tifffile.imwrite(path, sample.image, imagej=True, **step)
    dock = open_dock(viewer)
    open_path(dock, path)
    for z in (1, 5):
        dock.session.annotations.put(z, painted_truth[z])
    dock.session.painted()
    dock.distill.settings.setValue(few)
    dock.distill.start()
    finish(qtbot, dock)
    dock.model.save_to(tmp_path / "a student.safetensors")
    dock.apply.out.setText(str(tmp_path / "out.ome.zarr"))
    dock.apply.region.setValue(((0, 4), (0, 96), (0, 96)))
    dock.apply.start()
    finish(qtbot, dock)
    dock.objects.smallest.setValue(3)
    dock.objects.start()
    finish(qtbot, dock)
    return dock, tmp_path


def assert_same(folder, student):
    for name in ("out", "out-objects"):
        first, repeated = (zarr.open_array(folder / f"{name}{end}.ome.zarr" / "0")[:] for end in ("", "-again"))
        np.testing.assert_array_equal(first, repeated)
    assert (folder / "out-objects.csv").read_text() == (folder / "out-objects-again.csv").read_text()
    assert (folder / "a student.safetensors").read_bytes() == student  # is not overwritten
    assert (folder / "a student-again.safetensors").is_file()


def test_the_copied_command_makes_the_very_same(scripted):
    dock, folder = scripted
    student = (folder / "a student.safetensors").read_bytes()
    dock.model.copy_command()
    for line in QApplication.clipboard().text().splitlines():
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(shlex.split(line)[1:]) == 0
    assert_same(folder, student)


def test_the_copied_python_makes_the_very_same(scripted):
    dock, folder = scripted
    student = (folder / "a student.safetensors").read_bytes()
    dock.model.copy_python()
    exec(compile(QApplication.clipboard().text(), "script", "exec"), {})
    assert_same(folder, student)
