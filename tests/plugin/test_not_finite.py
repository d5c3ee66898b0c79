"""Volumes with pixels that are NaN or infinite: the message offers to read them as a number."""

import numpy as np
import pytest
from qtpy.QtCore import QPoint, Qt

import distillfss_core as core
from napari_distillfss import _annotations
from napari_distillfss._layers import layer_of_file
from napari_distillfss._scripts import command_line, python_lines
from napari_distillfss._widgets.batch import FILES, LAYERS


@pytest.fixture
def holed(sample, tmp_path):
    """A file of floats in which some pixels are not finite."""
    image = sample.image.astype(np.float32)
    image[:, 40:43, 50:53] = np.nan
    image[2, 0, 0] = np.inf
    np.save(tmp_path / "holed.npy", image)
    return tmp_path / "holed.npy"


@pytest.fixture
def dock(viewer, holed, open_dock, open_path, painted_truth, few):
    dock = open_dock(viewer)
    open_path(dock, holed)
    dock.distill.settings.setValue(few)
    dock.session.annotations.put(1, painted_truth[1])
    dock.session.painted()
    return dock


def is_offered(part):
    return not part.offer.isHidden()


def ended(qtbot, dock):
    qtbot.waitUntil(lambda: not dock.session.busy and not dock.preview.busy, timeout=60_000)


def test_the_message_of_a_preview_offers_to_read_them_as_zero(dock, viewer, qtbot, sample):
    assert dock.volume._replacing.isHidden()
    dock.preview.on.setChecked(True)
    qtbot.waitUntil(lambda: dock.preview.message.warns, timeout=60_000)
    assert "of 9216 pixels are NaN or infinite" in dock.preview.message.text()
    assert is_offered(dock.preview)
    assert not is_offered(dock.distill)
    folder = dock.session.annotations.folder
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.preview.offer.click()
    assert not is_offered(dock.preview)
    assert not dock.preview.message.warns
    assert (dock.session.annotations.folder, dock.session.annotations.planes()) == (folder, [1])
    assert dock.session.first_window is None
    assert dock.session.volume.volume.plane(1)[41, 51] == 0
    assert dock.volume.replaces.isChecked()
    assert not dock.volume._replacing.isHidden()
    dock.volume.replacement.setValue(-3)
    dock.volume.replacement.editingFinished.emit()
    assert dock.session.volume.volume.plane(2)[0, 0] == -3
    dock.volume.replaces.setChecked(False)
    assert np.isnan(dock.session.volume.volume.plane(1)[41, 51])
    assert dock.session.annotations.folder == folder


def test_training_and_apply_offer_it_and_scripts_repeat_it(dock, qtbot, tmp_path, student, holed):
    dock.distill.start()
    ended(qtbot, dock)
    assert dock.distill.message.warns
    assert is_offered(dock.distill)
    dock.model.load_from(student)
    ended(qtbot, dock)
    dock.apply.out.setText(str(tmp_path / "o.ome.zarr"))
    dock.apply.start()
    ended(qtbot, dock)
    assert dock.apply.message.warns
    assert is_offered(dock.apply)
    dock.apply.offer.click()
    ended(qtbot, dock)
    assert not is_offered(dock.apply)
    assert not is_offered(dock.distill)
    dock.apply.out.setText(str(tmp_path / "p.ome.zarr"))
    dock.apply.start()
    ended(qtbot, dock)
    assert "Done" in dock.apply.message.text()
    dock.objects.start()
    ended(qtbot, dock)
    with core.open_volume(tmp_path / "p.ome.zarr") as labels, core.open_volume(holed, replace_nan=0) as image:
        expected = core.StudentModel.load(student).predict(image.plane(2)).labels
        np.testing.assert_array_equal(labels.plane(2), expected)
    command, python = command_line(dock.session), python_lines(dock.session)
    assert command.count("--replace-nan 0.0") == 2
    assert python.count("replace_nan=0.0") == 2
    with qtbot.waitSignal(dock.distill.job.done, timeout=120_000):
        dock.distill.start()


