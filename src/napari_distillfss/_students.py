"""Students that are kept beside the annotations: what they were trained with, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import tifffile

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._annotations import file_of, write_json
from napari_distillfss._presets import OWN, preset_of

_RECORD = "training.json"
_NAMES = ("model-", "student-")
"""How names of files begin, a number follows; the second is that of older files."""


@dataclass(frozen=True)
class Training:
    """Provenance of the student, for the script."""

    settings: Mapping[str, Any]  # those that differ from the defaults
    start: Path | None  # the student it went on from
    classes: tuple[str, ...]
    pixel_size: tuple[float, float] | None
    support: Path | None  # where the slices it learned from were written; None if they could not be
    preset: str = ""  # name of the preset, or of settings that are none


@dataclass(frozen=True, eq=False)
class KeptStudent:
    """A student of a file, without its weights.

    Parameters
    ----------
    path : path
    card : mapping
        Its model card; empty if the file cannot be read.
    error : str
        Why it cannot be read; empty if it can.
    training : Training, optional
        None if the file lies alone.
    """

    path: Path
    card: Mapping[str, Any]
    training: Training | None = None
    error: str = ""

    @property
    def name(self) -> str:
        """As users know it: "model 1"; the name of its file where that is another one."""
        return name_of(self.path)

    @property
    def created(self) -> str:
        """When it was made: an ISO time in UTC, as in its card."""
        return str(self.card.get("created", ""))

    @property
    def time(self) -> str:
        """When it was made, in local time: "2026-11-28 16:20"."""
        return f"{datetime.fromisoformat(self.created).astimezone():%Y-%m-%d %H:%M}" if self.created else ""

    @property
    def record(self) -> Mapping[str, Any]:
        """The part of the card about the training."""
        return self.card.get("training") or {}

    @property
    def preset(self) -> str:
        """Preset that it was trained with; that of its settings where none was recorded."""
        if self.training is not None and self.training.preset:
            return self.training.preset
        with suppress(core.DistillFSSError, TypeError):  # settings of an older version
            return preset_of(core.DistillSettings.from_json(self.record.get("settings", {})).changed()) or OWN
        return OWN

    @property
    def validation_iou(self) -> float | None:
        """IoU on its validation slice; None if it had none."""
        return self.record.get("validation_iou")

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the slices it learned from: "plane 3"."""
        return tuple(self.record.get("support", ()))

    def describe(self) -> str:
        """Time, preset, slices, steps, IoU on the validation slice; in a third line the IoU to expect, if any."""
        if self.error:
            return f"{self.name}: cannot be read"
        iou = f", IoU {self.validation_iou:.3f}" if self.validation_iou is not None else ""
        start = self.training.start if self.training is not None else None
        origin = f"refined from {name_of(start)}, " if start is not None else ""
        made = fmt.count(self.record.get("steps", 0), "step") if self.record.get("method") != "probe" else "probe"
        learned = f"{self.name}: {origin}{fmt.count(len(self.slices), 'slice')}, {made}{iou}"
        return "\n".join(filter(None, (f"{self.time}, {self.preset}", learned, core.describe_expectation(self.record))))


@dataclass(frozen=True, eq=False)
class Compared:
    """IoU of two students on the same annotated slices.

    Parameters
    ----------
    planes : tuple of int
        The slices.
    scores : pair of core.Scores or None
        Of the two students; None for one with other classes.
    unseen : tuple of int
        Slices that neither student learned from.
    unseen_scores : pair of core.Scores or None
        Scores on those.
    reason : str
        Why there are no slices to compare on; empty where there are.
    """

    planes: tuple[int, ...] = ()
    scores: tuple[Any, Any] = (None, None)
    unseen: tuple[int, ...] = ()
    unseen_scores: tuple[Any, Any] = (None, None)
    reason: str = ""


def number_of(path: Path) -> int | None:
    """Number of a student in its folder, from the name of its file; None for a name of another kind."""
    for start in _NAMES:
        number = path.stem.removeprefix(start)
        if number != path.stem and number.isdecimal():
            return int(number)
    return None


