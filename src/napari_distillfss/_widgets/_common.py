"""Widgets and helpers that several sections use."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from napari.utils import progress
from napari.utils.notifications import show_info, show_warning
from qtpy.QtCore import QEvent, QObject, QRect, QSize, Qt
from qtpy.QtGui import QAction, QHelpEvent, QKeyEvent, QPaintEvent, QResizeEvent
from qtpy.QtWidgets import (
    QAbstractSpinBox,
    QApplication,
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QListWidget,
    QListWidgetItem,
    QMessageBox,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QSpinBox,
    QStyle,
    QStyleOptionComboBox,
    QStylePainter,
    QToolButton,
    QToolTip,
    QVBoxLayout,
    QWidget,
)

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._layers import REPLACE_NAN
from napari_distillfss._session import Session
from napari_distillfss._sources import OtherNotFiniteError
from napari_distillfss._tasks import Doing
from napari_distillfss._threads import Job
from napari_distillfss._widgets._colors import ERROR, Tone

Later = TypeVar("Later", bound=QObject)

_MARGIN = 2  # pixels beside the text of a combo box
_LINES = 3  # of text that a message has room for
_ANY_HEIGHT = 100_000  # pixels
_NEW_LOOK = (QEvent.Type.StyleChange, QEvent.Type.PaletteChange)
_TONE = Qt.ItemDataRole.UserRole + 1  # of a row: its `Tone`
_PLAIN = "padding: 0px; margin: 0px;"  # so that the text has the whole widget


class Message(QLabel):
    """Text that shows the state, with a capital letter; errors are red, in the words of the command line.

    Its height is that of ``lines`` lines whatever it shows, so that it moves nothing. Longer texts are elided and have
    the whole in the tooltip. The context menu copies the whole.

    Parameters
    ----------
    lines : int, optional
        None makes it as high as its text.
    """

    def __init__(self, text: str = "", parent: QWidget | None = None, *, lines: int | None = _LINES) -> None:
        super().__init__(parent)
        self._lines, self._text, self._is_warning = lines, "", False
        self.setWordWrap(True)
        self.setTextFormat(Qt.TextFormat.PlainText)
        self.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
        vertical = QSizePolicy.Policy.Minimum if lines is None else QSizePolicy.Policy.Fixed
        self.setSizePolicy(QSizePolicy.Policy.Ignored, vertical)
        copy = QAction("Copy text", self)
        copy.triggered.connect(self._on_copy_triggered)
        self.addAction(copy)
        self.setContextMenuPolicy(Qt.ContextMenuPolicy.ActionsContextMenu)
        self.tell(text)

    @property
    def warns(self) -> bool:
        """Whether an error is shown."""
        return self._is_warning

    def text(self) -> str:
        """The whole text, also where it is elided."""
        return self._text

    def tell(self, text: str) -> None:
        self._set(fmt.sentence(text), is_warning=False)

    def warn(self, text: str) -> None:
        self._set(text, is_warning=True)

    def hasHeightForWidth(self) -> bool:
        return self._lines is None and super().hasHeightForWidth()

    def sizeHint(self) -> QSize:
        return super().sizeHint() if self._lines is None else QSize(0, self._height())

    def minimumSizeHint(self) -> QSize:
        return super().minimumSizeHint() if self._lines is None else QSize(0, self._height())

    def resizeEvent(self, event: QResizeEvent | None) -> None:
        super().resizeEvent(event)
        self._elide()

    def changeEvent(self, event: QEvent | None) -> None:
        super().changeEvent(event)
        if event is not None and event.type() in (*_NEW_LOOK, QEvent.Type.FontChange):
            self._color()
            self._elide()

    def _set(self, text: str, *, is_warning: bool) -> None:
        self._text, self._is_warning = text, is_warning
        self._color()
        self._elide()

    def _color(self) -> None:
        color = ERROR.on(self.palette().window().color()).name()
        wanted = f"{_PLAIN} color: {color};" if self._is_warning else _PLAIN
        if wanted != self.styleSheet():  # setting it changes the style again
            self.setStyleSheet(wanted)

    def _elide(self) -> None:
        shown = self._text
        if self._lines is not None and not self._fits(shown):
            fitting = bisect.bisect_left(range(len(shown)), True, key=lambda n: not self._fits(shown[: n + 1] + "…"))
            shown = shown[:fitting].rstrip() + "…"
        super().setText(_breakable(shown))
        self.setToolTip("" if shown == self._text else self._text)

    def _fits(self, text: str) -> bool:
        return self._height_of(_breakable(text)) <= self._height()

    def _height(self) -> int:
        return self._height_of("\n".join("X" * (self._lines or 1)))

    def _height_of(self, text: str) -> int:
        box = QRect(0, 0, max(1, self.width()), _ANY_HEIGHT)
        return self.fontMetrics().boundingRect(box, int(Qt.TextFlag.TextWordWrap), text).height()

    def _on_copy_triggered(self) -> None:
        clipboard = QApplication.clipboard()
        assert clipboard is not None  # while there is an application
        clipboard.setText(self._text)


def _breakable(text: str) -> str:
    """The text with places in paths where a line may end."""
    return re.sub(r"([/\\_])", "\\1\u200b", text)


class ToneList(QListWidget):
    """A list whose rows may have a tone, in the form that suits napari's theme also after it was changed."""

    def set_tone(self, item: QListWidgetItem, tone: Tone) -> None:
        """Give the text of a row a tone."""
        item.setData(_TONE, tone)
        item.setForeground(tone.on(self.palette().window().color()))

    def changeEvent(self, event: QEvent | None) -> None:
        super().changeEvent(event)
        if event is not None and event.type() in _NEW_LOOK:
            was_blocked = self.blockSignals(True)  # no item has changed for the user
            for item in (self.item(row) for row in range(self.count())):
                if item is not None and item.data(_TONE) is not None:
                    self.set_tone(item, item.data(_TONE))
            self.blockSignals(was_blocked)


