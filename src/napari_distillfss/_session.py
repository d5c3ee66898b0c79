"""State of a session: volume, annotations, student and labels, with signals for the widgets that show them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import platformdirs
from psygnal import Signal

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._annotations import (
    Annotations,
    User,
    folder_for,
    is_set_aside,
    kept_apart,
    move_annotations,
    own_folder,
    own_name,
    read_slice,
    set_aside,
    user_of,
    write_json,
)
from napari_distillfss._layers import ChosenVolume
from napari_distillfss._sources import OtherSlices, other_slices, support_of
from napari_distillfss._students import KeptStudent, Training, number_of, read_training, write_record

_REPLACEMENTS = "replace_nan"  # name of the choices of `Session.replacement_of`
_NO_VOLUME = "no volume is chosen; choose an image layer first"


@dataclass(frozen=True)
class Applied:
    """Labels that were written, and their volume, for the script and for counting."""

    volume: ChosenVolume
    out: Path
    mode: str
    region: tuple[tuple[int, int], ...] | None
    model: Path | None
    classes: tuple[str, ...]
    is_earlier: bool = False  # written before this session
    tta: bool = False


@dataclass(frozen=True)
class Counted:
    """Objects that were numbered and measured, for the script."""

    out: Path
    table: Path
    options: Mapping[str, Any] = field(default_factory=dict)


class Session:
    """State of a session.

    Parameters
    ----------
    folder : path, optional
        Where annotations and students are kept as they are made; by default the user's data folder.
    layers : function, optional
        Gives the layers that are open, in which volumes of other slices are looked for.
    annotates : bool
        Whether slices are annotated and models trained in it; otherwise models are loaded only.
    """

    volume_changed = Signal()
    slices_changed = Signal()
    stroked = Signal()  # at once, where slices_changed waits until the hand rests
    classes_changed = Signal()
    model_changed = Signal()
    labels_changed = Signal()
    busy_changed = Signal()
    closed = Signal()

    def __init__(
        self, folder: Path | None = None, layers: Callable[[], Sequence[Any]] = tuple, *, annotates: bool = True
    ) -> None:
        self.layers, self.annotates = layers, annotates
        self.folder = folder or Path(platformdirs.user_data_dir("napari-distillfss", appauthor=False))
        self.volume: ChosenVolume | None = None
        self.annotations: Annotations | None = None
        self.no_annotations = _NO_VOLUME  # why there are none, while there are none
        self.is_another_image = False  # whether that was chosen last, not another time point or channel
        self.first_window: User | None = None  # another one that has the annotations of this volume
        self.model: Any = None
        self.model_path: Path | None = None
        self.training: Training | None = None
        self.applied: Applied | None = None
        self.counted: Counted | None = None
        self._busy = ""
        self._seen_slices: list[tuple[int, Any]] | None = []  # None after a stroke
        self._others: dict[str, OtherSlices] = {}
        self._resumed: tuple[Path | None, Training | None] = (None, None)
        self.stroked.connect(self._on_stroked)

    @property
    def busy(self) -> str:
        """Noun for the running job; empty if there is none. One job runs at a time."""
        return self._busy

    @busy.setter
    def busy(self, what: str) -> None:
        self._busy = what
        self.busy_changed.emit()

    def choose_volume(self, chosen: ChosenVolume | None) -> None:
        """Choose the volume to work on and open its annotations, if there are any.

        Raises
        ------
        core.OutputError, core.InputFileError
            If annotations cannot be kept, or the volume cannot be told from others as it cannot be read.
        """
        before, earlier = self.volume, self.annotations
        is_same_image = before is not None and chosen is not None and before.layer is chosen.layer
        self.is_another_image = not is_same_image
        if earlier is not None:
            earlier.close()
        self.volume, self.annotations, self.no_annotations = chosen, None, _NO_VOLUME
        try:
            if chosen is not None:
                annotations = self.annotations = self._open_annotations(chosen)
                if before is not None and earlier is not None and is_same_image:
                    moved = {a for a, n in chosen.lead.items() if before.lead.get(a) != n}
                    if moved:
                        annotations.take_over(earlier)
                    if moved == {"t"}:
                        annotations.take_over_slices(earlier)
        except (core.OutputError, core.InputFileError) as error:  # the volume can still be previewed and segmented
            self.no_annotations = str(error)
            raise
        finally:
            self._seen_slices = self._slices()
            self.volume_changed.emit()
            self.classes_changed.emit()
            self.slices_changed.emit()

    def begin_anew(self) -> Path | None:
        """Set the annotations of this volume aside and start with none. Returns their new path, if there were any."""
        if self.volume is None or self.annotations is None:
            return None
        aside = self._set_aside(self.annotations)
        self.choose_volume(self.volume)
        return aside

    def restorable(self) -> list[Path]:
        """Annotations of this volume that were set aside or made in a second window, the latest first."""
        if self.volume is None or self.annotations is None:
            return []
        return kept_apart(self._folder(own_folder, self.volume), self.annotations.folder)

    @property
    def has_slices_of_second_window(self) -> bool:
        """Whether a second window, closed by now, has left annotations of this volume."""
        return not all(map(is_set_aside, self.restorable()))

    def restore(self, aside: Path) -> Path | None:
        """Take annotations up again that were set aside or made in a second window; the present are set aside in turn.

        Returns
        -------
        path or None
            Where the annotations of before are now, if there were any.
        """
        if self.volume is None or self.annotations is None:
            return None
        before = self._set_aside(self.annotations)
        folder = self._folder(folder_for, self.volume)  # another than before where the first window was closed since
        if folder != aside:
            if folder.is_dir():
                set_aside(folder)
            move_annotations(aside, folder)
            self._follow(aside, folder)
        self.choose_volume(self.volume)
        return before

    def _set_aside(self, annotations: Annotations) -> Path | None:
        annotations.save()
        annotations.close()
        folder = annotations.folder
        if not folder.is_dir():
            return None
        try:
            aside = set_aside(folder)
        except OSError as error:
            raise core.OutputError(f"cannot rename {folder}: {error.strerror or error}; nothing was changed") from error
        self._follow(folder, aside)
        return aside

    def _follow(self, folder: Path, aside: Path) -> None:
        """Replace a folder in all paths of the session after it was moved."""

        def moved(path: Path | None) -> Path | None:
            return aside / path.relative_to(folder) if path is not None and path.is_relative_to(folder) else path

        self.model_path = moved(self.model_path)
        if self.training is not None:
            self.training = replace(
                self.training, start=moved(self.training.start), support=moved(self.training.support)
            )
        if self.applied is not None:
            self.applied = replace(self.applied, model=moved(self.applied.model))

    def recall(self, name: str, default: Any) -> Any:
        """A choice that `remember` has kept, in this session or an earlier one."""
        return self._remembered().get(name, default)

    def remember(self, name: str, value: Any) -> None:
        """Keep a choice of the user for later sessions."""
        with suppress(OSError):  # then it holds for this session
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._choices_path, self._remembered() | {name: value})

    def replacement_of(self, chosen: ChosenVolume) -> float | None:
        """The number that pixels of a volume are read as that are not finite, as was chosen before; None without."""
        with suppress(core.DistillFSSError):
            if chosen.volume.dtype.kind == "f":
                return self._replacements().get(self._folder(own_folder, chosen).name)
        return None

    def keep_replacement(self, chosen: ChosenVolume, value: float | None) -> None:
        """Keep for later sessions what pixels of a volume that are not finite are read as; None: as they are."""
        with suppress(core.DistillFSSError):
            self.keep_replacement_at(self._folder(own_folder, chosen).name, value)

    def keep_replacement_at(self, key: str, value: float | None) -> None:
        """As `keep_replacement`, of the volume whose annotations have this `OtherSlices.key`."""
        others = {name: number for name, number in self._replacements().items() if name != own_name(key)}
        self.remember(_REPLACEMENTS, others if value is None else {**others, own_name(key): value})

    def _replacements(self) -> dict[str, float]:
        """Numbers that were chosen, by the `own_name` of the folders of annotations: the choice is the volume's."""
        kept = self.recall(_REPLACEMENTS, {})
        numbers = sorted(kept.items(), reverse=True) if isinstance(kept, dict) else ()  # the own folder comes last
        return {own_name(name): float(n) for name, n in numbers if isinstance(n, (int, float)) and math.isfinite(n)}

    @property
    def _choices_path(self) -> Path:
        return self.folder / "choices.json"

    def _remembered(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            choices: dict[str, Any] = json.loads(self._choices_path.read_text(encoding="utf-8"))
            return choices
        return {}

    def set_classes(self, classes: Any) -> None:
        if self.annotations is not None and tuple(classes) != self.annotations.classes:
            self.annotations.classes = classes
            self.classes_changed.emit()

    def painted(self) -> None:
        """Signal that labels of any plane may have been painted or undone."""
        slices = self._slices()
        if slices != self._seen_slices:
            self._seen_slices = slices
            self.slices_changed.emit()

    def _on_stroked(self) -> None:
        """Note that the preview has followed a stroke: if it is undone soon, the slices have changed nevertheless."""
        self._seen_slices = None

    def others(self) -> list[OtherSlices]:
        """Annotated slices of all other volumes that are on disk, the latest first."""
        if self.annotations is None:
            return []
        return other_slices(self.annotations.folder.parent, self.annotations.folder)

    def use_also(self, keys: Sequence[str]) -> None:
        """Use the slices of other volumes, by `OtherSlices.key`, and of no others.

        A volume without labels takes over the classes of the first of them.
        """
        annotations = self.annotations
        if annotations is None:
            return
        annotations.also = keys
        used, _ = self.used()
        if used and not annotations.array.is_on_disk:
            self.set_classes(used[0].labels.classes)
        self.slices_changed.emit()

    def leave_out(self, key: str, z: int, out: bool = True) -> None:
        """Whether a slice of another volume, by `OtherSlices.key` and its plane, is left out."""
        if self.annotations is not None:
            self.annotations.leave_out(key, z, out)

    def used(self) -> tuple[list[OtherSlices], list[str]]:
        """Slices of other volumes that are used, and the names of folders that cannot be read."""
        if self.annotations is None:
            return [], []
        found: dict[str, OtherSlices] = {}
        for key in self.annotations.also:
            held = self._others.get(key)
            if held is not None and held.is_current:
                found[key] = held
                continue
            with suppress(core.SupportSetError):
                found[key] = OtherSlices(self.annotations.folder.with_name(key))
        self._others = found
        numbers = self._replacements()
        used = [other.without(self.annotations.left_out(key)) for key, other in found.items()]
        for other in used:
            other.replace_nan = numbers.get(own_name(other.key))
        return used, [key for key in self.annotations.also if key not in found]

    @property
    def no_model(self) -> str:
        """What to do where there is no model, as an error says it."""
        return f"there is no model yet; {'train or load' if self.annotates else 'load'} one first"

    @property
    def no_job(self) -> str:
        """Why no job can be started; "" if one can."""
        return fmt.running(self.busy) if self.busy else ""

    @property
    def has_slices(self) -> bool:
        """Whether there is anything to train on."""
        return self.annotations is not None and bool(self.annotations.planes() or self.annotations.also)

    def support_maker(self, *, with_others: bool = True) -> Callable[[], core.SupportSet]:
        """Return a function that reads the annotated planes and makes their support set in their present state.

        It may run in another thread.

        Parameters
        ----------
        with_others : bool
            Whether slices of other volumes that are used belong to it.

        Raises
        ------
        core.SupportSetError
            If there is nothing to read, or the slices of another volume are gone.
        """
        if self.volume is None or self.annotations is None:
            raise core.SupportSetError(self.no_annotations)
        volume, annotations = self.volume, self.annotations
        used, missing = self.used() if with_others else ([], [])
        if missing:
            raise core.SupportSetError(
                f"the annotations {missing[0]} are no longer in {annotations.folder.parent}; bring them back, or press "
                "Other volumes… and OK to go on without them"
            )
        if not used and not annotations.enabled():
            raise core.SupportSetError("no slice is annotated; paint background and objects in one slice at least")
        layers = tuple(self.layers())

        def own() -> core.VolumeSlices:
            slices = [read_slice(volume.volume, annotations, z, f"plane {z}") for z in annotations.enabled()]
            sample = core.sample_volume(volume.volume)[0] if used else None
            return core.VolumeSlices(volume.name, slices, volume.pixel_size, sample)

        return lambda: support_of(own, used, layers, annotations.class_names)

    def set_model(self, model: Any, *, path: Path | None, training: Training | None) -> None:
        self.model, self.model_path, self.training = model, path, training
        self.model_changed.emit()

    def next_model_path(self) -> Path | None:
        """Path for the next student: beside the annotations, under a name that is not used."""
        if self.annotations is None:
            return None
        folder = self.annotations.folder
        taken = [number for number in map(number_of, folder.glob("*")) if number is not None]
        return folder / f"model-{max(taken, default=0) + 1}.safetensors"

    def students(self) -> list[Path]:
        """Students that were trained on this volume, the latest first."""
        if self.annotations is None:
            return []
        files = [path for path in self.annotations.folder.glob("*.safetensors") if number_of(path) is not None]
        return sorted(files, key=lambda path: number_of(path) or 0, reverse=True)

    def take_student(
        self, model: Any, path: Path | None, settings: Any, start: Path | None, support: Path | None, preset: str = ""
    ) -> None:
        """Take a student that was distilled in this session; its volume may no longer be the chosen one."""
        training = Training(settings.changed(), start, tuple(model.class_names), model.pixel_size, support, preset)
        with suppress(core.OutputError):  # only the history and a script would need it
            write_record(training)
        self.set_model(model, path=path, training=training)

    def load_student(self, model: Any, path: Path) -> None:
        """Take the student of a file, with its provenance where that is known, or lies beside it."""
        resumed, training = self._resumed
        if training is None or path != resumed:
            training = read_training(path, tuple(model.class_names), model.pixel_size)
        self._resumed = (None, None)
        self.set_model(model, path=path, training=training)

    def resume(self, path: Path | None, training: Training | None) -> None:
        """Begin with the student of an earlier session, once it is loaded."""
        self._resumed = path, training

    def first_student(self) -> Path | None:
        """The student to begin with: that of the session that is resumed, or the latest of this volume."""
        resumed, _ = self._resumed
        if resumed is not None and resumed.is_file():
            return resumed
        return next(iter(self.students()), None)

    def has_kept_student(self, folder: Path) -> bool:
        """Whether the present student is kept with the annotations of a volume, but not in this folder."""
        kept_in = self.model_path.parent if self.model_path is not None else folder
        return kept_in != folder and kept_in.parent == self.folder / "annotations"

    def is_present(self, student: KeptStudent) -> bool:
        """Whether a kept student is the present one, which may have been saved in another place since."""
        if self.model is None:
            return False
        if self.model_path is not None and self.model_path.parent == student.path.parent:
            return bool(student.path == self.model_path)
        return bool(student.created == self.model.created)

    def save_model(self, path: Path) -> None:
        """Write the student. The session then refers to it by this file.

        Raises
        ------
        core.OutputError
        """
        self.model.save(path)
        if self.applied is not None and self.applied.model == self.model_path:
            self.applied = replace(self.applied, model=path)
        self.model_path = path

    def set_applied(self, applied: Applied) -> None:
        self.applied, self.counted = applied, None
        volume = self.volume
        is_here = volume is not None and (volume.layer, volume.lead) == (applied.volume.layer, applied.volume.lead)
        if self.annotations is not None and is_here and not applied.is_earlier:
            self.annotations.written = applied.out
        self.labels_changed.emit()

    def close(self) -> None:
        """End the session: stop the running job, and release the annotations and the model."""
        self.closed.emit()
        if self.annotations is not None:
            self.annotations.close()
        self.volume = self.annotations = self.model = None
        core.return_freed_memory()

    def _slices(self) -> list[tuple[int, Any]]:
        """Planes that are painted and the state of their files, for comparison."""
        return [(z, self.annotations.stamp(z)) for z in self.annotations.planes()] if self.annotations else []

    def _open_annotations(self, chosen: ChosenVolume) -> Annotations:
        self.first_window = user_of(self._folder(own_folder, chosen))
        return Annotations(self._folder(folder_for, chosen), chosen.shape, chosen.index, chosen.record)

    def _folder(self, find: Callable[..., Path], chosen: ChosenVolume) -> Path:
        """Folder of the annotations of a volume, as `own_folder` or `folder_for` finds it."""
        return find(self.folder / "annotations", chosen.first_name, chosen.identity, chosen.shape)
