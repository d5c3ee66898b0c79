"""Work in another thread."""

import gc
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QApplication, QProgressDialog, QPushButton

from distillfss_core import DistillFSSError, SampleStep
from napari_distillfss import _process
from napari_distillfss._session import Session
from napari_distillfss._threads import Job, LatestJob, wait_for, wait_for_run


def counting(stop, limit=10**9):
    for number in range(limit):
        if stop.wait(0.002):
            return "stopped"
        yield number
    return "finished"


def test_a_job_gives_its_steps_and_its_result(qtbot):
    job, steps = Job(), []
    job.stepped.connect(steps.append)
    with qtbot.waitSignals([job.done, job.ended]) as seen:
        job.start(lambda stop: counting(stop, 3))
    assert steps == [0, 1, 2]
    assert seen.all_signals_and_args[0].args == ("finished",)


def test_a_job_that_is_cancelled_stops_at_its_next_step(qtbot):
    job = Job()
    with qtbot.waitSignal(job.stepped):
        job.start(counting)
    with qtbot.waitSignal(job.done) as done:
        job.cancel()
    assert done.args == ["stopped"]


def test_an_error_that_was_expected_is_a_sentence(qtbot):
    def faulty(stop):
        yield 1
        raise DistillFSSError("the disk is full")

    job = Job()
    with qtbot.waitSignal(job.failed) as failed:
        job.start(faulty)
    assert failed.args == ["the disk is full"]


def test_a_bug_is_seen_in_the_windows_thread(qtbot):
    def buggy(stop):
        yield 1
        raise RuntimeError("a bug")

    job = Job()
    with qtbot.captureExceptions() as seen, qtbot.waitSignal(job.ended):
        job.start(buggy)
    assert [str(error) for _, error, _ in seen] == ["a bug"]
    assert not job.running


def test_a_second_job_of_a_session_waits(qtbot, tmp_path):
    session = Session(tmp_path)
    first, second = Job(session, "Training"), Job(session, "Segmentation")
    with qtbot.waitSignal(first.stepped):
        first.start(counting)
    with pytest.raises(DistillFSSError, match="Training is running; cancel it, or wait until it has ended"):
        second.start(counting)
    with qtbot.waitSignal(first.ended):
        session.close()
    assert session.busy == ""


def test_a_job_that_is_abandoned_ends_at_once_and_what_comes_later_is_dropped(qtbot, tmp_path):
    session, go_on, seen = Session(tmp_path), threading.Event(), []
    job = Job(session, "Opening")
    for signal in (job.stepped, job.done):
        signal.connect(seen.append)

    def late(stop):
        yield "first"
        assert go_on.wait(10)
        yield "late"
        return "late"

    job.start(late)
    qtbot.waitUntil(lambda: seen == ["first"])
    job.abandon()
    assert not job.running
    assert (session.busy, job.was_stopped) == ("", True)
    assert seen == ["first", None]
    with qtbot.waitSignal(job.ended):
        job.start(lambda stop: counting(stop, 2))
    go_on.set()
    qtbot.waitUntil(lambda: not any("Opening" in t.name for t in threading.enumerate()))
    qtbot.wait(20)
    assert "late" not in seen
    job.abandon()  # nothing runs
    assert seen[2:] == [0, 1, "finished"]


def test_a_job_in_turn_waits_for_what_was_abandoned(qtbot, tmp_path):
    session, go_on, done = Session(tmp_path), threading.Event(), []
    job = Job(session, "Writing", in_turn=True)

    def writing(stop):
        yield "first"
        assert go_on.wait(10)
        done.append("first")

    def next_one(stop):
        done.append("second")
        yield "second"

    with qtbot.waitSignal(job.stepped):
        job.start(writing)
    job.abandon()
    assert not job.running
    job.start(lambda stop: counting(stop, 0))
    with qtbot.waitSignal(job.ended):  # also one that waits can be cancelled
        job.cancel()
    job.start(next_one)
    qtbot.wait(200)
    assert job.running
    assert done == []
    with qtbot.waitSignal(job.ended):
        go_on.set()
    assert done == ["first", "second"]