def name_of(path: Path) -> str:
    """Name of a student for users: "model 1", or the name of its file where that has no number."""
    number = number_of(path)
    return path.stem if number is None else f"model {number}"


def write_record(training: Training) -> None:
    """Write the provenance of a student beside the slices it learned from.

    Raises
    ------
    core.OutputError
    """
    if training.support is None:
        return
    folder = training.support
    start = training.start
    record = {
        "settings": dict(training.settings),
        "preset": training.preset,
        # a name where both lie in one folder, so that it holds when the folder is moved
        "start": None if start is None else start.name if start.parent == folder.parent else str(start),
    }
    path = folder / _RECORD
    try:
        write_json(path, record)
    except OSError as error:
        raise core.OutputError(f"cannot write {path}: {error.strerror or error}") from error


def read_training(path: Path, classes: tuple[str, ...], pixel_size: tuple[float, float] | None) -> Training | None:
    """Provenance of a student in a file; None if its slices do not lie beside it or nothing was recorded."""
    folder = path.with_suffix("")
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        start = folder.parent / record["start"] if record["start"] else None  # an absolute path stays as it is
        return Training(dict(record["settings"]), start, classes, pixel_size, folder, str(record["preset"]))
    return None


def read_student(path: Path) -> KeptStudent:
    """Read card and provenance of a student. One that cannot be read has an ``error``. Loads torch."""
    try:
        card = core.read_card(path)
    except core.DistillFSSError as error:
        return KeptStudent(path, {}, error=str(error))
    pixel = card["pixel_size_um"]
    training = read_training(path, tuple(card["classes"]), (pixel[0], pixel[1]) if pixel else None)
    return KeptStudent(path, card, training)


def differences(old: KeptStudent, new: KeptStudent) -> list[str]:
    """What changed from a student to another: preset, settings, steps, classes and slices, a line each."""
    lines = []
    if old.preset != new.preset:
        lines.append(f"preset: {old.preset} → {new.preset}")
    lines += _changed_settings(old, new)
    if old.card.get("classes") != new.card.get("classes"):
        lines.append(f"classes: {', '.join(old.card['classes'])} → {', '.join(new.card['classes'])}")
    if old.record.get("steps") != new.record.get("steps"):
        lines.append(f"steps made: {old.record.get('steps', 0)} → {new.record.get('steps', 0)}")
    lines += _changed_slices(old, new)
    return lines


def _changed_settings(old: KeptStudent, new: KeptStudent) -> Iterator[str]:
    values = [student.record.get("settings", {}) for student in (old, new)]
    for setting in fields(core.DistillSettings):
        before, after = (value.get(setting.name, setting.default) for value in values)
        if before != after:
            yield f"{setting.metadata['label']}: {_text(before)} → {_text(after)}"


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _changed_slices(old: KeptStudent, new: KeptStudent) -> Iterator[str]:
    before, after = set(old.slices), set(new.slices)
    for text, names in (
        ("slices added", [name for name in new.slices if name not in before]),
        ("slices removed", [name for name in old.slices if name not in after]),
        ("slices painted further", [name for name in new.slices if name in before and _is_repainted(old, new, name)]),
    ):
        if names:
            yield f"{text}: {', '.join(names)}"


def _is_repainted(old: KeptStudent, new: KeptStudent, name: str) -> bool:
    """Whether the labels of a slice that both learned from differ; False where they were not kept."""
    try:
        first, second = (tifffile.imread(s.path.with_suffix("") / "labels" / file_of(name)) for s in (old, new))
    except (OSError, ValueError):
        return False
    return first.shape != second.shape or bool((first != second).any())


def plane_of(name: str) -> int | None:
    """Number of the plane that a slice is of, from its name "plane 3"; None for another name."""
    number = name.removeprefix("plane ")
    return int(number) if number.isdecimal() else None