def test_labels_begun_with_other_pixels_in_place_of_nan_are_replaced_by_a_button(
    dock, qtbot, tmp_path, student, holed, sample
):
    dock.model.load_from(student)
    ended(qtbot, dock)
    out, message = tmp_path / "o.ome.zarr", dock.apply.message
    dock.apply.out.setText(str(out))
    dock.apply.start()
    ended(qtbot, dock)
    assert "of 9216 pixels are NaN or infinite" in message.text()
    assert dock.apply.anew.isHidden()
    assert not out.exists()  # nothing was finished
    dock.apply.offer.click()
    dock.apply.start()
    ended(qtbot, dock)
    assert "Done" in message.text()
    dock.volume.replacement.setValue(-3)
    dock.volume.replacement.editingFinished.emit()
    dock.apply.out.setText(str(out))
    dock.apply.start()
    ended(qtbot, dock)
    assert message.text() == (
        "o.ome.zarr: holds results with NaN and infinite pixels read as 0, not read as -3. Press “Replace labels”, "
        "tick “Replace existing labels”, or choose another name"
    )
    assert not dock.apply.anew.isHidden()
    dock.apply.out.setText(str(tmp_path / "p.ome.zarr"))
    assert dock.apply.anew.isHidden()
    dock.apply.out.setText(str(out))
    dock.apply.start()
    ended(qtbot, dock)
    dock.apply.anew.click()
    ended(qtbot, dock)
    assert "Done" in message.text()
    assert dock.apply.anew.isHidden()
    assert not dock.apply.replace.isChecked()
    with core.open_volume(out) as labels, core.open_volume(holed, replace_nan=0) as image:
        expected = core.StudentModel.load(student).predict(image.plane(2)).labels
        np.testing.assert_array_equal(labels.plane(2), expected)


def test_it_is_not_offered_for_other_errors_nor_twice(dock, qtbot, monkeypatch):
    dock.volume.replace_nan(0.0)
    for error in (core.ImageError("no"), core.NotFiniteError("in another volume")):

        def fail(stop, error=error):
            yield
            raise error

        dock.distill.job.start(fail)
        ended(qtbot, dock)
        assert dock.distill.message.text() == str(error)
        assert not is_offered(dock.distill)
    dock.volume.replace_nan(None)
    dock.distill.job.start(fail)
    ended(qtbot, dock)
    assert is_offered(dock.distill)


def test_slices_of_another_volume_are_read_as_they_were_there(dock, viewer, open_path, sample, tmp_path, holed, qtbot):
    dock.volume.replace_nan(0.0)
    key = dock.session.annotations.folder.name
    np.save(tmp_path / "other.npy", sample.image)
    open_path(dock, tmp_path / "other.npy")
    assert dock.volume._replacing.isHidden()
    dock.session.use_also([key])
    for _ in range(2):
        (labeled,) = dock.session.support_maker()().slices
        assert np.isfinite(labeled.image).all()
        with_layer = [layer for layer in viewer.layers if layer.name == "holed.npy"]
        for layer in with_layer:  # the second time it is opened from its file
            viewer.layers.remove(layer)
    assert not with_layer