def test_what_arrives_is_handled_one_by_one_also_where_a_slot_processes_events(qtbot):
    """napari's progress bars do so."""
    from qtpy.QtWidgets import QApplication

    job, seen, turns = Job(), [], []
    turn = QTimer()
    turn.timeout.connect(lambda: turns.append(None))
    turn.start(0)

    def slow(step):
        seen.append(f"{step} begins")
        for _ in range(20):
            QApplication.processEvents()
        seen.append(f"{step} ends")
        turns.clear()

    job.stepped.connect(slow)
    job.stepped.connect(lambda step: turns.clear())
    job.done.connect(lambda result: seen.append((result, bool(turns))))

    def work(stop):
        yield from "abc"
        return "done"

    with qtbot.waitSignal(job.ended):
        job.start(work)
    assert seen == [*(f"{step} {what}" for step in "abc" for what in ("begins", "ends")), ("done", True)]


def test_answers_to_outdated_questions_are_dropped(qtbot):
    latest, seen = LatestJob(), []
    latest.answered.connect(seen.append)

    def answer(name):
        def work(stop):
            for _ in range(5):
                yield name
                stop.wait(0.005)

        return work

    with qtbot.waitSignal(latest.idle):
        for name in "abcd":
            latest.ask(answer(name))
    assert seen[-5:] == ["d"] * 5
    assert not {"b", "c"} & set(seen)


def test_the_window_gets_its_turn_more_often_while_any_work_goes_on(qtbot):
    before, jobs = sys.getswitchinterval(), [Job(), Job()]
    collections = gc.get_threshold()
    for job in jobs:
        with qtbot.waitSignal(job.stepped):
            job.start(counting)
    while_working = sys.getswitchinterval()
    assert while_working < before
    assert gc.get_threshold()[2] >= 200
    for job in jobs:
        assert sys.getswitchinterval() == while_working
        with qtbot.waitSignal(job.ended):
            job.cancel()
    assert sys.getswitchinterval() == before
    assert gc.get_threshold() == collections


def test_settings_of_the_process_stay_where_the_user_wants_them_kept(qtbot, monkeypatch):
    monkeypatch.setenv("DISTILLFSS_KEEP_PROCESS", "1")
    before, job = (sys.getswitchinterval(), gc.get_threshold()), Job()
    with qtbot.waitSignal(job.stepped):
        job.start(counting)
    assert (sys.getswitchinterval(), gc.get_threshold()) == before
    with qtbot.waitSignal(job.ended):
        job.cancel()
    assert (sys.getswitchinterval(), gc.get_threshold()) == before


@pytest.mark.parametrize(
    ("keep", "maps", "hidden"), [("0", "libLLVM", True), ("1", "libLLVM", False), ("0", "", False)]
)
def test_triton_is_hidden_where_mesa_draws_by_llvm(monkeypatch, keep, maps, hidden):
    monkeypatch.setenv("DISTILLFSS_KEEP_PROCESS", keep)
    monkeypatch.setitem(sys.modules, "triton", None)  # so that it is afterwards as before
    del sys.modules["triton"]
    monkeypatch.setattr(_process, "Path", lambda _: SimpleNamespace(is_file=lambda: True, read_text=lambda: maps))
    _process.keep_triton_out()
    assert ("triton" in sys.modules) is hidden


def test_a_setting_of_the_process_that_somebody_else_changes_during_a_job_is_left(qtbot):
    interval, collections, job = sys.getswitchinterval(), gc.get_threshold(), Job()
    try:
        with qtbot.waitSignal(job.stepped):
            job.start(counting)
        sys.setswitchinterval(0.02)
        gc.set_threshold(collections[0], collections[1], 77)
        with qtbot.waitSignal(job.ended):
            job.cancel()
        assert sys.getswitchinterval() == pytest.approx(0.02)
        assert gc.get_threshold() == (*collections[:2], 77)
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*collections)


