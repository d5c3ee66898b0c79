"""The instant model in the dock: it follows every stroke, in another thread."""

import threading

import numpy as np
import pytest

from napari_distillfss._annotations import Class
from napari_distillfss._instant import InstantAnswers
from napari_distillfss._tasks import Answering, PlanePart


@pytest.fixture
def dock(viewer, nuclei, open_dock):
    return open_dock(viewer)


def paint_rows(dock, painted, z, every):
    """Label every n-th row of a plane, as the brush does."""
    dock.support.paint.click()
    rows = np.arange(0, painted.shape[1], every)
    y, x = (part.ravel() for part in np.meshgrid(rows, np.arange(painted.shape[2]), indexing="ij"))
    dock.support.layer.data_setitem((np.full(len(y), z), y, x), painted[z, y, x])


def stroke(dock, z, y, x, label):
    dock.support.paint.click()
    dock.support.layer.paint((z, y, x), label)


def version(dock):
    instant = dock.preview._instant
    return instant.version if instant is not None else 0


def wait_for_fit(qtbot, dock, earlier):
    """Until a fit later than that was shown."""
    qtbot.waitUntil(lambda: version(dock) > earlier and not dock.preview.busy, timeout=60_000)
    qtbot.waitUntil(lambda: dock.preview._version == version(dock), timeout=60_000)


def wait_until_at_rest(qtbot, dock):
    qtbot.wait(600)  # longer than any debouncer
    qtbot.waitUntil(lambda: not dock.preview.busy, timeout=60_000)


@pytest.fixture
def live(dock, qtbot, painted_truth):
    """A dock whose instant model has learned from every fourth row of plane 2, which is on screen."""
    dock.support.go_to(2)
    paint_rows(dock, painted_truth, 2, 4)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.preview.on.setChecked(True)
    return dock


def test_the_plane_on_screen_is_predicted_from_scribbles(live, qtbot, sample):
    truth = sample.labels[2] > 0
    shown = live.preview.layers["labels"].data[0] > 0
    assert (shown & truth).sum() / (shown | truth).sum() > 0.6
    assert live.preview.message.text() == "Preview of plane 2 is ready"
    expected = live.preview.model().predict(live.session.volume.volume.plane(2))
    np.testing.assert_array_equal(live.preview.layers["labels"].data[0], expected.labels)
    live.support.go_to(5)
    qtbot.waitUntil(lambda: live.preview.plane == 5 and "is ready" in live.preview.message.text(), timeout=60_000)
    expected = live.preview.model().predict(live.session.volume.volume.plane(5))
    np.testing.assert_array_equal(live.preview.layers["labels"].data[0], expected.labels)


def test_a_stroke_changes_what_is_shown_in_the_same_layer(live, qtbot, painted_truth):
    layer, earlier = live.preview.layers["labels"], version(live)
    before = layer.data.copy()
    inverted = 3 - painted_truth
    paint_rows(live, inverted, 2, 1)
    wait_for_fit(qtbot, live, earlier)
    assert live.preview.layers["labels"] is layer
    assert (layer.data != before).mean() > 0.5
    expected = live.preview.model().predict(live.session.volume.volume.plane(2))
    np.testing.assert_array_equal(layer.data[0], expected.labels)


def test_of_several_strokes_the_last_one_counts(live, qtbot):
    for x in range(10, 90, 8):
        stroke(live, 2, 50, x, 2)
        qtbot.wait(20)
    wait_until_at_rest(qtbot, live)
    alone = InstantAnswers(live.session.volume.volume, live.session.annotations)
    alone.follow(threading.Event())
    shown = live.preview.layers["labels"].data[0]
    assert (shown == alone.model.predict(live.session.volume.volume.plane(2)).labels).mean() >= 0.99


