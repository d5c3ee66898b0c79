"""The file of the student (save, load, card) and the script of the session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtpy.QtWidgets import QApplication, QFileDialog, QPlainTextEdit, QWidget

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._scripts import command_line, python_lines
from napari_distillfss._session import Session
from napari_distillfss._tasks import iter_loading
from napari_distillfss._threads import Job
from napari_distillfss._widgets._common import JobBar, Message, allow, attempt, button, choose_output, column, row
from napari_distillfss._widgets.students import StudentHistory

SUFFIX = ".safetensors"
_METHODS = {
    "joint": "teacher and model together",
    "two-stage": "teacher, then model",
    "direct": "model without a teacher",
    "probe": "linear classifier",
}
"""What the methods of a training mean, as the setting *Method* says it."""


class ModelWidget(QWidget):
    """Saves and loads students, shows their cards, and copies the session as a script."""

    def __init__(self, session: Session, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session = session
        self._loading: Path | None = None
        self.save = button(
            "Save…", "Save the student as one file, which needs no support images", self._on_save_clicked
        )
        self.load = button("Load…", "Load a student from a file, to preview and apply it", self.ask_to_load)
        self.command = button(
            "Copy command",
            "Copy the steps of this session as shell commands, for a terminal or a cluster",
            self.copy_command,
        )
        self.python = button("Copy Python", "Copy the steps of this session as Python lines", self.copy_python)
        self.card = QPlainTextEdit()
        self.card.setReadOnly(True)
        self.card.setMinimumHeight(120)
        self.card.setAccessibleName("Model card")
        self.card.setToolTip("Model card; it is part of the file of the student")
        self.history = StudentHistory(session)
        self.job = Job(session, "Model loading", self)
        self.message = Message("No model yet")
        # a volume loads its model unasked, so the end is not notified
        bar = JobBar(self.job, cancel="Stop", instead_of=self.message, tells_end=False, is_patient=lambda: False)
        column(
            self,
            row(self.save, self.load),
            row(self.command, self.python),
            bar,
            self.message,
            self.history,
            self.card,
        )
        self.card.hide()
        self.history.restored.connect(self.load_from)
        self.job.done.connect(self._on_loaded)
        self.job.failed.connect(self.message.warn)
        session.model_changed.connect(self._on_model_changed)
        session.volume_changed.connect(self._on_volume_changed)
        self._on_model_changed()

    def save_to(self, path: Path) -> None:
        """Write the student."""

        def save() -> None:
            self._session.save_model(path)
            self.message.tell(f"saved as {path}")

        attempt(self.message, save)

    def load_from(self, path: Path) -> None:
        """Load a student in a thread."""

        def load() -> None:
            self.job.start(lambda stop: iter_loading(path, stop))
            self._loading = path

        attempt(self.message, load)

    def copy_command(self) -> None:
        self._copy(command_line)

    def copy_python(self) -> None:
        self._copy(python_lines)

    def _copy(self, make: Callable[[Session], str]) -> None:
        training = self._session.training
        clipboard = QApplication.clipboard()
        assert clipboard is not None  # while there is an application
        clipboard.setText(make(self._session))
        if training is None:
            self.message.tell("copied")
        elif training.support is None:
            self.message.warn("copied; the annotated slices could not be written: put your own in place of SUPPORT")
        else:
            self.message.tell("copied; the annotated slices it reads are beside your annotations")

    def _on_loaded(self, model: Any) -> None:
        if model is None or self._loading is None:
            self.message.tell("stopped; nothing was loaded")
            return
        self._session.load_student(model, self._loading)
        self.message.tell(f"loaded {self._loading}; preview or apply it")

    def _on_volume_changed(self) -> None:
        """Load the student to begin with where the session has none yet, or that of another volume."""
        session, student = self._session, self._session.first_student()
        if session.busy or student is None:
            return
        if session.model is None or (session.is_another_image and session.has_kept_student(student.parent)):
            self.load_from(student)

    def _on_model_changed(self) -> None:
        model = self._session.model
        for part in (self.save, self.command, self.python):
            allow(part, "" if model is not None else self._session.no_model)
        self.card.setVisible(model is not None)
        if model is not None:
            self.card.setPlainText(describe(model.card))
            self.message.tell("A model is there; Save… writes it to a place of your choice")

    def _on_save_clicked(self) -> None:
        path = choose_output(self, "Save the model", Path(f"model{SUFFIX}"), (SUFFIX,))
        if path is not None:
            self.save_to(path)

    def ask_to_load(self) -> None:
        """Ask for the file of a student, and load it."""
        students, volume = self._session.students(), self._session.volume
        beside = volume.volume.path if volume is not None else None
        start = students[0] if students else beside.parent if beside is not None else Path.home()
        path, _ = QFileDialog.getOpenFileName(self, "Load a model", str(start), f"Model (*{SUFFIX})")
        if path:
            self.load_from(Path(path))


def describe(card: dict[str, Any]) -> str:
    """A card as a few lines of text."""
    training, pixel = card["training"], card["pixel_size_um"]
    lines = [
        f"classes: {', '.join(card['classes'])}",
        f"made: {card['created'][:16].replace('T', ' ')} UTC",
        f"pixel size: {fmt.lengths(*pixel) if pixel else 'not known'}",
        f"backbone: {card['backbone']['name']} ({card['backbone']['license']})",
        f"zoom: {card['preprocess']['zoom']}, intensity of {card['preprocess']['scope']}",
    ]
    if "imported" in training:
        lines.append(f"imported: {training['imported']['layout']}, from {training['imported']['file']}")
    elif training:
        method, steps = training["method"], training["steps"]
        made = f"{fmt.count(steps, 'step')} in" if steps else "in"
        lines.append(
            f"trained: {_METHODS.get(method, method)}, {made} {fmt.duration(training['seconds'])} "
            f"on {training['device']}, {fmt.count(len(training['support']), 'slice')}"
        )
        if training.get("validation_iou") is not None:
            lines.append(f"validation IoU: {training['validation_iou']:.3f}")
        if expectation := core.describe_expectation(training):
            lines.append(expectation)
    return "\n".join(lines)