def test_the_window_is_drawn_while_it_waits_for_a_function(qtbot):
    from napari.utils import progress

    begun, ticks, shown = threading.Event(), [], []

    def tick():
        ticks.append(None)
        shown.append([p.desc for p in progress._all_instances])
        if len(ticks) == 3:
            begun.set()

    timer = QTimer()
    timer.timeout.connect(tick)
    timer.start(1)
    threads = []

    def function():
        threads.append(threading.current_thread())
        return begun.wait(10)  # true only if the timer has ticked meanwhile

    assert wait_for(function, "Generation of nuclei") is True
    timer.stop()
    assert threads != [threading.main_thread()]
    assert shown[0] == ["DistillFSS: Generation of nuclei"]
    assert not progress._all_instances


def test_an_error_of_a_function_that_is_waited_for_is_raised(qtbot):
    def fails():
        raise DistillFSSError("no stack")

    with pytest.raises(DistillFSSError, match="no stack"):
        wait_for(fails, "Generation of nuclei")


class Counted:
    """A run of a hundred steps."""

    def __init__(self, fails=False):
        self.index, self.fails = 0, fails
        self.threads = set()

    def __iter__(self):
        return self

    def __next__(self):
        self.threads.add(threading.current_thread())
        if self.fails and self.index == 2:
            raise DistillFSSError("no stack")
        if self.index == 100:
            raise StopIteration
        self.index += 1
        time.sleep(0.002)
        return SampleStep(self.index)

    def result(self):
        return "stack"


def progress_dialogs():
    return [w for w in QApplication.topLevelWidgets() if isinstance(w, QProgressDialog) and w.isVisible()]


def test_a_run_that_is_waited_for_shows_how_far_it_is(qtbot):
    values, timer, run = [], QTimer(), Counted()
    timer.timeout.connect(lambda: values.extend(d.value() for d in progress_dialogs()))
    timer.start(1)
    assert wait_for_run(run, "Generation of nuclei") == "stack"
    timer.stop()
    assert values == sorted(values)
    assert len(set(values)) > 5
    assert threading.main_thread() not in run.threads
    assert not progress_dialogs()


def test_a_run_that_is_waited_for_can_be_cancelled(qtbot):
    timer, run = QTimer(), Counted()

    def press():
        for dialog in progress_dialogs():
            if dialog.value() > 5:
                dialog.findChild(QPushButton).click()
                timer.stop()

    timer.timeout.connect(press)
    timer.start(1)
    with pytest.raises(DistillFSSError, match="Generation of nuclei was cancelled; nothing was added"):
        wait_for_run(run, "Generation of nuclei")
    assert run.index < 100
    assert not progress_dialogs()


def test_an_error_of_a_run_that_is_waited_for_is_raised(qtbot):
    with pytest.raises(DistillFSSError, match="no stack"):
        wait_for_run(Counted(fails=True), "Generation of nuclei")
    assert not progress_dialogs()


def test_what_the_dock_tells_gives_no_second_notification(qtbot, told):
    import warnings

    from napari.utils.notifications import notification_manager

    from distillfss_core import IntensityWarning

    go_on = threading.Event()

    def warning(stop):
        yield
        warnings.warn("its intensities differ", IntensityWarning, stacklevel=1)
        warnings.warn("a layer is odd", UserWarning, stacklevel=1)
        assert go_on.wait(10)

    with notification_manager, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = notification_manager.receive_warning
        job = Job(name="Segmentation")
        with qtbot.waitSignal(job.stepped):
            job.start(warning)
        qtbot.waitUntil(lambda: "a layer is odd" in told())
        warnings.warn("of a script in this process", IntensityWarning, stacklevel=1)
        with qtbot.waitSignal(job.ended):
            go_on.set()
        assert warnings.showwarning == notification_manager.receive_warning
    assert told() == ["a layer is odd", "of a script in this process"]