def test_undo_is_followed(live, qtbot, painted_truth):
    earlier = version(live)
    paint_rows(live, 3 - painted_truth, 2, 1)
    wait_for_fit(qtbot, live, earlier)
    wait_until_at_rest(qtbot, live)
    earlier, inverted = version(live), live.preview.layers["labels"].data.copy()
    live.support.layer.undo()
    wait_for_fit(qtbot, live, earlier)
    assert (live.preview.layers["labels"].data != inverted).mean() > 0.5


def test_nothing_is_read_or_fitted_in_the_thread_of_the_window(dock, qtbot, painted_truth, monkeypatch):
    threads = []
    follow = InstantAnswers.follow

    def recorded(self, stop):
        threads.append(threading.current_thread())
        follow(self, stop)

    monkeypatch.setattr(InstantAnswers, "follow", recorded)
    paint_rows(dock, painted_truth, 2, 4)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.preview.on.setChecked(True)
    assert threads
    assert threading.main_thread() not in threads


def test_without_live_the_model_follows_when_the_plane_changes(live, qtbot):
    live.preview.live.setChecked(False)
    wait_until_at_rest(qtbot, live)
    earlier = version(live)
    stroke(live, 2, 50, 50, 2)
    wait_until_at_rest(qtbot, live)
    assert version(live) == earlier
    live.support.go_to(3)
    wait_for_fit(qtbot, live, earlier)
    assert live.preview.plane == 3
    earlier = version(live)
    stroke(live, 3, 50, 50, 2)
    wait_until_at_rest(qtbot, live)
    assert version(live) == earlier
    live.preview.live.setChecked(True)
    wait_for_fit(qtbot, live, earlier)


def test_live_is_remembered(viewer, nuclei, open_dock, tmp_path):
    first = open_dock(viewer, tmp_path / "kept")
    assert first.preview.live.isChecked()
    first.preview.live.setChecked(False)
    assert not open_dock(viewer, tmp_path / "kept").preview.live.isChecked()
    assert open_dock(viewer, tmp_path / "other").preview.live.isChecked()
    (tmp_path / "kept" / "choices.json").write_text("{damaged")
    assert open_dock(viewer, tmp_path / "kept").preview.live.isChecked()


def test_what_is_missing_is_named_until_it_is_painted(dock, qtbot):
    dock.support.go_to(2)
    dock.preview.on.setChecked(True)
    qtbot.waitUntil(lambda: "no slice is annotated" in dock.preview.message.text(), timeout=60_000)
    stroke(dock, 2, 50, 50, 2)
    qtbot.waitUntil(lambda: "no pixel is labeled background" in dock.preview.message.text(), timeout=60_000)
    assert dock.preview.on.isChecked()
    assert dock.preview.message.warns
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        stroke(dock, 2, 10, 10, 1)
    assert dock.preview.message.text() == "Preview of plane 2 is ready"
    assert dock.preview.layers["labels"].visible


def test_a_preview_without_strokes_any_more_is_hidden(live, qtbot):
    layer = live.preview.layers["labels"]
    live.session.annotations.remove(2)
    live.session.painted()
    qtbot.waitUntil(lambda: "no slice is annotated" in live.preview.message.text(), timeout=60_000)
    assert not layer.visible


def test_a_stroke_whose_slice_is_removed_at_once_is_forgotten_by_the_preview(live, qtbot):
    wait_until_at_rest(qtbot, live)
    live.session.annotations.remove(2)
    live.session.painted()
    qtbot.waitUntil(lambda: "no slice is annotated" in live.preview.message.text(), timeout=60_000)
    changes = []
    live.session.slices_changed.connect(lambda: changes.append(live.session.annotations.planes()))
    stroke(live, 2, 50, 50, 2)
    live.session.annotations.remove(2)  # sooner than the stroke is counted
    live.session.painted()
    assert changes == [[]]