class Choice(QComboBox):
    """A combo box that elides a long text in the middle, and has it whole in the tooltip then."""

    def shown(self) -> str:
        """The text as there is room for it."""
        return self._option().currentText or ""

    def paintEvent(self, _: QPaintEvent | None) -> None:
        painter, option = QStylePainter(self), self._option()
        painter.drawComplexControl(QStyle.ComplexControl.CC_ComboBox, option)
        painter.drawControl(QStyle.ControlElement.CE_ComboBoxLabel, option)

    def event(self, event: QEvent | None) -> bool:
        if isinstance(event, QHelpEvent) and event.type() == QEvent.Type.ToolTip:
            whole = self.currentText()
            lines = [self.toolTip()] if self.shown() == whole else [whole, self.toolTip()]
            QToolTip.showText(event.globalPos(), "\n".join(filter(None, lines)), self)
            return True
        return super().event(event)

    def _option(self) -> QStyleOptionComboBox:
        option, style = QStyleOptionComboBox(), self.style()
        self.initStyleOption(option)
        assert style is not None  # every widget has one
        parts = QStyle.ComplexControl.CC_ComboBox, option, QStyle.SubControl.SC_ComboBoxEditField, self
        width = style.subControlRect(*parts).width() - 2 * _MARGIN
        option.currentText = self.fontMetrics().elidedText(self.currentText(), Qt.TextElideMode.ElideMiddle, width)
        return option


class Section(QWidget):
    """A heading that collapses its content."""

    def __init__(self, title: str, content: QWidget, *, tooltip: str, unfolded: bool = True) -> None:
        super().__init__()
        self.content = content
        self.heading = QToolButton()
        self.heading.setText(title)
        self.heading.setToolTip(tooltip)
        self.heading.setCheckable(True)
        self.heading.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self.heading.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.heading.setStyleSheet("QToolButton { font-weight: bold; text-align: left; padding: 3px; }")
        self.heading.toggled.connect(self._on_heading_toggled)
        column(self, self.heading, content, margin=0)
        self.heading.setChecked(unfolded)
        self._on_heading_toggled(unfolded)

    def _on_heading_toggled(self, on: bool) -> None:
        self.heading.setArrowType(Qt.ArrowType.DownArrow if on else Qt.ArrowType.RightArrow)
        self.content.setVisible(on)


