"""Distillation of the annotated slices to a student, with its progress."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qtpy.QtWidgets import QWidget

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._session import Session
from napari_distillfss._tasks import Distilled, iter_training
from napari_distillfss._threads import Job
from napari_distillfss._widgets._common import JobBar, Message, ReplaceOffer, allow, attempt, button, column, row
from napari_distillfss._widgets.plot import TrainingPlot
from napari_distillfss._widgets.settings import PresetPicker

_REFINING = 5  # as a warm start in the core: refining takes a fifth of the steps
_HINT = "Annotate some slices, then press Train"
_READY = "Ready to train on the slices that are ticked"


class DistillWidget(QWidget):
    """Trains a student in a thread. A cancelled training keeps its best student so far."""

    def __init__(self, session: Session, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._session = session
        self._started: tuple[Any, Path | None, str] | None = None  # settings, student gone on from, preset
        self._has_begun = False  # whether the training is beyond its preparation, of which nothing is kept
        self._kept: Distilled | None = None  # the student of a training that has made all its steps, until it ends
        self._trained: Any = None  # the latest student
        self._image: Any = None  # the layer of the volume that message and plot are of
        self.settings = PresetPicker()
        self.distill = button("Train", "Distill a student, a small model, from the annotated slices", self.start)
        self.refine = button(
            "Refine",
            "Continue the training of the present model (the student) on the present slices, in a fifth of the steps",
            self.start_refining,
        )
        self.job = Job(session, "Training", self)
        self.plot = TrainingPlot()
        self.job.stepped.connect(self._on_job_stepped)  # before the bar, which shows the loss of the plot
        self.message = Message(_HINT)
        self.offer = ReplaceOffer(session, self.job)
        told = row(self.message, self.offer, first=3)
        column(
            self,
            self.settings,
            row(self.distill, self.refine),
            JobBar(
                self.job,
                cancel="Stop the training and keep the best model so far",
                instead_of=told,
                is_patient=lambda: self._has_begun and self._kept is None,
                describe=self._describe,
            ),
            told,
            self.plot,
        )
        self.plot.hide()
        self.job.done.connect(self._on_job_done)
        self.job.failed.connect(self._on_job_failed)
        session.model_changed.connect(self._on_model_changed)
        session.busy_changed.connect(self._on_state_changed)
        session.slices_changed.connect(self._on_slices_changed)
        session.volume_changed.connect(self._on_volume_changed)
        self._on_state_changed()

    def start(self) -> None:
        """Distill a new student."""
        self._start(None)

    def start_refining(self) -> None:
        """Refine the present student."""
        if self._session.model is None:
            self.message.warn("there is no model to refine yet; press Train first")
            return
        self._start(self._session.model)

    def _start(self, model: Any) -> None:
        def start() -> None:
            if self.settings.error:
                raise core.SettingsError(self.settings.error)
            settings, maker = self.settings.value(), self._session.support_maker()
            if model is not None and settings.steps:  # with 0 the core takes a fifth of the steps it chooses
                settings = replace(settings, steps=max(1, settings.steps // _REFINING))
            keep = self._session.next_model_path()
            assert keep is not None  # there are annotations
            chosen = self._session.volume if settings.uses_unlabeled else None
            volume = chosen.volume if chosen else None
            self.job.start(lambda stop: iter_training(maker, settings, model, keep, stop, volume))
            start = self._session.model_path if model is not None else None
            self._started, self._has_begun = (settings, start, self.settings.preset.currentText()), False
            self._kept = None
            self.plot.clear()
            self.plot.show()
            self.message.tell("")

        attempt(self.message, start)

    def _on_job_stepped(self, step: Any) -> None:
        if isinstance(step, Distilled):
            self._kept = step
        if isinstance(step, core.TrainStep) and not step.is_preparation:
            self._has_begun = True
            loss = sum(step.losses.values()) if step.losses else None
            self.plot.add(step.index, step.total, loss, step.metrics.get("iou"))

    def _describe(self, step: core.TrainStep) -> str:
        """As the core does, with the loss that the plot shows."""
        loss = self.plot.loss
        return core.describe_step(replace(step, losses={"loss": loss}) if step.losses and loss is not None else step)

    def _on_job_done(self, distilled: Distilled | None) -> None:
        if self._started is None:
            return
        if distilled is None and self._kept is not None:
            distilled = replace(self._kept, stopped=True)
        if distilled is None:
            self.plot.hide()
            self.message.tell("stopped before the first step; nothing was changed")
            return
        settings, start, preset = self._started
        self._trained = distilled.model
        self._session.take_student(distilled.model, distilled.path, settings, start, distilled.support, preset)
        card = distilled.model.training
        made = f"{card['steps']} steps" if card["steps"] else card["method"]
        line = f"{'Stopped' if distilled.stopped else 'Done'}: {made} in {fmt.duration(card['seconds'])}"
        if not card["steps"]:
            self.plot.hide()
        if card.get("validation_iou") is not None:
            line += f", IoU {card['validation_iou']:.3f} on the validation slice"
        if expectation := core.describe_expectation(card):
            line += f"; {expectation}"
        if distilled.stopped:
            line += f"; the best model so far (step {card['best_step']}) is kept"
        if distilled.error:
            self.message.warn(f"{line}. It is not kept yet: press Save and choose another place ({distilled.error})")
            return
        self.message.tell(line + ". Scroll to see its preview, paint where it is wrong, then press Refine")

    def _on_job_failed(self, message: str) -> None:
        self.plot.setVisible(bool(self.plot.losses))
        self.message.warn(message)

    def _on_model_changed(self) -> None:
        """Forget the training of another model."""
        if self._session.model is not self._trained and not self.message.warns and not self.job.running:
            self._trained = None
            self.plot.hide()
            self.message.tell(_READY if self._session.has_slices else _HINT)
        self._on_state_changed()

    def _on_volume_changed(self) -> None:
        """Forget the training of another volume; another time point or channel of an image leaves it."""
        image = self._session.volume.layer if self._session.volume is not None else None
        if image is not self._image and not self.job.running:
            self._image = image
            self.plot.hide()
            self.message.tell(_READY if self._session.has_slices else _HINT)

    def _on_slices_changed(self) -> None:
        if self.message.warns or self.message.text() in (_HINT, _READY):  # what was wrong may be no longer
            self.message.tell(_READY if self._session.has_slices else _HINT)
        self._on_state_changed()

    def _on_state_changed(self) -> None:
        reason = self._session.no_job or ("" if self._session.has_slices else "no slice is annotated")
        allow(self.distill, reason)
        allow(self.refine, reason or ("" if self._session.model is not None else "there is no model yet; train one"))