@pytest.mark.parametrize("what", ["files", "layers"])
def test_many_volumes_offer_to_read_them_as_zero_in_those_that_failed(
    what, dock, viewer, qtbot, sample, student, tmp_path, holed
):
    (tmp_path / "volumes").mkdir()
    holed.rename(tmp_path / "volumes" / "holed.npy")
    np.save(tmp_path / "volumes" / "whole.npy", sample.image)
    viewer.add_image(sample.image, name="whole")
    dock.model.load_from(student)
    ended(qtbot, dock)
    batch, out = dock.apply.batch, tmp_path / "labels"
    batch.what.setCurrentText(FILES if what == "files" else LAYERS)
    batch.folder.setText(str(tmp_path / "volumes"))
    batch.channel.clear()
    batch.out.setText(str(out))
    if what == "layers":
        holed = tmp_path / "volumes" / "holed.npy"
        viewer.layers["holed.npy"].metadata.clear()  # the file has moved
        viewer.layers["holed.npy"].data = np.load(holed)
    batch.start()
    ended(qtbot, dock)
    assert batch.message.warns
    assert "1 of 2 volumes segmented; 1 with pixels that are NaN or infinite: Read as 0" in batch.message.text()
    assert is_offered(batch)
    whole = (out / "whole.ome.zarr" / "0" / "zarr.json").stat().st_mtime_ns
    batch.offer.click()
    ended(qtbot, dock)
    assert "1 of 1 volume segmented" in batch.message.text()
    assert not is_offered(batch)
    assert (out / "whole.ome.zarr" / "0" / "zarr.json").stat().st_mtime_ns == whole
    with core.open_volume(out / "holed.ome.zarr") as labels:
        image = core.open_volume(tmp_path / "volumes" / "holed.npy", replace_nan=0)
        expected = core.StudentModel.load(student).predict(image.plane(2)).labels
        np.testing.assert_array_equal(labels.plane(2), expected)
    assert len(list(out.glob("report*.csv"))) == 2


def test_slices_of_another_volume_that_have_them_are_read_as_zero_after_the_offer(
    dock, viewer, open_path, sample, tmp_path, qtbot, painted_truth
):
    key = dock.session.annotations.folder.name
    np.save(tmp_path / "other.npy", sample.image)
    open_path(dock, tmp_path / "other.npy")
    dock.session.annotations.put(4, painted_truth[4])
    dock.session.use_also([key])
    dock.distill.start()
    ended(qtbot, dock)
    assert "holed.npy, plane 1" in dock.distill.message.text()
    assert "pixels are NaN or infinite" in dock.distill.message.text()
    assert is_offered(dock.distill)
    dock.distill.offer.click()
    assert not is_offered(dock.distill)
    assert not dock.distill.message.warns
    assert dock.volume._replacing.isHidden()  # the chosen volume is read as before
    for _ in range(2):
        own, other = dock.session.support_maker()().slices
        assert np.isfinite(own.image).all()
        assert np.isfinite(other.image).all()
        for layer in [layer for layer in viewer.layers if layer.name == "holed.npy"]:  # then from its file
            viewer.layers.remove(layer)
    with qtbot.waitSignal(dock.distill.job.done, timeout=120_000):
        dock.distill.start()


@pytest.mark.parametrize("is_earlier", [True, False], ids=["chosen before", "offered"])
def test_the_choice_holds_for_all_annotations_of_a_volume(
    is_earlier, dock, open_dock, open_path, sample, tmp_path, qtbot, holed, painted_truth, monkeypatch
):
    from napari.components import ViewerModel

    own = dock.session.annotations.folder
    monkeypatch.setattr(_annotations, "user_of", lambda folder: folder == own or None)  # in another window
    other = open_dock(ViewerModel())
    open_path(other, holed)
    key = other.session.annotations.folder.name
    assert key == f"{own.name}-2"
    other.session.annotations.put(3, painted_truth[3])
    if is_earlier:
        dock.session.keep_replacement(dock.session.volume, 7.0)
    np.save(tmp_path / "whole.npy", sample.image)
    open_path(other, tmp_path / "whole.npy")
    other.session.annotations.put(4, painted_truth[4])
    other.session.use_also([key])
    if not is_earlier:
        with pytest.raises(core.NotFiniteError):
            other.session.support_maker()()
        other.session.keep_replacement_at(key, 7.0)
    number = {slice_.source: slice_.image[41, 51] for slice_ in other.session.support_maker()().slices}
    assert number["holed.npy, plane 3"] == pytest.approx(7, abs=1e-3)
    third = open_dock(ViewerModel())
    open_path(third, holed)
    assert third.volume.replacement.value() == 7
    third.volume.replaces.setChecked(False)
    with pytest.raises(core.NotFiniteError):
        other.session.support_maker()()


