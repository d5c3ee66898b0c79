"""Annotations on disk: a zarr array that a Labels layer paints into, so that no stroke is lost.

A stroke is on disk when it is drawn. The same volume finds its annotations again, after a crash too. In the array 0 is
not labeled, 1 is background, 2, 3, ... are the classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import tifffile

import distillfss_core as core
from napari_distillfss._painted import PaintedArray

UNLABELED, BACKGROUND, FIRST_CLASS = 0, 1, 2
UNLABELED_IMAGES = "unlabeled"
"""Folder of images without labels, beside those of the annotated ones."""
COLORS = tuple("#{:02x}{:02x}{:02x}".format(*color) for color in core.CLASS_COLORS)
BACKGROUND_COLOR = "#a6bfff"
KINDS = ("masks", "classes", "scribbles")
NOTES = "notes.json"
_COUNTS = "counts.json"
_FEW = 16  # labels up to which a plane is compared with each of them
_DIGITS = 12  # of the digest of a volume, in the name of its folder
_APART = re.compile(r"(-\d+)?(\.old\d+)?")  # what the names of other annotations of a volume end in
_OTHER = re.compile(rf"(.*-[0-9a-f]{{{_DIGITS}}}){_APART.pattern}$")
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Class:
    """A class to segment: its name and the color of its label ("#rrggbb")."""

    name: str
    color: str


def model_classes(names: Sequence[str], classes: Sequence[Class]) -> tuple[Class, ...]:
    """Classes of a model in the colors of the painted classes of the same name, or else of the same number."""
    of_name = {c.name: c.color for c in classes}
    numbered = [c.color for c in classes] + list(COLORS)
    return tuple(Class(name, of_name.get(name, numbered[k % len(numbered)])) for k, name in enumerate(names))


@dataclass(frozen=True, eq=False)
class PaintedSlice:
    """Number of painted pixels in a plane for every label (0 not labeled, 1 background, 2.. classes)."""

    plane: int
    counts: npt.NDArray[np.int64]
    enabled: bool

    @property
    def annotated(self) -> float:
        """Share of the plane that is labeled."""
        return float(self.counts[1:].sum() / self.counts.sum())

    def share(self, label: int) -> float:
        """Share of the labeled pixels that have a label."""
        return float(self.counts[label] / max(1, self.counts[1:].sum()))


class PaintedLabels:
    """Painted planes of a volume in a folder, to be read.

    Parameters
    ----------
    folder : path
    array : array
        Of the labels, with as many axes as the image layer.
    index : function
        From the number of a plane to its index in the array: `ChosenVolume.index`.
    """

    def __init__(self, folder: Path, array: Any, index: Callable[[int], tuple[Any, ...]]) -> None:
        self.folder, self.array, self.index = folder, array, index
        self.notes: Mapping[str, Any] = read_notes(folder)
        classes = self.notes.get("classes", [{"name": "object", "color": COLORS[0]}])
        self._classes = tuple(
            Class(c["name"], c.get("color") or c["colour"]) for c in classes
        )  # as older files have it
        self._disabled: set[int] = set(self.notes.get("disabled", []))
        self._counts = _read_counts(folder)

    @property
    def classes(self) -> tuple[Class, ...]:
        return self._classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self._classes)

    def planes(self) -> list[int]:
        """Numbers of the painted planes, ascending."""
        self._flush()
        index = self.index(1)
        numbers = {0}
        if 1 in index:  # where the axes have a z
            parts = (f.relative_to(self._chunks).parts for f in self._chunks.glob("/".join("*" * len(index))))
            places = [*(tuple(map(int, part)) for part in parts), *self._in_memory_only()]
            numbers = {place[index.index(1)] for place in places}
        return [z for z in sorted(numbers) if self.counts(z)[1:].any()]

    def plane(self, z: int) -> npt.NDArray[np.uint8]:
        """Painted labels of a plane, shape (y, x)."""
        return np.asarray(self.array[(*self.index(z), slice(None), slice(None))])

    def counts(self, z: int) -> npt.NDArray[np.int64]:
        """Number of pixels of each of the 256 labels; counted again only where files have changed."""
        stamp = self.stamp(z)
        if z not in self._counts or self._counts[z][0] != stamp:
            self._counts[z] = stamp, _count(self.plane(z))
        return self._counts[z][1]

    def slices(self) -> list[PaintedSlice]:
        return [PaintedSlice(z, self.counts(z), z not in self._disabled) for z in self.planes()]

    def enabled(self) -> list[int]:
        """Numbers of the painted planes that are part of the support, ascending."""
        return [z for z in self.planes() if z not in self._disabled]

    def stamp(self, z: int) -> _Stamp:
        """Times of the files that hold a plane, and how often it was changed since in memory only."""
        self._flush()
        changes = self._in_memory_only().get(self.index(z))
        folder = self._chunks.joinpath(*map(str, self.index(z)))
        files = sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
        stats = [os.stat(file) for file in files]
        times = tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in stats)
        return times if changes is None else (*times, (changes, 0, 0))

    @property
    def _chunks(self) -> Path:
        return self.folder / "labels.zarr" / "c"  # a chunk without labels has no file

    def _flush(self) -> None:
        """Write what is in memory only, if that is possible."""

    def _in_memory_only(self) -> Mapping[tuple[int, ...], int]:
        """Indices of the planes that are not on disk as they are here, and how often each was changed."""
        return {}


class Annotations(PaintedLabels):
    """Painted planes of a volume in a folder, to be changed.

    Parameters
    ----------
    folder : path
        Made if it is not there; what is in it is taken up.
    shape : tuple of int
        Of the array, with as many axes as the image layer.
    index : function
        As for `PaintedLabels`.
    volume : mapping, optional
        What is needed to find the volume again, see `ChosenVolume.record`; JSON-able.
    """

    array: PaintedArray

    def __init__(
        self,
        folder: Path,
        shape: Sequence[int],
        index: Callable[[int], tuple[Any, ...]],
        volume: Mapping[str, Any] | None = None,
    ) -> None:
        self._notes_path = folder / NOTES
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "owner").write_text(_process(os.getpid()))
            array = PaintedArray(folder / "labels.zarr", tuple(shape), self._write_notes)
        except OSError as error:
            raise core.OutputError(
                f"annotations cannot be kept in {folder}: {error.strerror or error}; make room or let it be written, "
                "and choose the volume again (a model can be applied without)"
            ) from error
        super().__init__(folder, array, index)
        left = _unwritten.pop(folder, None)
        if left is not None:
            array.take_over(left)
        self._volume = volume
        self._also: tuple[str, ...] = tuple(name for name in self.notes.get("also", ()) if name != folder.name)
        self._declined: set[str] = set(self.notes.get("declined", ()))  # unticked by the user
        self._left_out: dict[str, frozenset[int]] = {
            name: frozenset(planes) for name, planes in self.notes.get("left_out", {}).items()
        }
        self._written: str | None = self.notes.get("written")
        if self._notes_path.is_file() and volume is not None and self.notes.get("volume") != volume:
            self._write_notes()

    @PaintedLabels.classes.setter  # type: ignore[attr-defined, untyped-decorator]
    def classes(self, classes: Sequence[Class]) -> None:
        self._classes = tuple(classes)
        self._write_notes()

    @property
    def also(self) -> tuple[str, ...]:
        """Names of the folders of other volumes whose slices are part of the support."""
        return self._also

    @also.setter
    def also(self, names: Sequence[str]) -> None:
        self._declined = (self._declined | set(self._also)) - set(names)
        self._also = tuple(names)
        self._write_notes()

    @property
    def written(self) -> Path | None:
        """Where the latest labels of the volume were written."""
        return Path(self._written) if self._written else None

    @written.setter
    def written(self, path: Path) -> None:
        self._written = str(path)
        if not self._is_new:
            self._write_notes()

    def left_out(self, name: str) -> frozenset[int]:
        """Planes of another volume, by the name of its folder, that are not part of the support."""
        return self._left_out.get(name, frozenset())

    def leave_out(self, name: str, z: int, out: bool = True) -> None:
        """Whether a plane of another volume is left out of the support."""
        planes = self.left_out(name)
        self._left_out[name] = planes | {z} if out else planes - {z}
        self._write_notes()

    def take_over(self, earlier: Annotations) -> None:
        """Take the classes of another time point or channel of the image, unless those here are others.

        They are on disk once something is painted.
        """
        is_new = self._is_new
        if is_new or self.class_names == earlier.class_names[: len(self._classes)]:
            self._classes = earlier.classes
            if not is_new:
                self._write_notes()

    def take_over_slices(self, earlier: Annotations) -> None:
        """Use the slices of an earlier time point, and those used there; on disk once something is painted.

        What the user has unticked, here or there, stays unticked.
        """
        names = (earlier.folder.name, *earlier.also) if earlier.enabled() else earlier.also
        declined = self._declined | (earlier._declined - set(self._also))
        unwanted = {*declined, self.folder.name}
        wanted = (*self._also, *(name for name in names if name not in self._also and name not in unwanted))
        if (wanted, declined) != (self._also, self._declined):
            self._left_out |= {name: earlier.left_out(name) for name in wanted if name not in self._also}
            self._also, self._declined = wanted, declined
            if not self._is_new:
                self._write_notes()

    def enable(self, z: int, on: bool = True) -> None:
        """Whether a painted plane is part of the support."""
        (self._disabled.discard if on else self._disabled.add)(z)
        self._write_notes()

    def put(self, z: int, labels: npt.NDArray[np.uint8]) -> None:
        """Replace the painted labels of a plane. What cannot be written stays in memory; `save` says it."""
        with suppress(core.OutputError):
            self.array[self.index(z)] = labels
        self._flush()

    def remove(self, z: int) -> None:
        """Remove the painted labels of a plane."""
        self.put(z, np.zeros(self.array.shape[-2:], np.uint8))
        self.enable(z)

    def close(self) -> None:
        """Release the folder for other processes; a folder without annotations is removed.

        Labels that cannot be written stay in memory for the next annotations of this folder, see `unwritten`.
        """
        self._flush()
        if self.array.in_memory_only:
            _unwritten[self.folder] = self.array
        self.array.is_written_later = False  # a layer that is left in napari may still be painted into
        self._keep_counts()
        (self.folder / "owner").unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()

    @property
    def _is_new(self) -> bool:
        return not self.array.is_on_disk and not self._notes_path.is_file()

    def _keep_counts(self) -> None:
        """Keep the counts of the planes on disk, so that they are not read again when the volume is opened."""
        with suppress(OSError):
            kept = {
                z: [stamp, counts.tolist()]
                for z, (stamp, counts) in self._counts.items()
                if counts[1:].any() and stamp == self.stamp(z)
            }
            if kept:
                write_json(self.folder / _COUNTS, kept)
            else:
                (self.folder / _COUNTS).unlink(missing_ok=True)

    def save(self) -> None:
        """Write what is in memory only.

        Raises
        ------
        core.OutputError
            If that is not possible; it is still in memory.
        """
        self.array.write()
        if self.folder in _late_notes:
            self._write_notes()
        if self.folder in _late_notes:
            raise core.OutputError(f"cannot write {self._notes_path}; make room or let it be written")

    def _flush(self) -> None:
        with suppress(core.OutputError):
            self.save()

    def _in_memory_only(self) -> Mapping[tuple[int, ...], int]:
        return self.array.in_memory_only

    def _write_notes(self) -> None:
        notes = {
            "classes": [asdict(c) for c in self._classes],
            "disabled": sorted(self._disabled),
            "also": list(self._also),
            "declined": sorted(self._declined),
            "left_out": {name: sorted(planes) for name, planes in self._left_out.items() if planes},
            "written": self._written,
            "volume": self._volume,
        }
        try:
            write_json(self._notes_path, notes)
            _late_notes.pop(self.folder, None)
        except OSError:  # tried again with the labels; `save` says it
            _late_notes[self.folder] = notes


def _count(plane: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Number of pixels of each of the 256 labels; label by label where they are few, which is quicker."""
    highest = int(plane.max(initial=0))
    if highest >= _FEW:
        return np.bincount(plane.ravel(), minlength=256)
    counts = np.zeros(256, np.int64)
    counts[: highest + 1] = [np.count_nonzero(plane == label) for label in range(highest + 1)]
    return counts


