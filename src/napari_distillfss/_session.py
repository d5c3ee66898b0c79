"""What the user has made so far: a volume, annotations, a student, labels. Whoever shows a part of it listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs
from psygnal import Signal

import distillfss_core as core
from napari_distillfss._annotations import Annotations, folder_for, make_support, set_aside
from napari_distillfss._layers import ChosenVolume

LearntFrom = tuple[ChosenVolume, Annotations]

_NO_VOLUME = "no volume is chosen; choose an image layer first"


@dataclass(frozen=True)
class Training:
    """How the student came about, for the script."""

    settings: Mapping[str, Any]
    start: Path | None
    volume: ChosenVolume
    annotations: Annotations


@dataclass(frozen=True)
class Applied:
    """Labels that were written, of what volume, for the script and for counting."""

    volume: ChosenVolume
    out: Path
    mode: str
    region: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class Counted:
    """Objects that were numbered and measured, for the script."""

    out: Path
    table: Path
    how: Mapping[str, Any] = field(default_factory=dict)


class Session:
    """What the user has made so far.

    Parameters
    ----------
    folder : path, optional
        Where annotations and students are kept as they are made; by default the user's data folder.
    """

    volume_changed = Signal()
    slices_changed = Signal()
    classes_changed = Signal()
    model_changed = Signal()
    labels_changed = Signal()
    busy_changed = Signal()
    closed = Signal()

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(platformdirs.user_data_dir("napari-distillfss", appauthor=False))
        self.volume: ChosenVolume | None = None
        self.annotations: Annotations | None = None
        self.no_annotations = _NO_VOLUME  # why there are none, while there are none
        self.model: Any = None
        self.model_path: Path | None = None
        self.training: Training | None = None
        self.applied: Applied | None = None
        self.counted: Counted | None = None
        self._busy = ""
        self._told: list[tuple[int, bytes]] = []

    @property
    def busy(self) -> str:
        """What long work is going on, in a word; one at a time."""
        return self._busy

    @busy.setter
    def busy(self, what: str) -> None:
        self._busy = what
        self.busy_changed.emit()

    def choose_volume(self, chosen: ChosenVolume | None) -> None:
        """Work on this volume; its annotations are found again if there are any.

        Raises
        ------
        core.OutputError, core.InputFileError
            If annotations cannot be kept, or the volume cannot be told from others as it cannot be read.
        """
        if self.annotations is not None:
            self.annotations.close()
        self.volume, self.annotations, self.no_annotations = chosen, None, _NO_VOLUME
        try:
            if chosen is not None:
                self._open_annotations(chosen)
        except (core.OutputError, core.InputFileError) as fault:  # the volume can still be previewed and segmented
            self.no_annotations = str(fault)
            raise
        finally:
            self._told = self._slices()
            self.volume_changed.emit()
            self.classes_changed.emit()
            self.slices_changed.emit()

    def begin_anew(self) -> None:
        """Set the annotations of this volume aside and begin with none."""
        if self.volume is None or self.annotations is None:
            return
        self.annotations.close()
        if self.annotations.folder.is_dir():
            set_aside(self.annotations.folder)
        self.choose_volume(self.volume)

    def set_classes(self, classes: Any) -> None:
        if self.annotations is not None and tuple(classes) != self.annotations.classes:
            self.annotations.classes = classes
            self.classes_changed.emit()

    def painted(self) -> None:
        """Something may have been painted, or undone, in any plane."""
        if self._slices() != self._told:
            self._told = self._slices()
            self.slices_changed.emit()

    def support_maker(self) -> tuple[Callable[[], Any], LearntFrom]:
        """A function that reads the support set as it is now (it may run in another thread), and of what.

        Raises
        ------
        core.SupportSetError
            If there is nothing to read.
        """
        if self.volume is None or self.annotations is None:
            raise core.SupportSetError(self.no_annotations)
        if not any(s.enabled for s in self.annotations.slices()):
            raise core.SupportSetError("no slice is annotated; paint background and objects in one slice at least")
        volume, annotations = self.volume, self.annotations
        return (lambda: make_support(volume.volume, annotations, volume.pixel_size)), (volume, annotations)

    def set_model(self, model: Any, *, path: Path | None, training: Training | None) -> None:
        self.model, self.model_path, self.training = model, path, training
        self.model_changed.emit()

    def next_model_path(self) -> Path | None:
        """Where the next student is to be kept: beside the annotations."""
        if self.annotations is None:
            return None
        folder = self.annotations.folder
        return folder / f"student-{len(list(folder.glob('student-*.safetensors'))) + 1}.safetensors"

    def take_student(
        self, model: Any, path: Path | None, settings: Any, start: Path | None, learnt_from: LearntFrom
    ) -> None:
        """A student that was distilled here, from slices of a volume that may no longer be the one chosen."""
        defaults = {f.name: f.default for f in fields(settings)}
        changed = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
        self.set_model(model, path=path, training=Training(changed, start, *learnt_from))

    def set_applied(self, applied: Applied) -> None:
        self.applied, self.counted = applied, None
        self.labels_changed.emit()

    def close(self) -> None:
        """The user is done: stop what runs, let others have the annotations."""
        self.closed.emit()
        if self.annotations is not None:
            self.annotations.close()
        self.volume = self.annotations = None

    def _slices(self) -> list[tuple[int, bytes]]:
        """What is painted, to be compared with what it was."""
        return [(s.plane, s.counts.tobytes()) for s in self.annotations.slices()] if self.annotations else []

    def _open_annotations(self, chosen: ChosenVolume) -> None:
        root = self.folder / "annotations"
        identity = {**chosen.volume.identity, "lead": dict(chosen.lead), "factors": list(chosen.factors)}
        folder = folder_for(root, chosen.name, identity, chosen.shape)
        self.annotations = Annotations(folder, chosen.shape, chosen.index)