def test_a_class_that_is_added_has_a_probability(live, qtbot):
    earlier = version(live)
    classes = live.session.annotations.classes
    live.support.classes.setValue((*classes, Class("debris", "#112233")))
    wait_for_fit(qtbot, live, earlier)
    assert [live.preview.of_class.itemText(i) for i in range(live.preview.of_class.count())][1:] == ["debris"]
    assert live.preview.evidence_of(2).shape == (3, 96, 96)
    assert not live.preview.evidence_of(2)[2].any()
    earlier = version(live)
    stroke(live, 2, 50, 50, 3)
    wait_for_fit(qtbot, live, earlier)
    assert live.preview.evidence_of(2)[2].any()


def test_the_evidence_of_a_plane_is_what_the_preview_has_computed_for_it(live):
    evidence = live.preview.evidence_of(2)
    expected = live.preview.model().predict(live.session.volume.volume.plane(2)).probabilities
    np.testing.assert_array_equal(evidence, expected)
    assert live.preview.evidence_of(3) is None
    live.preview.on.setChecked(False)
    assert live.preview.evidence_of(2) is None


def test_a_student_is_shown_whatever_is_painted(live, qtbot, student):
    earlier = version(live)
    live.model.load_from(student)
    qtbot.waitUntil(lambda: live.session.model is not None and not live.session.busy, timeout=60_000)
    wait_until_at_rest(qtbot, live)
    assert live.preview.source.currentText() == "model"
    stroke(live, 2, 50, 50, 2)
    wait_until_at_rest(qtbot, live)
    assert version(live) == earlier
    expected = live.session.model.predict(live.session.volume.volume.plane(2))
    np.testing.assert_array_equal(live.preview.layers["labels"].data[0], expected.labels)


def test_a_slice_that_is_left_out_is_not_learned_from(live, qtbot, painted_truth):
    earlier = version(live)
    paint_rows(live, 3 - painted_truth, 5, 1)
    wait_for_fit(qtbot, live, earlier)
    wait_until_at_rest(qtbot, live)
    with_both, earlier = live.preview.layers["labels"].data.copy(), version(live)
    item = live.support.list.item(1)
    item.setCheckState(item.checkState().__class__.Unchecked)
    wait_for_fit(qtbot, live, earlier)
    assert (live.preview.layers["labels"].data != with_both).mean() > 0.1


def test_the_dock_for_a_student_shows_the_model(viewer, nuclei, tmp_path, qtbot):
    from napari_distillfss._widgets.dock import ApplyDock

    dock = ApplyDock(viewer, tmp_path)
    preview = dock.preview
    assert [preview.source.itemText(i) for i in range(preview.source.count())] == ["model"]
    assert preview.message.text() == "Load a model first"
    assert all(part.isHidden() for part in (preview.live, preview.take, preview.source.parentWidget()))
    preview.on.setChecked(True)
    assert preview.message.text() == "Load a model first"
    dock.session.close()
    dock.deleteLater()


def test_a_preview_that_is_off_names_what_its_source_needs(dock):
    assert "paint" in dock.preview.message.text()
    dock.preview.source.setCurrentText("model")
    assert dock.preview.message.text().startswith("Train a model")
    assert not dock.preview.live.isEnabled()  # it is of the instant model
    assert dock.preview.live.isChecked()
    dock.preview.source.setCurrentText("instant")
    assert dock.preview.live.isEnabled()
    assert "paint" in dock.preview.message.text()


@pytest.fixture
def with_bright(viewer, dock, qtbot, sample, painted_truth):
    """A dock whose first volume has no slice and uses plane 3 of another that is eight times as bright."""
    viewer.add_image(sample.image * 8, name="bright", scale=(2.5, 1, 1), units=("um",) * 3)
    choose(dock, 1)
    for z in (3, 5):
        dock.session.annotations.put(z, painted_truth[z])
    dock.session.painted()
    choose(dock, 0)
    key = dock.session.others()[0].key
    dock.session.use_also([key])
    dock.session.leave_out(key, 5)
    dock.support.go_to(2)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.preview.on.setChecked(True)
    return dock, key


def choose(dock, index):
    dock.volume.layers.setCurrentIndex(index)
    dock.volume.layers.activated.emit(index)


