"""Jobs in threads: signals carry progress and errors, an event stops them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from io import StringIO
from threading import Event, Thread
from typing import Any

from napari.utils import progress
from qtpy.QtCore import QEventLoop, QObject, Qt, QThread, QTimer, Signal
from qtpy.QtWidgets import QApplication, QProgressDialog

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._process import THREADS, keep_triton_out, quick_turns, rare_collections, told_warnings
from napari_distillfss._session import Session
from napari_distillfss._tasks import Work

_LOOK_AGAIN = 0.05  # seconds


class _Out(QObject):
    """Signals of a thread, with its event to stop. It has no parent, so that it lives as long as the thread."""

    step = Signal(object, object)
    end = Signal(object, object)


class Job(QObject):
    """Runs work in a thread. Of all jobs of a session one runs at a time.

    ``stepped`` gives what the work yields, ``done`` what it returns, ``failed`` a sentence; ``ended`` comes last in
    any case. (superqt's workers redirect the warnings of the whole process while they run, which breaks where two
    overlap; so this has its own thread.)

    What arrives from the thread is handled one by one, each in a turn of the event loop of its own. So drawing and
    input come in between. Nothing is handled while something else is: napari's progress bars process events themselves.

    Parameters
    ----------
    session : Session, optional
        Whose other jobs have to wait; without one this job minds no other.
    name : str
        A noun for the work, with a capital letter: "Training".
    in_turn : bool
        Whether work waits until the thread of abandoned work has ended, as both write in one place.
    """

    started = Signal()
    stepped = Signal(object)
    done = Signal(object)
    failed = Signal(str)
    ended = Signal()

    def __init__(
        self,
        session: Session | None = None,
        name: str = "Work",
        parent: QObject | None = None,
        *,
        in_turn: bool = False,
    ) -> None:
        super().__init__(parent)
        self._session, self._name, self._in_turn = session, name, in_turn
        self._thread: Thread | None = None
        self._stop: Event | None = None
        self._arrived: deque[tuple[Event, Callable[[], object]]] = deque()
        self._is_handling = False
        self._turn = QTimer(self)
        self._turn.setSingleShot(True)
        self._turn.timeout.connect(self._on_turn)
        self.was_stopped = False  # whether the latest work was asked to stop
        self.error: BaseException | None = None  # that the latest work has ended with
        if session is not None:
            session.closed.connect(self.cancel)

    @property
    def name(self) -> str:
        """A noun for the work."""
        return self._name

    @property
    def running(self) -> bool:
        return self._stop is not None

    @property
    def stopping(self) -> bool:
        return self._stop is not None and self._stop.is_set()

    def check_free(self) -> None:
        """Check that no other job runs.

        Raises
        ------
        core.DistillFSSError
            If some work is going on already.
        """
        busy = self._session.busy if self._session else self._name if self.running else ""
        if busy:
            raise core.DistillFSSError(fmt.running(busy))

    def start(self, work: Work, name: str | None = None) -> None:
        """Start work in a thread.

        Parameters
        ----------
        work : function
        name : str, optional
            A noun for this and later work, where a job does various.

        Raises
        ------
        core.DistillFSSError
            If some work is going on already.
        """
        self.check_free()
        self._name = name or self._name
        stop, out = Event(), _Out()
        self._stop = stop
        out.step.connect(self._on_step)
        out.end.connect(self._on_end)
        if self._session is not None:
            self._session.busy = self._name
        self.started.emit()
        # no daemon: a program that ends waits for the step under way, and writes what it is writing
        is_long, before = self._session is not None, self._thread if self._in_turn else None
        self._thread = Thread(target=_run, args=(work, stop, out, is_long, before), name=f"{THREADS}{self._name}")
        self._thread.start()

    def cancel(self) -> None:
        """Stop the work after its present step."""
        if self._stop is not None:
            self._stop.set()

    def abandon(self) -> None:
        """End at once, as if the work had been stopped; its thread ends later, and what comes of it is dropped.

        For work whose steps take long and change nothing.
        """
        if self._stop is not None:
            self._stop.set()
            self._end(None)

    def _on_step(self, stop: Event, step: object) -> None:
        self._arrive(stop, lambda: self.stepped.emit(step))

    def _on_end(self, stop: Event, outcome: object) -> None:
        self._arrive(stop, lambda: self._end(outcome))

    def _arrive(self, stop: Event, handle: Callable[[], object]) -> None:
        self._arrived.append((stop, handle))
        self._turn.start(0)

    def _on_turn(self) -> None:
        if self._is_handling or not self._arrived:
            return
        self._is_handling = True
        try:
            stop, handle = self._arrived.popleft()
            if stop is self._stop:
                handle()
        finally:
            self._is_handling = False
            if self._arrived:
                self._turn.start(0)

    def _end(self, outcome: object) -> None:
        self.was_stopped, self._stop = self.stopping, None
        self.error = outcome if isinstance(outcome, BaseException) else None
        if self._session is not None:
            self._session.busy = ""
        if isinstance(outcome, core.DistillFSSError):
            self.failed.emit(str(outcome))
        elif isinstance(outcome, MemoryError):
            self.failed.emit("this machine has no memory left for it; close what you do not need, or choose less")
        elif not isinstance(outcome, BaseException):
            self.done.emit(outcome)
        self.ended.emit()
        if isinstance(outcome, BaseException) and not isinstance(outcome, (core.DistillFSSError, MemoryError)):
            raise outcome  # a bug: seen as every other in napari


def wait_for(function: Callable[[], Any], name: str) -> Any:
    """Run a function in another thread and return its result, while the window is drawn and shows progress.

    The activity dock has the noun ``name`` for it.

    Clicks and keys wait until it has ended. Without a window, or in another thread, the function is simply called.
    """
    if not _is_in_window():
        return function()
    job, loop = Job(name=name), QEventLoop()
    results: list[Any] = []
    errors: list[Exception] = []

    def work(_: Event) -> Generator[None, None, None]:
        yield
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001  (raised again in the window's thread)
            errors.append(error)

    job.ended.connect(loop.quit)
    with progress(desc=f"DistillFSS: {name}", total=0, file=StringIO()):
        job.start(work)
        loop.exec(QEventLoop.ProcessEventsFlag.ExcludeUserInputEvents)
    if errors:
        raise errors[0]
    return results[0]


def wait_for_run(run: core.Run[Any, Any], name: str) -> Any:
    """Iterate a run in another thread and return its result, while a dialog shows its progress and can cancel it.

    Its steps have ``index`` and ``total``. The rest of the window waits. Without a window, or in another thread, the
    run is simply iterated.

    Raises
    ------
    core.DistillFSSError
        If the run was cancelled or has failed.
    """
    if not _is_in_window():
        return core.finish(run)
    job, loop = Job(name=name), QEventLoop()
    outcomes: list[Any] = []
    dialog = QProgressDialog(f"{name}…", "Cancel", 0, 100, QApplication.activeWindow())
    dialog.setWindowTitle("DistillFSS")
    dialog.setWindowModality(Qt.WindowModality.ApplicationModal)
    dialog.setAutoReset(False)

    def work(stop: Event) -> Generator[Any, None, Any]:
        for step in run:
            if stop.is_set():
                raise core.DistillFSSError(f"{name} was cancelled; nothing was added")
            yield step
        return run.result()

    def show(step: Any) -> None:
        if not job.stopping:
            dialog.setMaximum(step.total)
            dialog.setValue(step.index)

    def stop() -> None:
        dialog.setLabelText("Stopping…")
        dialog.show()  # a press of Cancel has closed it
        job.cancel()

    job.stepped.connect(show)
    job.done.connect(outcomes.append)
    job.failed.connect(lambda text: outcomes.append(core.DistillFSSError(text)))
    job.ended.connect(loop.quit)
    dialog.canceled.connect(stop)
    dialog.show()
    job.start(work)
    loop.exec()
    job.cancel()  # where the application ends
    dialog.canceled.disconnect(stop)
    dialog.close()
    dialog.deleteLater()
    outcome = outcomes[0] if outcomes else core.DistillFSSError(f"{name} has not ended")
    if isinstance(outcome, core.DistillFSSError):
        raise outcome
    return outcome


def _is_in_window() -> bool:
    """Whether this is the thread of a window."""
    application = QApplication.instance()
    return isinstance(application, QApplication) and QThread.currentThread() is application.thread()


class LatestJob(QObject):
    """Runs the latest request only. A new request stops the previous one, whose results are dropped."""

    answered = Signal(object)
    failed = Signal(str)
    idle = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._job, self._next = Job(parent=self), None
        self._job.stepped.connect(self._on_job_stepped)
        self._job.failed.connect(self._on_job_failed)
        self._job.ended.connect(self._on_job_ended)

    _next: Work | None

    @property
    def busy(self) -> bool:
        return self._job.running

    @property
    def error(self) -> BaseException | None:
        """Error that the latest request has ended with."""
        return self._job.error

    def ask(self, work: Work) -> None:
        if self._job.running:
            self._next = work
            self._job.cancel()
        else:
            self._job.start(work)

    def cancel(self) -> None:
        self._next = None
        self._job.cancel()

    def _on_job_stepped(self, step: object) -> None:
        if not self._job.stopping:
            self.answered.emit(step)

    def _on_job_failed(self, message: str) -> None:
        if not self._next:
            self.failed.emit(message)

    def _on_job_ended(self) -> None:
        work, self._next = self._next, None
        if work is not None:
            self._job.start(work)
        else:
            self.idle.emit()


def _run(work: Work, stop: Event, out: _Out, is_long: bool, before: Thread | None) -> None:
    """Run the work and send its result, or its error, to the window's thread; first another thread ends."""
    while before is not None and before.is_alive():
        before.join(_LOOK_AGAIN)
        if stop.is_set():
            out.end.emit(stop, None)
            before.join()
            return
    with quick_turns, rare_collections, told_warnings:
        outcome = _outcome(work, stop, out)
    out.end.emit(stop, outcome)
    if is_long:
        core.return_freed_memory()


def _outcome(work: Work, stop: Event, out: _Out) -> Any:
    try:
        keep_triton_out()
        run = work(stop)
        while True:
            out.step.emit(stop, next(run))
    except StopIteration as end:
        return end.value
    except BaseException as error:  # noqa: BLE001  (raised again in the window's thread)
        return error
