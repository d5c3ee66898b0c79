"""Long jobs as generators that can be stopped. This module imports neither Qt nor napari; it loads torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

import distillfss_core as core
from napari_distillfss._annotations import (
    BACKGROUND,
    Annotations,
    from_classes,
    painted_from,
    write_planes,
    write_unlabeled,
)
from napari_distillfss._instant import InstantAnswers
from napari_distillfss._layers import volumes_over_time
from napari_distillfss._shapes import Outline
from napari_distillfss._students import Compared, KeptStudent, plane_of, read_student

THUMBNAIL = 48
_UNDOABLE = 32 << 20  # bytes of imported planes that had no labels, which can be undone
Span = tuple[int, int]
Replaced = tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
"""A plane whose labels were replaced, with its labels "y x" before and after."""

Work = Callable[[Event], Generator[Any, None, Any]]
"""Given the event that asks it to stop, yields its progress and returns what came of it."""


@dataclass(frozen=True)
class Doing:
    """Text for work that has no steps to count."""

    text: str


@dataclass(frozen=True)
class Noticed:
    """Why what a model says of a volume may be wrong, in one line; "" where nothing speaks against it."""

    text: str


@dataclass(frozen=True, eq=False)
class Written:
    """Labels on disk that can be shown from now on: zarr arrays (z, y, x), finest first, or what was made of them."""

    levels: Any


@dataclass(frozen=True)
class Batched:
    """A step of a batch: ``index`` of ``total`` volumes are over; ``row`` is the report's on the latest of them.

    ``error`` is what that volume has failed with, and ``output`` where its labels are.
    """

    index: int
    total: int
    stage: str
    row: Any = None
    error: Exception | None = None
    output: Path | None = None


@dataclass(frozen=True, eq=False)
class Distilled:
    """A new student with the paths of its file and its support (None if writing failed: ``error``)."""

    model: Any
    path: Path | None
    stopped: bool
    support: Path | None
    error: str = ""


@dataclass(frozen=True)
class Answering:
    """Which fit of the instant model gives the parts of a plane that follow, and of which classes.

    ``blank`` is what `iter_instant` was asked to make for these parts.
    """

    plane: int
    version: int
    class_names: tuple[str, ...]
    blank: Any = None


@dataclass(frozen=True)
class Unanswered:
    """Why the instant model can give nothing, in one line."""

    text: str


@dataclass(frozen=True, eq=False)
class PlanePart:
    """Output of a model for a part of a plane: ``where`` (y, x), labels "y x", probabilities "k+1 y x"."""

    plane: int
    where: tuple[slice, slice]
    labels: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.float32]
    uncertainty: npt.NDArray[np.float32]


def load_torch() -> None:
    """Load torch without blocking the window, and leave one core to the window.

    Importing torch opens its large libraries with Python's lock held, half a second and more. Opened before, by a plain
    call of C, which lets go of the lock, they are there already.
    """
    spec = None if "torch" in sys.modules or sys.platform == "win32" else importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        libraries = Path(spec.origin).parent / "lib"
        suffix = "dylib" if sys.platform == "darwin" else "so"
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        for name, mode in (("torch_global_deps", os.RTLD_GLOBAL), ("torch_cpu", 0), ("torch", 0)):  # as torch does
            path = libraries / f"lib{name}.{suffix}"
            if path.is_file():
                dlopen(os.fsencode(path), os.RTLD_NOW | mode)  # what fails here, torch says when it is imported
    core.leave_a_core_free()


def iter_device(stop: Event) -> Generator[Doing, None, str]:
    """Choose the device of this machine; loads torch."""
    yield Doing("looking for a GPU")
    load_torch()
    return str(core.choose_device())


def iter_training(
    make_support: Callable[[], core.SupportSet],
    settings: Any,
    start: Any,
    keep: Path,
    stop: Event,
    volume: core.Volume | None = None,
) -> Generator[Any, None, Distilled | None]:
    """Distill, or refine ``start``; save the student in ``keep`` and its slices in a folder beside it.

    Planes of ``volume`` that have no labels are learned from as well. Told to stop, it returns the best student so far,
    or None if there was no step yet. After all steps it yields the student, which is kept already; the overlap of tiles
    that it needs is measured then.
    """
    load_torch()
    yield Doing("reading the annotated slices")
    if stop.is_set():
        return None
    support = make_support()
    unlabeled: list[Any] = []
    if volume is not None:
        yield Doing("reading planes without labels")
        unlabeled = core.load_unlabeled(volume, support)
    yield Doing("loading the backbone")
    if stop.is_set():
        return None
    run = core.iter_distill(support, settings, init_from=start, unlabeled=unlabeled)
    begun = False
    for step in run:
        if stop.is_set() and not begun:  # one step makes no student
            run.close()
            return None
        begun = not step.is_preparation
        yield step
        if stop.is_set():
            run.close()
            break
    yield Doing("finishing")
    model = run.result(measure_halo=False)
    kept: Path | None = keep.with_suffix("")
    try:
        write_planes(keep.with_suffix(""), {s.source: (s.image, from_classes(s.labels)) for s in support.slices})
        if unlabeled:
            write_unlabeled(keep.with_suffix(""), unlabeled)
    except core.OutputError:  # only a script would need them
        kept = None
    made = _keep(model, keep, kept, is_stopped=stop.is_set())
    if made.stopped:
        return made
    yield made
    model = run.result()
    return made if stop.is_set() else _keep(model, keep, kept, is_stopped=False)


def _keep(model: Any, path: Path, support: Path | None, *, is_stopped: bool) -> Distilled:
    try:
        model.save(path)
    except core.OutputError as error:  # it can be saved elsewhere
        return Distilled(model, None, is_stopped, support, str(error))
    return Distilled(model, path, is_stopped, support)


def iter_until(run: core.Run[Any, Any], stop: Event) -> Generator[Any, None, Any]:
    """Iterate a run of the core to its end or until it is stopped. Returns its result, or None if it was stopped."""
    with closing(run):
        while True:
            try:
                step = next(run)
            except StopIteration as end:
                return end.value
            yield step
            if stop.is_set():
                return None


Seen = Callable[[list[Any]], Any]
"""Makes of levels what is shown; it may read the plane on screen."""


def iter_applying(
    volume: Any, model: Any, out: Path, stop: Event, *, see: Seen = list, **options: Any
) -> Generator[Any, None, Any]:
    """Segment a volume into OME-Zarr. Finished labels are kept when it is stopped. `Written` comes first and last."""
    yield Doing("preparing")
    resume = not options.get("overwrite")
    run = iter_until(core.iter_segment(volume, model, out, resume=resume, by_plane=True, **options), stop)
    written, paused = 0, False
    while True:
        try:
            step = next(run)
        except StopIteration as end:
            if end.value is not None:
                yield Written(see(open_levels(out)))
            return end.value
        if step.index == written:  # a plane of the next shard, or a part of the preparation
            if step.total and not written and not paused:
                paused = True
                yield Doing("segmenting the first piece")
            continue
        if not written:
            yield Written(see(open_levels(out)[:1]))
        written = step.index
        yield step


def iter_counting(
    labels: Any, out: Path, stop: Event, *, see: Seen = list, **options: Any
) -> Generator[Any, None, Any]:
    """Number and measure the objects of labels, a path or a `core.Volume`. `Written` comes last."""
    yield Doing("looking for objects")
    report = yield from iter_until(core.iter_instances(core.open_volume(labels), out, **options), stop)
    if report is not None:
        yield Written(see(open_levels(out)))
    return report


def iter_batching(
    plan: Callable[[], list[core.BatchJob]], model: Any, report: Path, stop: Event, **options: Any
) -> Generator[Any, None, list[dict[str, Any]] | None]:
    """Segment many volumes. Returns the rows of the report, or None if it was stopped; finished labels are kept."""
    yield Doing("listing the volumes")
    load_torch()
    run = iter_until(core.iter_batch(plan(), model, report, by_plane=True, **options), stop)
    while True:
        try:
            step = next(run)
        except StopIteration as end:
            rows: list[dict[str, Any]] | None = end.value
            return rows
        part = "" if step.shard is None or not step.shard.index else f", piece {step.shard.index} of {step.shard.total}"
        stage = f"{step.job.source.name}{part}"
        yield Batched(step.index - (step.row is None), step.total, stage, step.row, step.error, step.job.output)


def jobs_of_layers(
    layers: Sequence[Any], point: Sequence[float], out: Path, *, all_times: bool, replace_nan: float | None = None
) -> list[core.BatchJob]:
    """A job for each image layer, and for each of its time points; what cannot be segmented is a job with an error."""
    jobs: list[core.BatchJob] = []
    for layer in layers:
        stem = "".join(c if c.isalnum() or c in "-_ " else "_" for c in layer.name.partition(".")[0]).strip() or "layer"
        try:
            volumes = volumes_over_time(layer, point, all_times=all_times, replace_nan=replace_nan)
        except core.DistillFSSError as error:
            jobs.append(core.BatchJob(Path(layer.name), out / f"{stem}.ome.zarr", error=str(error)))
            continue
        for time, volume in volumes:
            end = "" if time is None else f"_t{time:0{len(str(len(volumes) - 1))}}"
            notes = {} if time is None else {"time": str(time)}
            taken, free, number = {job.output for job in jobs}, out / f"{stem}{end}.ome.zarr", 1
            while free in taken:
                number += 1
                free = out / f"{stem}-{number}{end}.ome.zarr"
            jobs.append(core.BatchJob(Path(layer.name), free, notes=notes, opened=volume))
    return jobs


class _StoppedError(Exception):
    """Writing was stopped."""


def iter_exporting(labels: Any, path: Path, stop: Event) -> Generator[Any, None, Path | None]:
    """Write labels, a path or a `core.Volume` (z, y, x), as TIFF. Returns None if it was stopped; nothing is left then.

    Of labels whose segmentation is not finished, the rest is background; a warning states it.

    Raises
    ------
    core.DistillFSSError
        If they cannot be written.
    """
    yield Doing(f"writing {path.name}")
    with labels if isinstance(labels, core.Volume) else core.open_volume(labels, labels=True) as volume:
        depth, height, width = volume.shape[:3]
        core.check_finished(volume.path, volume.name, (depth, height, width))

        def planes() -> Iterator[npt.NDArray[Any]]:
            for z in range(depth):
                if stop.is_set():
                    raise _StoppedError
                yield volume.plane(z)

        try:
            core.write_label_stack(
                path, planes(), (depth, height, width), volume.dtype, scale=volume.scale, unit=volume.unit
            )
        except _StoppedError:
            return None
    return path


def open_levels(path: Path) -> list[Any]:
    """Pyramid levels of labels on disk as zarr arrays (z, y, x), finest first."""
    names = sorted((p.name for p in path.iterdir() if p.name.isdigit()), key=int)
    return [zarr.open_array(path / name, mode="r") for name in names]


def iter_teacher(
    make_support: Callable[[], core.SupportSet], settings: Any, kind: str, stop: Event
) -> Generator[Any, None, Any]:
    """Make a teacher that needs no training, ``kind`` "dcama" or "prototype". Returns None if it was stopped."""
    load_torch()
    yield Doing("preparing the teacher on your slices")
    run = core.iter_unrefined_teacher(make_support(), settings, kind=kind)
    return (yield from iter_until(run, stop))


def iter_loading(path: Path, stop: Event) -> Generator[Doing, None, Any]:
    """Load the student of a file. Returns None if it was stopped."""
    load_torch()
    yield Doing(f"loading {path.name}")
    model = core.StudentModel.load(path)
    return None if stop.is_set() else model


def iter_students(paths: Sequence[Path], stop: Event) -> Generator[KeptStudent, None, None]:
    """Read the cards of kept students, one after the other."""
    load_torch()
    for path in paths:
        if stop.is_set():
            return
        yield read_student(path)


def iter_comparing(
    volume: Any,
    make_support: Callable[[], core.SupportSet],
    students: tuple[KeptStudent, KeptStudent],
    stop: Event,
) -> Generator[Any, None, Compared | None]:
    """Segment the annotated slices with two students and compare the results with the labels.

    Parameters
    ----------
    volume : core.Volume
    make_support : function
        Reads the annotated planes; where it raises an error, there is nothing to compare on.
    students : pair of KeptStudent

    Returns
    -------
    Compared or None
        None if it was stopped.
    """
    load_torch()
    yield Doing("reading the annotated slices")
    try:
        support = make_support()
    except core.SupportSetError as error:
        return Compared(reason=str(error))
    planes = [int(str(plane_of(s.source))) for s in support.slices]
    learned = {plane_of(name) for student in students for name in student.slices}
    unseen = tuple(z for z in planes if z not in learned)
    scores: list[tuple[Any, Any]] = []
    for number, student in enumerate(students):
        if stop.is_set():
            return None
        if tuple(student.card["classes"]) != tuple(support.class_names):
            scores.append((None, None))
            continue
        outputs = core.segment_lazy(volume, core.StudentModel.load(student.path))
        pairs: dict[int, tuple[Any, Any]] = {}
        for index, (z, labeled) in enumerate(zip(planes, support.slices, strict=True), 1):
            if stop.is_set():
                return None
            pairs[z] = outputs[z].compute(scheduler="synchronous"), labeled.labels
            yield core.TrainStep(number * len(planes) + index, 2 * len(planes), stage=f"segmenting with {student.name}")
        count = len(support.class_names)
        rest = core.evaluate([pairs[z] for z in unseen], count) if unseen else None
        scores.append((core.evaluate(pairs.values(), count), rest))
    (first, first_unseen), (second, second_unseen) = scores
    return Compared(tuple(planes), (first, second), unseen, (first_unseen, second_unseen))


def iter_plane(
    volume: Any,
    model: Any,
    z: int,
    on_screen: tuple[Span, Span],
    finished: Collection[tuple[int, int]],
    stop: Event,
    **tiling: int,
) -> Generator[PlanePart | Noticed, None, None]:
    """Segment the visible tiles of a plane, from the middle of the screen outwards.

    `Noticed` comes before the first tile of a plane.

    Parameters
    ----------
    on_screen : ((y0, y1), (x0, x1))
        Tiles that do not touch it are left out.
    finished : collection of (y, x)
        Where tiles begin that need not be computed again.
    **tiling
        ``tile``, as for `core.segment_lazy`.
    """
    if not finished:
        yield Noticed(core.compare_intensities(volume, model))
    outputs = core.segment_lazy(volume, model, what="probabilities", **tiling)
    for where in tiles_on_screen(outputs.chunks[2], outputs.chunks[3], on_screen):
        if stop.is_set():
            return
        if (where[0].start, where[1].start) in finished:
            continue
        probabilities = outputs[(slice(None), z, *where)].compute(scheduler="synchronous")
        segmentation = core.Segmentation.of(probabilities)
        yield PlanePart(z, where, segmentation.labels, probabilities, segmentation.uncertainty)


def iter_filled(arrays: Sequence[npt.NDArray[Any]], parts: Generator[Any, None, Any]) -> Generator[Any, None, Any]:
    """`fill` arrays, then iterate."""
    fill(arrays)
    return (yield from parts)


def fill(arrays: Iterable[npt.NDArray[Any]]) -> None:
    """Fill new arrays with 0: the window need not wait for their memory when it writes into them."""
    for array in arrays:
        array.fill(0)


def _nothing(_: int) -> None:
    """Makes nothing for the parts of a plane."""


def iter_instant(
    instant: InstantAnswers,
    z: int,
    on_screen: tuple[Span, Span],
    shown: tuple[int, Collection[tuple[int, int]]],
    *,
    refit: bool,
    stop: Event,
    make_blank: Callable[[int], Any] = _nothing,
) -> Generator[Doing | Answering | Unanswered | PlanePart | Noticed, None, None]:
    """Let the instant model follow the annotations, then segment the visible tiles of a plane as `iter_plane` does.

    Where it has learned from a few parts of the slices only, it then learns from the rest, and segments them again.

    Parameters
    ----------
    shown : (version, collection of (y, x))
        Where tiles of the plane begin that this version has computed.
    refit : bool
        Whether it follows the annotations; a model without a fit does so in any case.
    make_blank : function
        Given the number of classes, makes what the parts are to be written into, in this thread.
    """
    if not instant.is_fitted:
        yield Doing("preparing the instant model on your slices")
        load_torch()
    if refit or not instant.is_fitted:
        try:
            instant.follow(stop)
        except core.SupportSetError as error:
            yield Unanswered(str(error))
            return
    while not stop.is_set():
        model = instant.model
        yield Answering(z, instant.version, model.class_names, make_blank(len(model.class_names)))
        finished = shown[1] if shown[0] == instant.version else ()
        for part in iter_plane(instant.volume, model, z, on_screen, finished, stop, tile=model.tile):
            yield Noticed("; ".join(filter(None, (part.text, instant.left_out)))) if isinstance(part, Noticed) else part
        if not instant.is_behind or stop.is_set():
            return
        yield Doing(f"Preview of plane {z}: a first answer; learning from the rest of the slices")
        instant.learn_rest(stop)
        make_blank = _nothing  # the plane has been made


def tiles_on_screen(
    rows: Sequence[int], columns: Sequence[int], on_screen: tuple[Span, Span]
) -> list[tuple[slice, slice]]:
    """Tiles (of these heights and widths) that intersect the screen, nearest to its middle first."""
    middle = [sum(span) / 2 for span in on_screen]
    tiles = [
        (y, x)
        for y in _cut(rows)
        for x in _cut(columns)
        if all(t.start < s[1] and s[0] < t.stop for t, s in zip((y, x), on_screen, strict=True))
    ]
    return sorted(tiles, key=lambda t: sum(((s.start + s.stop) / 2 - m) ** 2 for s, m in zip(t, middle, strict=True)))


def iter_different(volume: Any, count: int, taken: Collection[int], stop: Event) -> Generator[Any, None, Any]:
    """Choose the planes that differ most from one another and from the painted ones. Returns None if it was stopped."""
    return (yield from iter_until(core.iter_diverse_planes(volume, count, taken=taken), stop))


def iter_disputed(
    volume: Any, make_support: Callable[[], core.SupportSet], count: int, taken: Collection[int], stop: Event
) -> Generator[Any, None, Any]:
    """Choose the planes on which two models of the annotations disagree most. Returns None if it was stopped."""
    return (yield from iter_until(core.iter_disputed_planes(volume, make_support(), count, taken=taken), stop))


def iter_least_sure(
    volume: Any, model: Any, planes: Sequence[int], count: int, stop: Event
) -> Generator[core.TrainStep, None, list[int]]:
    """Choose at most ``count`` planes with the largest mean uncertainty of a model, ascending."""
    outputs = core.segment_lazy(volume, model, what="uncertainty")
    doubt: dict[int, float] = {}
    for index, z in enumerate(planes, 1):
        if stop.is_set():
            break
        doubt[z] = float(outputs[z].mean().compute(scheduler="synchronous"))
        yield core.TrainStep(index, len(planes), stage="looking")
    return sorted(sorted(doubt, key=lambda z: -doubt[z])[:count])


def _cut(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def iter_import(
    annotations: Annotations,
    source: Any,
    shape: tuple[int, int, int],
    z: int,
    kind: str,
    stop: Event,
) -> Generator[core.TrainStep, None, list[Replaced]]:
    """Import planes of labels in place of the painted labels; planes without a label are not changed.

    Where one of the planes does not fit, no plane is changed.

    Parameters
    ----------
    source : path or core.Volume
        Labels of the whole volume, or of one plane, which is then plane ``z``.
    shape : (z, y, x)
        Of the volume.
    kind : {"masks", "classes", "scribbles"}
        0 is background and any other number the first class; or numbers are classes; or 0 is not labeled, 1 is
        background and 2, 3, ... are classes.

    Returns
    -------
    list of (plane, before, after)
        The planes taken over, with their labels "y x" as painted. Where nothing was painted ``before`` is one zero,
        "1 1". Beyond 32 MB of such planes ``after`` is so, too: a whole volume can be imported.

    Raises
    ------
    core.DistillFSSError
        If sizes or numbers do not fit.
    """
    taken = _Taken(annotations)
    with core.open_volume(source) as labels:
        name = source.name
        is_single = labels.shape[0] == 1
        if labels.ndim != 3 or labels.shape[1:] != shape[1:] or not (is_single or labels.shape[0] == shape[0]):
            raise core.ImageError(
                f"{name}: is {labels.shape}, the volume {shape} (z y x); give labels of the same size, or of one "
                "of its planes"
            )
        try:
            for row in range(labels.shape[0]):
                numbers = labels.plane(row)
                if numbers.any():
                    painted = painted_from(numbers, kind, len(annotations.classes), f"{name} plane {row}")
                    taken.replace(z if is_single else row, painted)
                if stop.is_set():
                    break
                yield core.TrainStep(row + 1, labels.shape[0], stage="importing")
        except core.DistillFSSError:
            for plane, before, _ in taken.planes:
                annotations.put(plane, np.broadcast_to(before, shape[1:]))
            raise
    if not taken.planes:
        raise core.SupportSetError(f"{name}: holds no label; nothing was taken over")
    return taken.planes


class _Taken:
    """Planes of annotations that were taken over, as `iter_import` returns them."""

    def __init__(self, annotations: Annotations) -> None:
        self.planes: list[Replaced] = []
        self._annotations, self._held = annotations, 0  # bytes of planes where nothing was painted

    def replace(self, z: int, painted: npt.NDArray[np.uint8]) -> None:
        """Replace the labels of a plane."""
        before, nothing = self._annotations.plane(z), np.zeros((1, 1), np.uint8)
        self._annotations.put(z, painted)
        try:
            self._annotations.save()
        except core.OutputError:
            self._annotations.put(z, before)
            raise
        if before.any():
            self.planes.append((z, before, painted))
            return
        self._held += painted.nbytes
        self.planes.append((z, nothing, painted if self._held <= _UNDOABLE else nothing))


def iter_drawing(
    annotations: Annotations, outlines: Sequence[Outline], kind: str, stop: Event
) -> Generator[core.TrainStep, None, list[Replaced]]:
    """Import shapes; see `iter_import` for the result.

    Parameters
    ----------
    outlines : sequence of Outline
        The later are drawn over the earlier.
    kind : {"masks", "classes", "scribbles"}
        Where no shape is, planes with a shape are background; or, for scribbles, stay as they are painted.
    """
    planes = sorted({outline.plane for outline in outlines})
    taken = _Taken(annotations)
    for index, z in enumerate(planes, 1):
        before = annotations.plane(z)
        painted = before.copy() if kind == "scribbles" else np.full_like(before, BACKGROUND)
        for outline in outlines:
            if outline.plane == z:
                painted[outline.pixels(before.shape)] = outline.label
        taken.replace(z, painted)
        if stop.is_set():
            break
        yield core.TrainStep(index, len(planes), stage="importing")
    return taken.planes


def iter_thumbnails(
    wanted: Mapping[str, tuple[Callable[[], Any], Sequence[int]]], stop: Event
) -> Generator[tuple[tuple[str, int], npt.NDArray[np.uint8] | None], None, None]:
    """Make thumbnails of planes, see `thumbnail`; None for planes that cannot be read.

    Parameters
    ----------
    wanted : mapping
        Under a key for each volume, a function that opens it, and the planes.
    """
    for key, (open_, planes) in wanted.items():
        volume: Any = None
        with suppress(core.DistillFSSError):  # another volume may be gone
            volume = open_()
        for z in planes:
            if stop.is_set():
                return
            picture = None
            with suppress(core.DistillFSSError):
                picture = None if volume is None else thumbnail(volume.plane(z))
            yield (key, z), picture


def thumbnail(plane: npt.NDArray[Any], side: int = THUMBNAIL) -> npt.NDArray[np.uint8]:
    """A plane "y x" or "y x c" as a gray image of "side side" pixels, scaled to its own range."""
    small = pick(plane, side).astype(np.float32)
    small = small.mean(-1) if small.ndim == 3 else small
    low, high = np.nanpercentile(small, (1, 99))
    stretched: npt.NDArray[np.float32] = np.clip((np.nan_to_num(small) - low) / max(high - low, 1e-6), 0, 1)
    return (stretched * 255).astype(np.uint8)


def pick(plane: npt.NDArray[Any], side: int = THUMBNAIL) -> npt.NDArray[Any]:
    """Every n-th row and column, "side side"."""
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n in plane.shape[:2])
    result: npt.NDArray[Any] = plane[rows][:, columns]
    return result
