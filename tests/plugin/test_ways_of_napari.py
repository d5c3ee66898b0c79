"""Progress in the activity dock, notifications, keys and styles, as napari has them."""

import logging
from threading import Event

import numpy as np
import pytest
from app_model.types import KeyBinding
from napari.utils import progress

from distillfss_core import ImageError, TrainStep
from napari_distillfss._session import Session
from napari_distillfss._threads import Job
from napari_distillfss._widgets._common import JobBar


@pytest.fixture
def dock(viewer, nuclei, open_dock, few):
    opened = open_dock(viewer)
    opened.distill.settings.setValue(few)
    return opened


@pytest.fixture
def bar(qtbot):
    made = JobBar(Job(name="Object count"), cancel="Stop")
    qtbot.addWidget(made)
    return made


def press(viewer, key):
    for function in [f for k, f in viewer.keymap.items() if k == KeyBinding.from_str(key)]:
        function(viewer)


def test_warnings_of_the_core_are_notifications_once_each_while_a_dock_is_open(viewer, open_dock, told):
    """Labels of a volume without scale are made by consensus: the core takes its voxels for cubes."""
    log = logging.getLogger("distillfss_core.segmentation.modes")
    docks = [open_dock(viewer), open_dock(viewer)]
    for _ in range(2):
        log.warning("%s: its scale is not known", "stack")
    log.info("nothing to see")
    assert told() == ["DistillFSS: stack: its scale is not known"]
    for dock in docks:
        dock.session.close()
        dock.session.close()
    log.warning("stack: another thing")
    assert len(told()) == 1


def test_progress_is_in_the_activity_dock_while_a_job_runs(bar, qtbot):
    job, seen, go_on = bar._job, [], Event()

    def work(stop):
        for index in (1, 2):
            yield TrainStep(index, 4)
        go_on.wait(10)
        yield TrainStep(1, 3)

    job.stepped.connect(lambda _: seen.append([(p.desc, p.n, p.total) for p in progress._all_instances]))
    job.start(work)
    assert [p.desc for p in progress._all_instances] == ["DistillFSS: Object count"]
    qtbot.waitUntil(lambda: len(seen) == 2)
    go_on.set()
    qtbot.waitUntil(lambda: not job.running)
    assert [step[0][1:] for step in seen] == [(1, 4), (2, 4), (1, 3)]
    assert not progress._all_instances


@pytest.mark.parametrize("is_shown", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_end_of_a_job_is_notified_where_it_cannot_be_seen(bar, qtbot, told, is_shown, fails):
    def work(stop):
        yield TrainStep(1, 2)
        if fails:
            raise ImageError("no image")
        return 1

    holder = bar.parentWidget() or bar
    bar._job.started.connect(lambda: holder.setVisible(is_shown))
    bar._job.start(work)
    qtbot.waitUntil(lambda: not bar._job.running)
    ended = "DistillFSS: Object count has failed: no image" if fails else "DistillFSS: Object count is finished"
    assert told() == ([] if is_shown else [ended])
    assert not progress._all_instances


def test_every_job_of_the_dock_has_a_noun(dock):
    names = {job.name for job in dock.findChildren(Job)} - {Job().name}
    assert {"Training", "Segmentation", "Batch segmentation", "Object count", "Label export"} <= names
    verbal_nouns = {"Training", "Opening", "loading"}
    for name in names:
        assert name[0].isupper()
        assert not any(word.endswith("ing") for word in name.split() if word not in verbal_nouns)


def test_a_job_that_does_various_work_has_the_noun_of_the_latest(qtbot, tmp_path):
    session, seen = Session(tmp_path), []
    job = Job(session, "Slice suggestion")
    job.started.connect(lambda: seen.append((job.name, session.busy)))

    def work(stop):
        yield TrainStep(1, 2)

    for name in (None, "Label import"):
        with qtbot.waitSignal(job.ended):
            job.start(work, name)
    assert seen == [("Slice suggestion",) * 2, ("Label import",) * 2]


def test_a_job_that_was_stopped_is_not_notified(bar, qtbot, told):
    def work(stop):
        yield TrainStep(1, 2)
        stop.wait(10)
        return 1

    bar._job.started.connect(bar.hide)
    bar._job.start(work)
    bar._job.cancel()
    qtbot.waitUntil(lambda: not bar._job.running)
    assert told() == []


def test_keys_choose_classes_slices_preview_and_training(dock, viewer, monkeypatch):
    from napari_distillfss._annotations import Class

    dock.support.classes.setValue((Class("a", "#111111"), Class("b", "#222222")))
    for key, brush in (("Alt+2", 3), ("Alt+1", 2), ("Alt+9", 2)):
        press(viewer, key)
        assert dock.support.classes.brush() == brush
    dock.support.suggested = [1, 4, 6]
    dock.session.annotations.put(4, np.ones((96, 96), np.uint8))
    dock.support.go_to(2)
    visited = []
    for _ in range(3):
        press(viewer, "Alt+N")
        visited.append(dock.support.plane())
    assert visited == [6, 1, 6]
    press(viewer, "Alt+P")
    assert dock.preview.on.isChecked()
    press(viewer, "Alt+P")
    assert not dock.preview.on.isChecked()
    dock.session.annotations.put(7, np.ones((96, 96), np.uint8))
    for key, plane in (("Alt+Right", 7), ("Alt+Right", 4), ("Alt+Left", 7)):
        press(viewer, key)
        assert dock.support.plane() == plane
    dock.support.go_to(2)
    press(viewer, "Alt+A")
    assert 2 in dock.support.suggested
    press(viewer, "Alt+R")
    assert "there is no model to refine yet" in dock.distill.message.text()
    for z in (4, 7):
        dock.session.annotations.remove(z)
    press(viewer, "Alt+T")
    assert "no slice is annotated" in dock.distill.message.text()
    dock.session.close()
    assert not any(str(key).startswith("Alt") for key in viewer.keymap)


def test_a_dock_that_closes_gives_its_keys_back(viewer, nuclei, open_dock, tmp_path):
    from napari_distillfss._widgets.dock import ApplyDock

    pressed = []
    viewer.bind_key("Alt-P", pressed.append)
    first, small = open_dock(viewer), ApplyDock(viewer, tmp_path / "small")
    press(viewer, "Alt+P")
    assert [dock.preview.on.isChecked() for dock in (first, small)] == [False, True]
    for key, text in (("Alt+T", "no slice is annotated"), ("Alt+R", "no model to refine"), ("Alt+A", "Paint in plane")):
        press(viewer, key)  # these belong to the dock in which slices are annotated
        assert text in first.distill.message.text() + first.support.message.text()
    assert not small.support.suggested
    small.session.close()
    small.deleteLater()
    press(viewer, "Alt+P")
    assert first.preview.on.isChecked()
    second = open_dock(viewer, tmp_path / "second")
    first.session.close()  # before the one that has taken its keys
    press(viewer, "Alt+P")
    assert second.preview.on.isChecked()
    assert not pressed
    second.session.close()
    press(viewer, "Alt+P")
    assert pressed == [viewer]
    assert [str(key) for key in viewer.keymap] == ["Alt+P"]


def test_the_preview_is_filled_outlined_or_dim(dock, viewer, qtbot, student):
    dock.preview.drawn_as.setCurrentText("outlines")
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    layer = dock.preview.layers["labels"]
    assert layer.contour == 2
    filled = 0.45
    dock.preview.drawn_as.setCurrentText("filled")
    assert (layer.contour, layer.opacity) == (0, filled)
    dock.preview.drawn_as.setCurrentText("dim")
    assert layer.contour == 0
    assert layer.opacity < filled
