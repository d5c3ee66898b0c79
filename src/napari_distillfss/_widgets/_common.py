"""Widgets and helpers that several sections use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qtpy.QtCore import QEvent, QObject, Qt
from qtpy.QtWidgets import (
    QAbstractSpinBox,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QSpinBox,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._tasks import Doing
from napari_distillfss._threads import Job

ERROR_COLOR = "#e0524d"  # readable on napari's light and dark


class Message(QLabel):
    """A line of text that shows the state; errors are red. It begins with a capital letter."""

    def __init__(self, text: str = "", parent: QWidget | None = None) -> None:
        super().__init__(fmt.sentence(text), parent)
        self.setWordWrap(True)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Minimum)

    @property
    def warns(self) -> bool:
        """Whether an error is shown."""
        return bool(self.styleSheet())

    def tell(self, text: str) -> None:
        self.setStyleSheet("")
        self.setText(fmt.sentence(text))

    def warn(self, text: str) -> None:
        self.setStyleSheet(f"color: {ERROR_COLOR};")
        self.setText(fmt.sentence(text))


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


class JobBar(QWidget):
    """Progress of a job as text and bar, with a button that cancels it; hidden while no job runs."""

    def __init__(
        self, job: Job, *, cancel: str, starting: str = "Starting (the first time takes some seconds)"
    ) -> None:
        super().__init__()
        self._job, self._pace, self._starting = job, fmt.Pace(), starting
        self.bar = QProgressBar()
        self.bar.setFormat("%v of %m")
        self.text = Message()
        self.cancel = button("Cancel", cancel, self._on_cancel_clicked)
        column(self, row(self.bar, self.cancel), self.text, margin=0)
        job.started.connect(self._on_job_started)
        job.stepped.connect(self._on_job_stepped)
        job.ended.connect(self.hide)
        self.hide()

    def _on_job_started(self) -> None:
        self._pace = fmt.Pace()
        self.bar.setRange(0, 0)
        self.text.tell(self._starting)
        self.cancel.setEnabled(True)
        self.show()

    def _on_job_stepped(self, step: Any) -> None:
        if self._job.stopping:
            return  # the text goes on to say so
        if isinstance(step, Doing):
            self.bar.setRange(0, 0)
            self.text.tell(step.text)
        if not hasattr(step, "total"):
            return
        if self.bar.maximum() != step.total:
            self._pace = fmt.Pace()
        self.bar.setRange(0, step.total)
        self.bar.setValue(step.index)
        eta = getattr(step, "eta", None)
        left = self._pace.left(step.index, step.total) if eta is None else eta
        stage = getattr(step, "stage", "")
        self.text.tell(f"{fmt.stage(stage) + ', ' if stage else ''}about {fmt.duration(left)} left")

    def _on_cancel_clicked(self) -> None:
        self.cancel.setEnabled(False)
        self.text.tell("Stopping…")
        self.bar.setRange(0, 0)
        self._job.cancel()


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


def button(text: str, tooltip: str, clicked: Callable[[], object]) -> QPushButton:
    made = QPushButton(text)
    made.setToolTip(tooltip)
    made.clicked.connect(lambda: clicked())
    return made


def combo(tooltip: str, choices: tuple[str, ...] = ()) -> QComboBox:
    """A combo box that fits the dock whatever the length of its items."""
    made = QComboBox()
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
    return made


def row(*parts: QWidget | str, first: int = 1) -> QWidget:
    """Lay out widgets side by side (texts become labels); the first is ``first`` times as wide as the others."""
    holder = QWidget()
    layout = QHBoxLayout(holder)
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setSpacing(4)
    for part in parts:
        if isinstance(part, str):
            layout.addWidget(QLabel(part))
        else:
            layout.addWidget(part, 1)
    layout.setStretch(0, first if isinstance(parts[0], QWidget) else 0)
    return holder


def column(holder: QWidget, *parts: QWidget, margin: int = 4) -> None:
    """Lay out widgets in a column of ``holder``."""
    layout = QVBoxLayout(holder)
    layout.setContentsMargins(margin, margin, margin, margin)
    layout.setSpacing(4)
    for part in parts:
        layout.addWidget(part)


def attempt(message: Message, action: Callable[[], object]) -> bool:
    """Run a function and show an expected error as one sentence. Returns whether it succeeded."""
    try:
        action()
    except core.DistillFSSError as error:
        message.warn(str(error))
        return False
    return True