def _read_counts(folder: Path) -> dict[int, tuple[_Stamp, npt.NDArray[np.int64]]]:
    """Counts that an earlier session has kept; they hold where the files of a plane are the same."""
    with suppress(OSError, ValueError, TypeError, AttributeError):  # another program has written it
        kept = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
        return {
            int(z): (tuple(tuple(file) for file in stamp), np.array(counts, np.int64).reshape(256))
            for z, (stamp, counts) in kept.items()
        }
    return {}


_unwritten: dict[Path, PaintedArray] = {}
_late_notes: dict[Path, Mapping[str, Any]] = {}  # that could not be written, by folder


def unwritten() -> list[Path]:
    """Folders of annotations that were closed while some of their labels could not be written."""
    return list(_unwritten)


def read_notes(folder: Path) -> Mapping[str, Any]:
    """Classes, disabled planes and volume of a folder of annotations; empty where none were written."""
    if folder in _late_notes:
        return _late_notes[folder]
    path = folder / NOTES
    notes: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return notes


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all; errors are those of the system."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def read_slice(volume: Any, labels: PaintedLabels, z: int, name: str) -> core.AnnotatedSlice:
    """A painted plane with its image, under a name."""
    return core.AnnotatedSlice(volume.plane(z), to_classes(labels.plane(z)), name)


