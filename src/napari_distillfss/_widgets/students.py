"""History of the students of a volume: restore one, compare two, remove those no longer needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtpy.QtCore import QFile, Qt, Signal
from qtpy.QtWidgets import QAbstractItemView, QListWidget, QListWidgetItem, QMessageBox, QWidget

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._session import Session
from napari_distillfss._students import Compared, KeptStudent, differences
from napari_distillfss._tasks import iter_comparing, iter_students
from napari_distillfss._threads import Job, LatestJob
from napari_distillfss._widgets._common import JobBar, Message, ReplaceOffer, allow, attempt, button, column, row


class StudentHistory(QWidget):
    """Lists the students that were trained on the volume, the latest first; hidden while there are none.

    ``restored`` emits the path of the student that the user wants back.
    """

    restored = Signal(object)

    def __init__(self, session: Session, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session = session
        self._paths: list[Path] = []
        self._students: dict[Path, KeptStudent] = {}
        self._compared: tuple[KeptStudent, KeptStudent] | None = None
        self.list = QListWidget()
        self.list.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.list.setToolTip("Students trained on this volume, the latest first; choose two to compare them")
        self.list.setAccessibleName("Models of this volume")
        self.list.setWordWrap(True)
        self.list.setSpacing(3)  # so that it is seen where the lines of one begin
        self.list.setResizeMode(QListWidget.ResizeMode.Adjust)
        self.list.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.list.setMinimumHeight(90)
        self.list.setMaximumHeight(160)
        self.restore = button("Restore", "Use the chosen model again, with its settings", self._on_restore_clicked)
        self.compare = button(
            "Compare", "Show what changed between two chosen models, and their IoU on the annotated slices",
            self._on_compare_clicked,
        )  # fmt: skip
        self.discard = button(
            "Remove…", "Move the chosen models, with the slices they learned from, to the trash", self._on_discard
        )
        self.job = Job(session, "Model comparison", self)
        self.message = Message(lines=None)
        self._reading = LatestJob(self)
        self.offer = ReplaceOffer(session, self.job)
        buttons = row(self.restore, self.compare, self.discard)
        column(
            self,
            self.list,
            JobBar(self.job, cancel="Stop the comparison", instead_of=buttons, is_low=True, is_patient=lambda: False),
            buttons,
            row(self.message, self.offer, first=3),
            margin=0,
        )
        self._reading.answered.connect(self._on_student_read)
        self.list.itemSelectionChanged.connect(self._on_state_changed)
        self.list.itemDoubleClicked.connect(self._on_restore_clicked)
        self.job.done.connect(self._on_compared)
        self.job.failed.connect(self.message.warn)
        session.volume_changed.connect(self._on_students_changed)
        session.model_changed.connect(self._on_students_changed)
        session.busy_changed.connect(self._on_state_changed)
        session.closed.connect(self._reading.cancel)
        self.hide()

    def students(self) -> list[KeptStudent]:
        """Students in the list whose cards have been read, the latest first."""
        return [self._students[path] for path in self._paths if path in self._students]

    def chosen(self) -> list[KeptStudent]:
        """The selected students, the latest first."""
        paths = [item.data(Qt.ItemDataRole.UserRole) for item in self.list.selectedItems()]
        return [student for student in self.students() if student.path in paths]

    def choose(self, *paths: Path) -> None:
        """Select students."""
        for index in range(self.list.count()):
            item = self.list.item(index)
            if item is not None:
                item.setSelected(item.data(Qt.ItemDataRole.UserRole) in paths)

    def _on_students_changed(self) -> None:
        paths = self._session.students()
        if [p.parent for p in paths[:1]] != [p.parent for p in self._paths[:1]]:
            self.message.tell("")  # of another volume
        self._paths = paths
        self._students = {path: student for path, student in self._students.items() if path in paths}
        missing = [path for path in paths if path not in self._students]
        if missing:
            self._reading.ask(lambda stop: iter_students(missing, stop))
        self._show()

    def _on_student_read(self, student: KeptStudent) -> None:
        if student.path in self._paths:
            self._students[student.path] = student
            self._show()

    def _show(self) -> None:
        chosen = [student.path for student in self.chosen()]
        self.list.blockSignals(True)
        self.list.clear()
        for student in self.students():
            present = "in use: " if self._session.is_present(student) else ""
            item = QListWidgetItem(present + student.describe())
            item.setToolTip(student.error or f"{student.path}\nIoU: on the validation slice")
            item.setData(Qt.ItemDataRole.UserRole, student.path)
            self.list.addItem(item)
        self.choose(*chosen)
        self.list.blockSignals(False)
        self.setVisible(bool(self._paths))
        self._on_state_changed()

    def _on_state_changed(self) -> None:
        chosen = self.chosen()
        present = [student for student in chosen if self._session.is_present(student)]
        readable = all(not student.error for student in chosen)
        reason = self._session.no_job or ("" if readable else "one of the chosen models cannot be read")
        in_use = "it is in use" if present else ""
        allow(self.restore, reason or in_use or ("" if len(chosen) == 1 else "choose one model in the list"))
        allow(self.compare, reason or ("" if len(chosen) == 2 else "choose two models in the list (Ctrl+click)"))
        allow(self.discard, self._session.no_job or in_use or ("" if chosen else "choose models in the list"))

    def _on_restore_clicked(self) -> None:
        if self.restore.isEnabled():
            self.restored.emit(self.chosen()[0].path)

    def _on_compare_clicked(self) -> None:
        volume = self._session.volume
        if not self.compare.isEnabled() or volume is None:
            return
        new, old = self.chosen()

        def start() -> None:
            maker = self._support_maker()
            self.job.start(lambda stop: iter_comparing(volume.volume, maker, (old, new), stop))
            self._compared = (old, new)
            self.message.tell("")

        attempt(self.message, start)

    def _support_maker(self) -> Callable[[], core.SupportSet]:
        """As `Session.support_maker`; without slices the function raises the error, as settings can be compared yet."""
        try:
            return self._session.support_maker(with_others=False)
        except core.SupportSetError as error:
            reason = error

        def fail() -> core.SupportSet:
            raise reason

        return fail

    def _on_compared(self, compared: Compared | None) -> None:
        if compared is None or self._compared is None:
            self.message.tell("stopped; nothing was compared")
            return
        self.message.tell(describe_comparison(*self._compared, compared))

    def _on_discard(self) -> None:
        chosen = self.chosen()
        size = fmt.size(sum(student.path.stat().st_size for student in chosen if student.path.is_file()))
        names = ", ".join(student.name for student in chosen)
        question = (
            f"Move {fmt.count(len(chosen), 'model')} ({names}; {size}) to the trash, with the slices they learned "
            "from? The annotations stay."
        )
        yes = QMessageBox.StandardButton.Yes
        if QMessageBox.question(self, "Remove models", question) != yes:
            return
        for student in chosen:
            if not attempt(self.message, lambda path=student.path: move_to_trash(path)):  # type: ignore[misc]
                break
        self._on_students_changed()


def move_to_trash(path: Path) -> None:
    """Move a student and the folder of its slices to the trash of the system.

    Raises
    ------
    core.OutputError
        If the system has no trash for it; then it stays.
    """
    for part in (path, path.with_suffix("")):
        if part.exists() and not QFile(str(part)).moveToTrash():
            raise core.OutputError(f"{part}: the system has no trash for it; remove it in a file manager")


def describe_comparison(old: KeptStudent, new: KeptStudent, compared: Compared) -> str:
    """What changed between two students, and their IoU, a line each."""
    lines = [f"{old.name} → {new.name}", *(differences(old, new) or ["same settings and slices"])]
    if not compared.planes:
        return "\n".join([*lines, f"no IoU: {compared.reason}"])
    lines.append(f"IoU on {fmt.count(len(compared.planes), 'annotated slice')}: {_ious(*compared.scores)}")
    lines += _ious_of_classes(old, compared.scores)
    if compared.unseen:
        numbers = ", ".join(map(str, compared.unseen))
        lines.append(f"of these, planes that neither learned from ({numbers}): {_ious(*compared.unseen_scores)}")
    else:
        lines.append("each of these slices was learned from by one of the two, so other slices may have a lower IoU")
    return "\n".join(lines)


def _ious(*scores: Any) -> str:
    return " → ".join("other classes" if s is None else _iou(s.iou) for s in scores)


def _ious_of_classes(old: KeptStudent, scores: tuple[Any, Any]) -> list[str]:
    names = old.card.get("classes", [])
    if len(names) < 2 or None in scores:
        return []
    each = zip(names, scores[0].pooled.iou, scores[1].pooled.iou, strict=True)
    return [f"  {name}: {_iou(before)} → {_iou(after)}" for name, before, after in each]


def _iou(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