def overlap(shown, truth):
    return (shown & truth).sum() / (shown | truth).sum()


def test_slices_of_another_volume_are_learned_from_on_the_scale_of_this_one(with_bright, sample, qtbot):
    dock, key = with_bright
    shown = dock.preview.layers["labels"].data[0] > 0
    assert overlap(shown, sample.labels[2] > 0) > 0.6
    (learned,) = dock.preview._instant._read_others(("object",)).values()
    np.testing.assert_allclose(learned.image, sample.image[3], rtol=0.02, atol=6)
    earlier = version(dock)
    dock.session.leave_out(key, 5, False)
    dock.session.stroked.emit()
    wait_for_fit(qtbot, dock, earlier)
    assert len(dock.preview._instant._read_others(("object",))) == 2


def test_a_slice_of_another_volume_that_is_unticked_is_not_learned_from(with_bright, qtbot):
    dock, _ = with_bright
    (row,) = (n for n in range(dock.support.list.count()) if "plane 3" in dock.support.list.item(n).text())
    item = dock.support.list.item(row)
    item.setCheckState(item.checkState().__class__.Unchecked)
    qtbot.waitUntil(lambda: "no slice is annotated" in dock.preview.message.text(), timeout=60_000)


def test_only_what_changes_is_read_again(with_bright, qtbot, monkeypatch, painted_truth):
    from napari_distillfss._sources import OtherSlices

    dock, key = with_bright
    reads, encoded = [], []
    read, encode = OtherSlices.read, type(dock.preview.model())._encode
    monkeypatch.setattr(OtherSlices, "read", lambda self, *args: (reads.append(self.key), read(self, *args))[1])
    monkeypatch.setattr(
        type(dock.preview.model()), "_encode", lambda self, *args: (encoded.append(1), encode(self, *args))[1]
    )
    earlier = version(dock)
    paint_rows(dock, painted_truth, 2, 4)  # the plane on screen was encoded for its preview
    wait_for_fit(qtbot, dock, earlier)
    assert (reads, encoded) == ([], [])
    earlier = version(dock)
    dock.session.leave_out(key, 5, False)
    dock.session.stroked.emit()
    wait_for_fit(qtbot, dock, earlier)
    assert reads == []
    assert encoded


def test_the_instant_model_goes_on_without_a_volume_that_is_closed_and_names_it(
    with_bright, viewer, qtbot, painted_truth
):
    dock, _ = with_bright
    paint_rows(dock, painted_truth, 2, 4)
    wait_until_at_rest(qtbot, dock)
    earlier = version(dock)
    viewer.layers.remove("bright")
    stroke(dock, 2, 50, 50, 2)
    wait_for_fit(qtbot, dock, earlier)
    wait_until_at_rest(qtbot, dock)
    assert dock.preview.message.text() == (
        "Preview of plane 2 is ready, but without bright, which is no file, and not open here"
    )


def test_a_preview_that_arrives_in_parts_is_drawn_few_times(live, qtbot, monkeypatch):
    """napari maps a whole plane to colors for each drawing. The last part is drawn before the preview is settled."""
    drawn, layer, planes = [], live.preview.layers["labels"], live.session.volume.volume
    expected = live.preview.model().predict(planes.plane(5))
    monkeypatch.setattr(live.preview.model(), "tile", 24)
    show = live.preview._show_layers
    monkeypatch.setattr(live.preview, "_show_layers", lambda: show() or drawn.append(layer.data.copy()))
    live.preview._soon_shown.setTimeout(60_000)
    parts = []
    live.preview._latest.answered.connect(parts.append)
    with qtbot.waitSignal(live.preview.settled, timeout=60_000):
        live.support.go_to(5)
    count = sum(isinstance(part, PlanePart) for part in parts)
    assert count >= 9
    assert len(drawn) == 2  # of the first part, and of all
    assert drawn[0].any()
    np.testing.assert_array_equal(drawn[-1], layer.data)
    assert (layer.data[0] == expected.labels).mean() > 0.95