def test_a_choice_of_a_second_window_that_an_older_version_kept_is_found(dock, open_dock, open_path, holed):
    from napari.components import ViewerModel

    folder = dock.session.annotations.folder.name
    dock.session.remember("replace_nan", {f"{folder}-2": 5, "another-123456789012": 4})
    other = open_dock(ViewerModel())
    open_path(other, holed)
    assert other.volume.replacement.value() == 5
    dock.session.remember("replace_nan", {folder: 0, **dock.session.recall("replace_nan", {})})
    assert dock.session.replacement_of(dock.session.volume) == 0


def test_names_of_the_folders_of_one_volume():
    for own in ("stack.tif-0123456789ab", "a-0123456789ab-123456789012", "a-2-0123456789ab"):
        for end in ("", "-2", "-13", ".old1", "-2.old3"):
            assert _annotations.own_name(own + end) == own
    assert _annotations.own_name("elsewhere") == "elsewhere"


def test_an_outline_offers_it_beside_its_message(dock, qtbot):
    assert not is_offered(dock.support)
    dock.support.outline.on.setChecked(True)
    with qtbot.waitSignal(dock.support.outline.settled, timeout=60_000):
        dock.support.outline.add_stroke([(41.0, 40.0)])
    assert dock.support.message.warns
    assert is_offered(dock.support)
    dock.support.offer.click()
    assert not is_offered(dock.support)
    dock.support.outline.on.setChecked(True)
    with qtbot.waitSignal(dock.support.outline.settled, timeout=60_000):
        dock.support.outline.add_stroke([(41.0, 40.0)])
    assert dock.support.outline.answer is not None


@pytest.mark.parametrize("is_file", [True, False])
def test_the_choice_is_there_again_in_a_later_napari(is_file, open_dock, open_path, holed, qtbot):
    from napari.components import ViewerModel

    def opened():
        viewer = ViewerModel()
        dock = open_dock(viewer)
        if is_file:
            open_path(dock, holed)
        else:
            viewer.add_image(np.load(holed), name="holed")
        return dock

    first = opened()
    assert first.volume._replacing.isHidden()
    first.volume.replace_nan(-2.0)
    first.session.close()
    second = opened()
    assert second.volume.replaces.isChecked()
    assert second.volume.replacement.value() == -2
    assert not second.volume._replacing.isHidden()
    assert second.session.volume.volume.plane(1)[41, 51] == -2
    assert second.session.volume.record["opening"]["replace_nan"] == -2
    second.volume.replaces.setChecked(False)
    second.session.close()
    third = opened()
    assert third.volume._replacing.isHidden()
    assert np.isnan(third.session.volume.volume.plane(1)[41, 51])


def test_the_offer_and_the_choice_fit_the_dock(display, make_napari_viewer, open_dock, holed, qtbot):
    viewer = make_napari_viewer(show=True)
    viewer.window._qt_window.setGeometry(0, 0, 1280, 800)
    dock = open_dock(viewer)
    viewer.window.add_dock_widget(dock, name="DistillFSS", area="right")
    levels, options = layer_of_file(holed)
    viewer.add_image(levels[0], **options)
    dock.preview.on.setChecked(True)
    dock.preview._latest._job.error = core.NotFiniteError("no")
    height = dock.sections[dock.preview].sizeHint().height()
    dock.preview._latest.failed.emit("holed.npy plane 1: 10 of 9216 pixels are NaN or infinite")
    qtbot.wait(100)
    assert is_offered(dock.preview)
    assert dock.sections[dock.preview].sizeHint().height() == height
    offer = dock.preview.offer
    assert offer.width() >= offer.minimumSizeHint().width()
    dock.volume.replace_nan(0.0)
    qtbot.wait(100)
    bar = dock.verticalScrollBar().sizeHint().width()
    assert dock.widget().minimumSizeHint().width() + bar <= dock.minimumWidth()
    top = dock.distill.distill.mapTo(dock.viewport(), QPoint(0, 0)).y()
    assert 0 <= top <= dock.viewport().height() - dock.distill.distill.height()
    qtbot.mouseClick(dock.volume.replaces, Qt.MouseButton.LeftButton, pos=QPoint(8, 8))
    assert dock.session.volume.volume.identity.get("replace_nan") is None