class Activity(QObject):
    """Progress of a job in napari's activity dock."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._job, self._progress = job, None
        job.started.connect(self._on_started)
        job.stepped.connect(self._on_stepped)
        job.ended.connect(self._on_ended)
        job.destroyed.connect(self._on_ended)  # its dock is gone, and no end will come

    _progress: progress | None

    def _on_started(self) -> None:
        self._progress = progress(desc=f"DistillFSS: {self._job.name}", total=0, file=StringIO())

    def _on_stepped(self, step: Any) -> None:
        shown = self._progress
        if shown is None or not hasattr(step, "total"):
            return
        if shown.total != step.total or step.index < shown.n:
            shown.reset(step.total)
        shown.update(step.index - shown.n)

    def _on_ended(self) -> None:
        shown, self._progress = self._progress, None
        if shown is not None:
            shown.close()


class JobBar(QWidget):
    """Progress of a job as text and bar, with a button that cancels it; hidden while no job runs.

    Parameters
    ----------
    instead_of : QWidget, optional
        In the place of this widget, so that nothing is moved.
    is_low : bool
        One line, with the text in the bar.
    is_patient : function
        Whether a cancelled job goes on to the end of its present step; otherwise it is abandoned, at once.
    tells_end : bool
        Whether napari notifies the user of the end where it cannot be seen; of a failure it always does.
    describe : function
        A phrase for a step of a training.
    """

    def __init__(
        self,
        job: Job,
        *,
        cancel: str,
        starting: str = "Starting (the first time takes some seconds)",
        instead_of: QWidget | None = None,
        is_low: bool = False,
        is_patient: Callable[[], bool] = lambda: True,
        tells_end: bool = True,
        describe: Callable[[core.TrainStep], str] = core.describe_step,
    ) -> None:
        super().__init__()
        self._job, self._pace, self._starting, self._describe = job, fmt.Pace(), starting, describe
        self._instead_of, self._is_low, self._is_patient = instead_of, is_low, is_patient
        self._tells_end = tells_end
        self.bar = QProgressBar()
        self.bar.setFormat("%v of %m")
        self.bar.setAccessibleName("Progress")
        self.text = Message(lines=1)
        self.cancel = button("Cancel", cancel, self.stop)
        column(self, row(self.bar, self.cancel, first=3), self.text, margin=0)
        self.text.setVisible(not is_low)
        self.activity = Activity(job)
        job.started.connect(self._on_job_started)
        job.stepped.connect(self._on_job_stepped)
        job.done.connect(self._on_job_done)
        job.failed.connect(self._on_job_failed)
        job.ended.connect(self._on_job_ended)
        self.hide()

    def _tell(self, text: str) -> None:
        self.text.tell(text)
        if self._is_low:
            self.bar.setFormat(self.text.text())

    def _on_job_started(self) -> None:
        self._pace = fmt.Pace()
        self.bar.setRange(0, 0)
        self._tell(self._starting)
        self.cancel.setEnabled(True)
        if self._instead_of is not None:
            self.setFixedHeight(max(self._instead_of.sizeHint().height(), self.sizeHint().height()))
            self._instead_of.hide()
        self.show()

    def _on_job_ended(self) -> None:
        self.hide()
        if self._instead_of is not None:
            self._instead_of.show()

    def _on_job_stepped(self, step: Any) -> None:
        if self._job.stopping:
            return  # the text goes on to say so
        if isinstance(step, Doing):
            self.bar.setRange(0, 0)
            self._tell(step.text)
        if not hasattr(step, "total"):
            return
        what = self._describe(step) if isinstance(step, core.TrainStep) else getattr(step, "stage", "")
        if step.index == step.total:  # of this stage; how long the next one takes is not known
            self.bar.setRange(0, 0)
            self._tell(what or "finishing")
            return
        if self.bar.maximum() != step.total or step.index < self.bar.value():  # another stage
            self._pace = fmt.Pace()
        self.bar.setRange(0, step.total)
        self.bar.setValue(step.index)
        eta = getattr(step, "eta", None)
        left = self._pace.left(step.index, step.total) if eta is None else eta
        self._tell(", ".join(filter(None, (what, f"about {fmt.duration(left)} left"))))

    def _on_job_done(self) -> None:
        if self._tells_end and not self._job.was_stopped and self._is_out_of_sight():
            show_info(f"DistillFSS: {self._job.name} is finished")

    def _on_job_failed(self, message: str) -> None:
        if self._is_out_of_sight():
            show_warning(f"DistillFSS: {self._job.name} has failed: {message}")

    def _is_out_of_sight(self) -> bool:
        """Whether the end of a job cannot be seen here: the dock is hidden, in a tab behind another, or folded."""
        return not self.isVisible() or self.visibleRegion().isEmpty()

    @property
    def is_running(self) -> bool:
        return self._job.running

    def stop(self) -> None:
        """Cancel the job."""
        if not self._is_patient():
            self._job.abandon()
            return
        self.cancel.setEnabled(False)
        self._tell("Stopping…")
        self.bar.setRange(0, 0)
        self._job.cancel()


class ReplaceOffer(QPushButton):
    """Beside a message that a volume has pixels that are not finite: offers to read them as 0; hidden otherwise.

    Parameters
    ----------
    session : Session
    jobs : Job or LatestJob
        Which show their errors in that message.

    Attributes
    ----------
    key : str
        `OtherSlices.key` of the other volume that has such pixels; "" where it is the chosen one.
    """

    def __init__(self, session: Session, *jobs: Any) -> None:
        super().__init__("Read as 0")
        self.key = ""
        self.setToolTip(
            "Read pixels that are NaN or infinite as 0; the file is not changed. The choice is under Volume"
        )
        self._offer(False)
        for job in jobs:
            job.failed.connect(lambda _, job=job: self._on_failed(session, job.error))
        session.busy_changed.connect(self._on_state_changed)
        session.volume_changed.connect(self._on_state_changed)

    def _on_failed(self, session: Session, error: BaseException | None) -> None:
        self.key = error.key if isinstance(error, OtherNotFiniteError) else ""
        self._offer(bool(self.key) or _is_curable(session, error))

    def _on_state_changed(self) -> None:
        self._offer(False)

    def _offer(self, is_offered: bool) -> None:
        self.setVisible(is_offered)
        self.setEnabled(is_offered)


def _is_curable(session: Session, error: BaseException | None) -> bool:
    """Whether an error is gone where the pixels of the volume that are not finite are read as a number."""
    chosen = session.volume
    is_read_as_it_is = chosen is not None and chosen.layer.metadata.get(REPLACE_NAN) is None
    return is_read_as_it_is and isinstance(error, core.NotFiniteError)


class WheelGuard(QObject):
    """Passes the wheel on to the scroll area where a combo or spin box has no focus.

    Otherwise scrolling of the dock changes the values under the mouse.
    """

    def protect(self, holder: QWidget) -> None:
        """Protect all combo and spin boxes of a widget."""
        for kind in (QComboBox, QAbstractSpinBox):
            for box in holder.findChildren(kind):
                box.setFocusPolicy(Qt.FocusPolicy.StrongFocus)  # the wheel gives no focus
                box.installEventFilter(self)

    def eventFilter(self, box: QObject | None, event: QEvent | None) -> bool:
        if event is None or event.type() != QEvent.Type.Wheel or not isinstance(box, QWidget) or box.hasFocus():
            return False
        event.ignore()
        return True


class BeforeAction(QObject):
    """Calls a function before the user next presses anything in the application, once.

    What follows on a press finds done what would otherwise be done a moment later. Keys that repeat are no press.
    """

    _PRESSES = (
        QEvent.Type.MouseButtonPress,
        QEvent.Type.MouseButtonDblClick,
        QEvent.Type.TabletPress,
        QEvent.Type.TouchBegin,
        QEvent.Type.ShortcutOverride,  # comes before the shortcut, which is no press of a key
        QEvent.Type.KeyPress,
    )

    def __init__(self, function: Callable[[], object], parent: QObject) -> None:
        super().__init__(parent)
        self._function = function

    def arm(self) -> None:
        application = QApplication.instance()
        assert application is not None  # no widget is made without one
        application.installEventFilter(self)

    def disarm(self) -> None:
        application = QApplication.instance()
        if application is not None:
            application.removeEventFilter(self)

    def eventFilter(self, _: QObject | None, event: QEvent | None) -> bool:
        is_repeated = isinstance(event, QKeyEvent) and event.isAutoRepeat()
        if event is not None and event.type() in self._PRESSES and not is_repeated:
            self.disarm()
            self._function()
        return False


def fit_rows(items: QListWidget, most: float) -> None:
    """Make a list as high as its rows, and as ``most`` rows at most."""
    height = max(items.sizeHintForRow(0), items.iconSize().height())
    items.setFixedHeight(round(height * min(items.count(), most)) + 2 * items.frameWidth() + 2)


def button(text: str, tooltip: str, clicked: Callable[[], object]) -> QPushButton:
    made = QPushButton(text)
    made.setToolTip(tooltip)
    made.clicked.connect(lambda: clicked())
    return made


def allow(part: QWidget, reason: str = "") -> None:
    """Enable a widget; or disable it for a reason, which its tooltip then ends with."""
    tooltip = part.property("tooltip") or part.toolTip()
    part.setProperty("tooltip", tooltip)
    part.setEnabled(not reason)
    part.setToolTip(f"{tooltip}. Not now: {reason}" if reason else tooltip)


def combo(tooltip: str, choices: tuple[str, ...] = ()) -> QComboBox:
    """A combo box that fits the dock whatever the length of its items."""
    made = Choice()
    made.setToolTip(tooltip)
    made.addItems(choices)
    made.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    made.setMinimumContentsLength(6)
    return made


def spin(low: int, high: int, value: int, tooltip: str) -> QSpinBox:
    made = QSpinBox()
    made.setRange(low, high)
    made.setValue(value)
    made.setToolTip(tooltip)
    made.setAccessibleName(tooltip)
    return made


def row(*parts: QWidget | str, first: int = 1) -> QWidget:
    """Lay out widgets side by side; the first is ``first`` times as wide as the others.

    A text becomes the label of the widget that follows, and its accessible name.
    """
    holder = QWidget()
    layout = QHBoxLayout(holder)
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setSpacing(4)
    label: QLabel | None = None
    for part in parts:
        if isinstance(part, str):
            label = QLabel(part)
            layout.addWidget(label)
            continue
        if label is not None:
            label.setBuddy(part)
            part.setAccessibleName(label.text())
        layout.addWidget(part, 1)
        label = None
    layout.setStretch(0, first if isinstance(parts[0], QWidget) else 0)
    return holder


def column(holder: QWidget, *parts: QWidget, margin: int = 4) -> None:
    """Lay out widgets in a column of ``holder``."""
    layout = QVBoxLayout(holder)
    layout.setContentsMargins(margin, margin, margin, margin)
    layout.setSpacing(4)
    for part in parts:
        layout.addWidget(part)


def choose_output(parent: QWidget, title: str, start: Path, suffixes: tuple[str, ...]) -> Path | None:
    """Ask where to write a file, and before another one is replaced. The first suffix is added to a name without any.

    Returns
    -------
    path or None
        None if nothing was chosen.
    """
    name, _ = QFileDialog.getSaveFileName(parent, title, str(start), " ".join(f"*{s}" for s in suffixes))
    if not name:
        return None
    if name.lower().endswith(suffixes):
        return Path(name)  # the dialog has asked
    path = Path(name + suffixes[0])
    yes = QMessageBox.StandardButton.Yes
    if path.exists() and QMessageBox.question(parent, title, f"{path} is already there. Replace it?") != yes:
        return None
    return path


def until_closed(session: Session, later: Later) -> Later:
    """A delayed call of superqt that is dropped, as all later ones are, once the session has ended.

    So nothing runs on widgets that are gone.
    """
    session.closed.connect(lambda: later.blockSignals(True))
    return later


def attempt(message: Message, action: Callable[[], object]) -> bool:
    """Run a function and show an expected error as one sentence. Returns whether it succeeded."""
    try:
        action()
    except core.DistillFSSError as error:
        message.warn(str(error))
        return False
    return True
