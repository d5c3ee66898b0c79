"""Segmentation of many volumes with the student: a folder of files, some files, or image layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qtpy.QtWidgets import QCheckBox, QFileDialog, QHeaderView, QLineEdit, QTableWidget, QTableWidgetItem, QWidget

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._layers import is_image
from napari_distillfss._scripts import free_name
from napari_distillfss._session import Session
from napari_distillfss._tasks import Batched, iter_batching, jobs_of_layers
from napari_distillfss._threads import Job
from napari_distillfss._widgets._common import JobBar, Message, allow, attempt, button, column, combo, row

FILES, LIST = "files of a folder", "chosen files"
LAYERS, SELECTED = "all image layers", "selected image layers"
_SEPARATOR = ";"  # between the names of chosen files
_COLUMNS = ("volume", "status", "note")


class BatchWidget(QWidget):
    """Segments many volumes into a folder, with a report of all.

    Parameters
    ----------
    mode : function
        The mode in which volumes are segmented, as the core calls it.
    tta : function
        Whether they are segmented with test-time augmentation.
    """

    def __init__(
        self,
        session: Session,
        viewer: Any,
        mode: Callable[[], str],
        tta: Callable[[], bool],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._session, self._viewer, self._mode, self._tta = session, viewer, mode, tta
        self._report: Path | None = None
        self._failed = 0
        self._plan: Callable[[float | None], list[core.BatchJob]] = lambda _: []
        self._not_finite: set[Path] = set()  # labels of volumes with pixels that are not finite
        self.what = combo("Volumes to segment", (FILES, LIST, LAYERS, SELECTED))
        self.folder = QLineEdit()
        self.folder.setToolTip(f"Folder whose volumes are segmented; or files, with {_SEPARATOR!r} between them")
        self.browse_folder = button("…", "Choose the folder, or the files", self._on_browse_clicked)
        self.out = QLineEdit()
        self.out.setToolTip("Folder of the labels and of the report; made if it is not there")
        self.out.setPlaceholderText("folder of labels")
        self.browse_out = button("…", "Choose where to write", lambda: self._browse(self.out))
        for browse in (self.browse_folder, self.browse_out):
            browse.setMaximumWidth(32)
        self.channel = QLineEdit()
        self.channel.setToolTip("Channel of files that have several, by number or name; of layers that of the slider")
        self.channel.setPlaceholderText("the only one")
        self.all_times = QCheckBox("All time points")
        self.all_times.setToolTip("Segment each time point of a volume; otherwise that of the slider (layers)")
        self.all_times.setChecked(True)
        self.replace = QCheckBox("Replace existing labels")
        self.replace.setToolTip("Replace labels that this plugin has written; other files are never replaced")
        self.run = button("Segment all", "Segment one volume after another. After a cancel it continues", self.start)
        self.job = Job(session, "Batch segmentation", self, in_turn=True)
        self.rows = QTableWidget(0, len(_COLUMNS))
        self.rows.setHorizontalHeaderLabels(_COLUMNS)
        self.rows.setToolTip("The report; click a row to read its note")
        self.rows.setMinimumHeight(110)
        header = self.rows.horizontalHeader()
        assert header is not None  # every table has one
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        header.setStretchLastSection(True)  # the note
        for widget, name in (
            (self.what, "Volumes to segment"),
            (self.folder, "Folder or files of volumes"),
            (self.browse_folder, "Choose the volumes"),
            (self.browse_out, "Choose the folder of labels"),
            (self.rows, "Report"),
        ):
            widget.setAccessibleName(name)
        self.rows.hide()
        self.message = Message()
        self.offer = button(
            "Read as 0",
            "Segment the volumes again that have pixels that are NaN or infinite, and read these as 0; the files are "
            "not changed",
            self.start_replacing,
        )
        self._offer(False)
        told = row(self.message, self.offer, first=3)
        column(
            self,
            self.what,
            row(self.folder, self.browse_folder),
            row("Save to", self.out, self.browse_out),
            row("Channel", self.channel),
            self.all_times,
            self.replace,
            self.run,
            JobBar(
                self.job,
                cancel="Stop; what is written is kept, and Segment all goes on from there",
                instead_of=told,
                is_patient=lambda: False,
            ),
            told,
            self.rows,
        )
        self.what.currentTextChanged.connect(self._on_state_changed)
        self.rows.currentCellChanged.connect(self._on_row_chosen)
        self.job.stepped.connect(self._on_job_stepped)
        self.job.done.connect(self._on_job_done)
        self.job.failed.connect(self.message.warn)
        session.model_changed.connect(self._on_state_changed)
        session.busy_changed.connect(self._on_state_changed)
        session.volume_changed.connect(self._on_volume_changed)
        self._on_state_changed()

    def start(self) -> None:
        """Segment the volumes, or continue a stopped run."""

        def start() -> None:
            model = self._session.model
            if model is None:
                raise core.SettingsError(self._session.no_model)
            self.job.check_free()
            out = self._folder_of(self.out, "the labels")
            plan = self._planner(out)
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise core.OutputError(f"cannot make {out}: {error.strerror}; choose another folder") from error
            self._start(lambda: plan(None), model, out, overwrite=self.replace.isChecked())
            self._plan = plan

        attempt(self.message, start)

    def start_replacing(self) -> None:
        """Segment those volumes again that have pixels that are not finite, which are read as 0.

        What was written of their labels is replaced.
        """

        def start() -> None:
            model, outputs, plan = self._session.model, set(self._not_finite), self._plan
            if model is None:
                raise core.SettingsError(self._session.no_model)
            self.job.check_free()
            out = next(iter(outputs)).parent
            self._start(lambda: [job for job in plan(0.0) if job.output in outputs], model, out, overwrite=True)

        attempt(self.message, start)

    def _start(self, plan: Callable[[], list[core.BatchJob]], model: Any, out: Path, *, overwrite: bool) -> None:
        report, model = free_name(out / "report.csv"), model.with_tta(self._tta())
        options = {"mode": self._mode(), "overwrite": overwrite, "resume": not overwrite}
        self.job.start(lambda stop: iter_batching(plan, model, report, stop, **options))
        self._report, self._failed, self._not_finite = report, 0, set()
        self._offer(False)
        self.rows.setRowCount(0)
        self.rows.hide()
        self.message.tell("")

    def _planner(self, out: Path) -> Callable[[float | None], list[core.BatchJob]]:
        """A function that lists the volumes, in another thread, given what pixels that are not finite are read as."""
        all_times, channel = self.all_times.isChecked(), self.channel.text().strip()
        options = {"channel": int(channel) if channel.isdecimal() else channel} if channel else {}
        if self.what.currentText() == FILES:
            folder = self._folder_of(self.folder, "the volumes")
            if not folder.is_dir():
                raise core.InputFileError(f"{folder}: there is no such folder; choose the folder of the volumes")
            if folder.resolve() == out.resolve():
                raise core.OutputError(f"{out}: labels among the volumes would be volumes next time; choose another")
            return lambda value: core.plan_batch(folder, out, options | _replaced(value), all_times=all_times)
        if self.what.currentText() == LIST:
            names = [name.strip() for name in self.folder.text().split(_SEPARATOR) if name.strip()]
            files = [Path(name).expanduser().absolute() for name in names]
            if not files:
                raise core.SettingsError("no file is chosen; choose some with …")
            return lambda value: core.plan_batch(files, out, options | _replaced(value), all_times=all_times)
        layers, point = self._layers(), self._viewer.dims.point
        return lambda value: jobs_of_layers(layers, point, out, all_times=all_times, replace_nan=value)

    def _layers(self) -> list[Any]:
        layers = self._viewer.layers
        chosen = [layer for layer in layers if self.what.currentText() == LAYERS or layer in layers.selection]
        images = [layer for layer in chosen if is_image(layer)]
        if not images:
            raise core.SettingsError("there is no such image layer; open or select the images to segment")
        return images

    def _folder_of(self, edit: QLineEdit, what: str) -> Path:
        if not edit.text().strip():
            raise core.SettingsError(f"no folder of {what} is chosen; choose one with …")
        return Path(edit.text().strip()).expanduser().absolute()

    def _browse(self, edit: QLineEdit) -> None:
        path = QFileDialog.getExistingDirectory(self, "Choose a folder", edit.text())
        if path:
            edit.setText(path)

    def _on_browse_clicked(self) -> None:
        if self.what.currentText() == FILES:
            self._browse(self.folder)
            return
        start = self.folder.text().partition(_SEPARATOR)[0].strip()
        names, _ = QFileDialog.getOpenFileNames(self, "Choose files", start)
        if names:
            self.folder.setText(f"{_SEPARATOR} ".join(names))

    def _on_job_stepped(self, step: Any) -> None:
        if isinstance(step, Batched) and step.row is not None:
            self._failed += step.row["status"] == "failed"
            if isinstance(step.error, core.NotFiniteError) and step.output is not None:
                self._not_finite.add(step.output)
            self._add_row(step.row)

    def _add_row(self, report: Mapping[str, Any]) -> None:
        number = self.rows.rowCount()
        time = f", time {report['time']}" if report.get("time") else ""
        texts = (
            Path(report["volume"]).name + time,
            report["status"],
            (report.get("error") or report.get("warning") or "").removeprefix(report["volume"]).lstrip(": "),
        )
        self.rows.insertRow(number)
        for at, text in enumerate(texts):
            item = QTableWidgetItem(text)
            item.setToolTip(text)
            self.rows.setItem(number, at, item)
        self.rows.show()

    def _offer(self, is_offered: bool) -> None:
        self.offer.setVisible(is_offered)
        self.offer.setEnabled(is_offered)

    def _on_row_chosen(self, number: int, *_: int) -> None:
        cells = [self.rows.item(number, at) for at in range(len(_COLUMNS))]
        if not self.job.running and all(cells):
            texts = [cell.text() for cell in cells if cell is not None and cell.text()]
            (self.message.warn if texts[1] == "failed" else self.message.tell)(": ".join(texts))

    def _on_job_done(self, rows: Any) -> None:
        if rows is None:
            self.message.tell(f"Stopped; what is written is kept, and {self.run.text()} goes on from there")
            return
        text = f"{len(rows) - self._failed} of {fmt.count(len(rows), 'volume')} segmented; "
        if self._not_finite:
            text += f"{len(self._not_finite)} with pixels that are NaN or infinite: Read as 0 segments them; "
            self._offer(True)
        text += f"report in {self._report}"
        (self.message.warn if self._failed else self.message.tell)(text)

    def _on_volume_changed(self) -> None:
        chosen = self._session.volume
        if chosen is not None and chosen.volume.path is not None and not self.folder.text():
            self.folder.setText(str(chosen.volume.path.parent))
            self.channel.setText(str(chosen.opening.get("channel", "")))
        if chosen is not None and chosen.volume.path is not None and not self.out.text():
            self.out.setText(str(chosen.volume.path.parent / "distillfss-labels"))

    def _on_state_changed(self) -> None:
        is_files = self.what.currentText() in (FILES, LIST)
        self.folder.setPlaceholderText("folder of volumes" if self.what.currentText() == FILES else "files")
        for widget in (self.folder, self.browse_folder, self.channel):
            widget.setEnabled(is_files)
        allow(self.run, self._session.no_job or ("" if self._session.model is not None else self._session.no_model))
        if self._session.model is not None and self.message.text() == self._session.no_model:
            self.message.tell("")


def _replaced(value: float | None) -> dict[str, float]:
    """Option of a volume whose pixels that are not finite are read as a number."""
    return {} if value is None else {"replace_nan": value}