def file_of(name: str) -> str:
    """File of a slice, from its name: "plane 3" is plane_0003.tif, "b.tif, plane 3" is b.tif_plane_0003.tif."""
    head, _, number = name.rpartition("plane ")
    safe = "".join(c if c.isalnum() or c in "-." else "_" for c in head.removesuffix(", "))
    return f"{safe}{'_' if safe else ''}plane_{int(number):04d}.tif"


def write_planes(folder: Path, planes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Write images and painted labels of slices, by their names, as images/plane_0012.tif and labels/plane_0012.tif.

    Files of other planes that an earlier call left are removed.

    Raises
    ------
    core.OutputError
    """
    written = []
    try:
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for old in (folder / name).glob("*plane_*.tif"):
                old.unlink()
        for name, (image, labels) in planes.items():
            file = file_of(name)
            _write_image(folder / "images" / file, image)
            core.write_labels(folder / "labels" / file, labels)
            written += [str(folder / "images" / file), str(folder / "labels" / file)]
    except OSError as error:
        raise core.OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    return written


def write_unlabeled(folder: Path, images: Sequence[core.UnlabeledImage]) -> None:
    """Write images without labels as unlabeled/plane_0000.tif and so on; of windows, without samples of their planes.

    Raises
    ------
    core.OutputError
    """
    try:
        (folder / UNLABELED_IMAGES).mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            _write_image(folder / UNLABELED_IMAGES / file_of(f"plane {index}"), image.pixels)
    except OSError as error:
        raise core.OutputError(f"cannot write {folder}: {error.strerror or error}") from error


def _write_image(path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(path, image, photometric="rgb" if image.ndim == 3 and image.shape[-1] in (3, 4) else "minisblack")


def to_classes(painted: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Convert painted labels to labels of the core: 0 background, 1.. classes, IGNORE not annotated."""
    return np.where(painted == UNLABELED, core.IGNORE, painted - np.uint8(1)).astype(np.uint8)


def from_classes(labels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Convert labels of the core to painted labels."""
    return np.where(labels == core.IGNORE, UNLABELED, labels.astype(np.int64) + 1).astype(np.uint8)


def folder_for(root: Path, name: str, identity: Mapping[str, Any], shape: Sequence[int]) -> Path:
    """Folder of the annotations of a volume. The same volume has the same folder, unless another process uses it."""
    own = own_folder(root, name, identity, shape)
    folder, number = own, 1
    while user_of(folder) is not None:
        number += 1
        folder = own.with_name(f"{own.name}-{number}")
    return folder


def own_folder(root: Path, name: str, identity: Mapping[str, Any], shape: Sequence[int]) -> Path:
    """Folder of the annotations of a volume where no other process uses it."""
    identity_text = json.dumps([name, dict(identity), list(shape)], sort_keys=True, default=str)
    digest = hashlib.sha256(identity_text.encode()).hexdigest()[:_DIGITS]
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:40]
    return root / f"{stem}-{digest}"


def own_name(name: str) -> str:
    """Name of the folder of the annotations of a volume where no other process uses it, from that of any of them."""
    return _OTHER.sub(r"\1", name)


def kept_apart(own: Path, present: Path) -> list[Path]:
    """Folders of other annotations of a volume, the latest first; empty ones are left out, and those in use.

    `set_aside` has renamed them, or a second window has made them.

    Parameters
    ----------
    own, present : path
        Folder of the annotations of the volume where no other process uses it, and the one that is open.
    """
    apart = [p for p in own.parent.glob(f"{own.name}*") if p != present and _APART.fullmatch(p.name[len(own.name) :])]
    with_labels = [p for p in apart if any(f.is_file() for f in p.glob("labels.zarr/c/**/*"))]
    free = [p for p in with_labels if user_of(p) is None]
    return sorted(free, key=lambda p: p.stat().st_mtime_ns, reverse=True)


def is_set_aside(folder: Path) -> bool:
    """Whether `set_aside` has renamed a folder; a second window has made the others that are kept apart."""
    return bool(re.search(r"\.old\d+$", folder.name))


def move_annotations(folder: Path, target: Path) -> None:
    """Move a folder of annotations that are closed, with what of them is in memory only."""
    shutil.move(folder, target)
    if folder in _unwritten:
        _unwritten[target] = _unwritten.pop(folder)


def set_aside(folder: Path) -> Path:
    """Rename a folder of annotations, so that the volume starts without any. Nothing is deleted. Returns the new
    path.
    """
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    move_annotations(folder, aside)
    return aside


def _process(pid: int) -> str:
    """One-line identity of a running process: host, process number and start time."""
    with suppress(psutil.Error):
        return f"{pid} {psutil.Process(pid).create_time():.2f} {platform.node()}"
    return ""


@dataclass(frozen=True)
class User:
    """The process that uses a folder of annotations: its number, and since when."""

    pid: int
    since: datetime


def user_of(folder: Path) -> User | None:
    """The process of this machine that holds a folder. A process of another machine counts as ended."""
    owner = folder / "owner"
    line = owner.read_text() if owner.is_file() else ""
    pid = line.partition(" ")[0]
    if not pid.isdecimal() or line != _process(int(pid)):
        return None
    return User(int(pid), datetime.fromtimestamp(owner.stat().st_mtime).astimezone())


def painted_from(numbers: npt.NDArray[Any], kind: str, classes: int, source: str) -> npt.NDArray[np.uint8]:
    """Convert the values of a label file to painted labels; see `iter_import` for the kinds.

    Raises
    ------
    core.ImageError
        If they are no integers, or a number stands for no class.
    """
    if numbers.dtype.kind not in "bui":
        raise core.ImageError(f"{source}: holds {numbers.dtype}, no labels; give a file of whole numbers")
    if kind == "masks":
        return np.where(numbers != 0, FIRST_CLASS, BACKGROUND).astype(np.uint8)
    limit = classes if kind == "classes" else classes + 1
    if int(numbers.max()) > limit or int(numbers.min()) < 0:
        raise core.ImageError(
            f"{source}: holds the label {int(numbers.max())}, but {limit} is the largest that {classes} classes make; "
            "add classes first, or import it as masks"
        )
    return (numbers.astype(np.uint8) + (kind == "classes")).astype(np.uint8)