def test_the_memory_of_a_preview_is_filled_in_another_thread(live, qtbot, monkeypatch):
    from napari_distillfss._widgets import preview

    threads, make = [], preview._blank
    monkeypatch.setattr(preview, "_blank", lambda *a: threads.append(threading.current_thread()) or make(*a))
    with qtbot.waitSignal(live.preview.settled, timeout=60_000):
        live.support.go_to(5)
    assert len(threads) == 1
    assert threading.main_thread() not in threads


def test_a_preview_that_is_not_yet_of_the_latest_strokes_says_so(live, qtbot, monkeypatch):
    go_on, follow = threading.Event(), InstantAnswers.follow
    monkeypatch.setattr(InstantAnswers, "follow", lambda self, stop: go_on.wait(60) and follow(self, stop))
    stroke(live, 2, 50, 50, 2)
    qtbot.waitUntil(lambda: live.preview.message.text() == "Preview of plane 2: following your strokes", timeout=10_000)
    go_on.set()
    qtbot.waitUntil(lambda: live.preview.message.text() == "Preview of plane 2 is ready", timeout=60_000)


def test_a_preview_without_a_volume_says_what_is_missing(viewer, open_dock):
    dock = open_dock(viewer)
    dock.preview.on.setChecked(True)
    assert dock.preview.message.text() == "Choose a volume first"


def test_large_slices_get_a_first_answer_before_all_of_them_are_learned_from(dock, qtbot, painted_truth, monkeypatch):
    from distillfss_core import InstantModel

    monkeypatch.setattr(InstantModel, "tile", 24)
    for z in (2, 4, 6):
        dock.session.annotations.put(z, painted_truth[z])
    dock.session.painted()
    dock.support.go_to(2)
    steps, shown = [], []
    dock.preview._latest.answered.connect(steps.append)
    dock.preview._latest.answered.connect(lambda _: shown.append(dock.preview.message.text()))
    with qtbot.waitSignal(dock.preview.settled, timeout=120_000):
        dock.preview.on.setChecked(True)
    versions = [step.version for step in steps if isinstance(step, Answering)]
    assert versions == [1, 2]
    (first,) = {steps.index(step) for step in steps if isinstance(step, Answering) and step.version == 2}
    assert any(isinstance(step, PlanePart) for step in steps[:first])  # it is shown
    assert "Preview of plane 2: a first answer; learning from the rest of the slices" in shown
    assert not dock.preview._instant.is_behind
    expected = dock.preview.model().predict(dock.session.volume.volume.plane(2), tile=24)
    np.testing.assert_array_equal(dock.preview.layers["labels"].data[0], expected.labels)


def test_a_slider_is_answered_before_the_rest_of_large_slices_is_learned_from(dock, qtbot, painted_truth, monkeypatch):
    from distillfss_core import InstantModel

    monkeypatch.setattr(InstantModel, "tile", 24)
    go_on, rest = threading.Event(), InstantAnswers.learn_rest

    def held_up(self, stop):
        while not (go_on.is_set() or stop.is_set()):
            stop.wait(0.01)
        if go_on.is_set():
            rest(self, stop)

    monkeypatch.setattr(InstantAnswers, "learn_rest", held_up)
    for z in (2, 4, 6):
        dock.session.annotations.put(z, painted_truth[z])
    dock.session.painted()
    dock.support.go_to(2)
    dock.preview.on.setChecked(True)
    qtbot.waitUntil(lambda: "a first answer" in dock.preview.message.text(), timeout=60_000)
    dock.support.go_to(3)
    qtbot.waitUntil(lambda: "plane 3: a first answer" in dock.preview.message.text(), timeout=60_000)
    assert dock.preview.layers["labels"].data.any()
    assert version(dock) == 1
    go_on.set()
    qtbot.waitUntil(lambda: "plane 3 is ready" in dock.preview.message.text(), timeout=60_000)
    assert version(dock) == 2
