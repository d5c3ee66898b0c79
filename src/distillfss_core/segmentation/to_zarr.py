"""Segmentation of a volume into OME-Zarr, with concurrent readers, inference and writer; it can always resume.

::

    reader threads          this thread            writer threads
    read block n + 2        infer block n          write shard n - 1, force to disk, note in the journal

A block is what a shard of labels needs: its voxels and their surroundings, of all its planes. A shard that the
journal does not list is computed again, so every shard that it lists is whole.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distillfss_core import __version__
from distillfss_core.errors import SettingsError, printable
from distillfss_core.labelstore.journal import read_header
from distillfss_core.labelstore.layout import Box, Index, Part, box_within, check_shards, check_size, overlap
from distillfss_core.labelstore.metadata import Description, image_of
from distillfss_core.labelstore.store import JOURNAL, LabelStore, check_apart, check_choice, remove_labels
from distillfss_core.models.engines import describe_engine
from distillfss_core.models.segmenter import TILE, Segmenter
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.device import Device
from distillfss_core.process import return_large_buffers
from distillfss_core.segmentation.cluster import Connection, connect, iter_shards
from distillfss_core.segmentation.modes import PlanewiseLabels, make_mode
from distillfss_core.types import Array, GeneratorRun, Result, as_run, finish
from distillfss_core.volumes.volume import Volume

log: logging.Logger = logging.getLogger(__name__)

WORTH = 1 << 28
"""Zoomed pixels of a run before which engines are timed, which takes some seconds."""
READERS, WRITERS = 2, 1
"""Threads beside the one that computes: on a CPU no more, since they take its cores."""


@dataclass(frozen=True)
class ShardDone:
    """A step of the work.

    Parameters
    ----------
    index, total : int
        Shards done (1..total), those finished before included, and shards in all, coarser levels included. Both are 0
        during the preparation.
    level : int
        0 is segmenting, 1.. is the pyramid.
    computed : bool
        False for the first step of a run that goes on: so much was there already.
    seconds : float
        Since the start of this run.
    eta : float
        Seconds left, estimated from those shards that this run computed; NaN before there is one.
    """

    index: int
    total: int
    level: int
    computed: bool
    seconds: float
    eta: float


@dataclass(frozen=True)
class VolumeReport:
    """Result of a run: folder of the labels, shards computed, shards finished before, missing chunks, seconds.

    ``warning`` names in one line why labels may be wrong (intensities unlike those of the support, directions that
    contradict one another), else it is "". ``engine`` is what ran the network, with its version and precision.
    """

    path: Path
    computed: int
    finished: int
    missing_chunks: int
    seconds: float
    warning: str = ""
    engine: str = ""


def segment_to_zarr(
    volume: Volume,
    model: StudentModel,
    out: str | Path,
    *,
    region: Part | None = None,
    resume: bool = False,
    overwrite: bool = False,
    mode: str = "planewise",
    tile: int | None = None,
    cluster: str | Connection | None = None,
) -> VolumeReport:
    """Segment a volume into OME-Zarr 0.5 labels; `iter_segment` without the steps between.

    Parameters, result and errors are those of `iter_segment`.
    """
    run = iter_segment(
        volume,
        model,
        out,
        region=region,
        resume=resume,
        overwrite=overwrite,
        mode=mode,
        tile=tile,
        cluster=cluster,
    )
    return finish(run)


@as_run
def iter_segment(
    volume: Volume,
    model: StudentModel,
    out: str | Path,
    *,
    region: Part | None = None,
    resume: bool = False,
    overwrite: bool = False,
    mode: str = "planewise",
    tile: int | None = None,
    cluster: str | Connection | None = None,
    by_plane: bool = False,
) -> Generator[ShardDone, None, VolumeReport]:
    """Segment a volume into OME-Zarr 0.5 labels, shard by shard.

    Leave it, close it, kill the process, cut the power: with the same arguments and ``resume=True`` it goes on where it
    was, and the result is bit for bit that of a run that was never stopped (on the same machine: its processor's and
    libraries' rounding is not recorded; the number of threads and the engine are, and are taken again).

    Parameters
    ----------
    volume : Volume
    model : StudentModel
    out : path
        A folder of its own ("labels.ome.zarr"), or IMAGE.zarr/labels/NAME inside an OME-Zarr 0.5 image.
    region : ((z0, z1), (y0, y1), (x0, x1)), optional
        Voxels to segment, by default all; None is where the volume begins or ends. The labels always have the volume's
        size: the rest stays 0, and can be segmented later by another run with ``resume=True``.
    resume : bool
        Go on with what another run began; begin if there is none. False, the default, raises where labels are.
    overwrite : bool
        Begin anew in place of labels that were written from here; not with ``resume``.
    mode : {"planewise", "smoothed", "consensus"}
        Each plane on its own; with its neighbors along z; or the mean of planes in three directions, where voxels are
        about as long as wide (some ten times slower). See `modes`.
    tile : int, optional
        Inner side of a tile in pixels after zooming, by default that with which labels were begun, or the best
        (`Segmenter.best_tile`; 1024 in mode smoothed).
    cluster : str or Connection, optional
        Workers that segment the shards, as for `cluster.connect`; they load the model anew, on what devices they have.
        By default this process does it, on the device of ``model``.
    by_plane : bool
        Give a step after each plane of a shard as well, with the index of the step before, and during the preparation:
        the run can be closed there. Shards of a cluster, and those that a GPU computes whole, have no such steps.

    Yields
    ------
    ShardDone

    Returns
    -------
    VolumeReport

    Warns
    -----
    IntensityWarning
        If intensities are unlike those that the student learned, so that labels may be wrong.
    ConsensusWarning
        If planes of different directions contradict one another. They are compared before the first shard of a region.

    Raises
    ------
    SettingsError
        If the region is not in the volume, ``resume`` and ``overwrite`` are both given, or the output was begun with
        another model, volume or settings, or by an engine that is not installed.
    OutputError
        If it cannot be written (disk full, ...): what is finished is kept. If it would lie where the volume does.
    InputFileError, ImageError
        If the volume is damaged, has other channels than the model, or is not finite somewhere.
    """
    clock = _Clock(time.monotonic())
    check_choice(resume=resume, overwrite=overwrite)
    return_large_buffers()
    wanted = check_region(volume, region)
    check_size(wanted, volume.shape, volume.name)
    begun = read_header(Path(out) / JOURNAL).get("settings", {}) if resume and not overwrite else {}
    tile = tile or begun.get("tile")
    mode_labels = make_mode(mode, volume, model, tile)
    check_shards(mode_labels.layout(None), wanted, volume.name)
    out, missing = Path(out), set[str]()
    check_apart(out, volume.path)
    if cluster is None:
        model, mode_labels = yield from _paused(_iter_fastest(model, mode_labels, wanted, begun, tile), clock, by_plane)
    with ExitStack() as stack:
        workers = stack.enter_context(connect(cluster)) if isinstance(cluster, str) else cluster
        if workers and volume.location is None:
            raise SettingsError("a cluster reads volumes from files; this one is an array in memory, so save it first")
        device = workers.worker_device() if workers else f"{model.device.kind} {model.device.precision}"
        engine = model.engine if device.startswith("cpu") or model.engine == "torch-compiled" else "torch"
        notes = {"threads": 1 if workers else torch.get_num_threads(), "engine": describe_engine(engine)}
        if overwrite:
            remove_labels(out)
        store = open_store(mode_labels, model, out, device=device, notes=notes, resume=resume)
        stack.callback(store.close if workers else store.leave)  # a worker may still be writing
        if (begun_with := _engine_of(store, engine)) != engine:
            engine, model = begun_with, _run_by(begun_with, model, store)
            mode_labels = make_mode(mode, volume, model, tile)
        warning = yield from _paused(_iter_match(mode_labels), clock, by_plane)
        plan = plan_work(store, wanted)
        if not plan.finished:
            warning = "; ".join(filter(None, (warning, mode_labels.compare(wanted))))
        clock.begin(plan.total, plan.finished)
        if plan.finished:
            yield clock.step(0, computed=False, count=0)
        run: Generator[Index | None, None, None]
        if workers:
            run = _segmented_by(workers, model, engine, mode_labels, store, plan.todo, missing)
        else:
            run = _segmented(mode_labels, store, plan.todo)
            stack.enter_context(_threads(model, store.notes["threads"]))
        with closing(run):
            for index in run:
                if index is not None:
                    yield clock.step(0)
                elif by_plane:
                    yield clock.step(0, count=0)
        for level, index in plan.coarser:
            yield clock.step(level, computed=store.coarsen(level, index))
        store.finish(wanted)
    chunks, seconds = len(volume.missing | missing), time.monotonic() - clock.start
    ran = f"{store.notes['engine']} {device.split()[-1]}"
    return VolumeReport(out, clock.computed, plan.finished, chunks, seconds, warning, ran)


def check_region(volume: Volume, region: Part | None) -> Box:
    """The region with all its ends; without one, all of the volume.

    Raises
    ------
    SettingsError
        If it is empty or not within the volume.
    """
    return box_within(volume.shape[:3], region, volume.name)


def open_store(
    mode_labels: PlanewiseLabels, model: StudentModel, out: Path, *, device: str, notes: Mapping[str, Any], resume: bool
) -> LabelStore:
    """The labels to be written, new or begun; errors are those of `LabelStore`."""
    volume = mode_labels.volume
    layout = mode_labels.layout(len(volume.levels) if image_of(out) else None)  # as many as the image: OME-Zarr asks so
    digest = model.digest()
    description = Description(
        name=printable(out.name.partition(".")[0]),
        scale=volume.scale,
        origin=volume.origin,
        unit=volume.unit,
        classes=model.class_names,
        provenance={
            "program": f"napari-distillfss {__version__}",
            "model": {"digest": digest, "card": model.card},
            "volume": {"path": printable(volume.location) if volume.location else None, **volume.identity},
            "device": device,
            "test_time_augmentation": model.tta,
        },
        image=_path_to_image(volume, out),
    )
    settings = {
        "volume": volume.identity,
        "model": digest,
        "mode": mode_labels.mode,
        "tile": mode_labels.tile,
        "device": device,
    }
    if model.tta:
        settings["test-time augmentation"] = True
    if volume.order != "zyx":
        settings["order of axes"] = volume.order
    return LabelStore(out, layout, description, settings, resume=resume, notes=notes)


@dataclass(frozen=True)
class Plan:
    """Work of a run: parts of shards of the finest level, then shards of the coarser ones, in this order.

    ``finished`` shards of the finest level need no work.
    """

    todo: dict[Index, list[Box]]
    coarser: list[tuple[int, Index]]
    finished: int

    @property
    def total(self) -> int:
        """Number of shards of all levels, finished ones included."""
        return len(self.todo) + len(self.coarser) + self.finished


def plan_work(store: LabelStore, wanted: Box) -> Plan:
    """Look up what the store has of a region."""
    layout, todo, finished = store.layout, {}, 0
    for index in layout.shards(0, wanted):
        missing = store.missing(0, index, overlap(layout.box(0, index), wanted))
        if missing:
            todo[index] = missing
        else:
            finished += 1
    touched = [layout.box(0, index) for index in layout.shards(0, wanted)]
    first, last = touched[0], touched[-1]
    grown: Box = tuple((a[0], b[1]) for a, b in zip(first, last, strict=True))  # type: ignore[assignment]
    coarser = [
        (level, index)
        for level in range(1, len(layout.shapes))
        for index in layout.shards(level, layout.coarser(level, grown))
    ]
    return Plan(todo, coarser, finished)


def _segmented(
    mode_labels: PlanewiseLabels, store: LabelStore, todo: dict[Index, list[Box]]
) -> Generator[Index | None, None, None]:
    """Read, infer and write at the same time; gives each shard when it is in the record, and None after each plane.

    Left early, what is being written is still written and noted.
    """

    def read(boxes: list[Box]) -> list[Array]:
        return [mode_labels.read(box) for box in boxes]

    def write(index: Index, boxes: list[Box], labels: list[Array]) -> Index:
        digests = [store.write(0, box, part) for box, part in zip(boxes, labels, strict=True)]
        with noting:
            store.note(0, index, boxes, digests[-1])
        return index

    threads = _io_threads(mode_labels.model.device)
    in_rows = mode_labels.model.device.kind == "cpu" and mode_labels.volume.location is not None
    if in_rows:
        mode_labels.segmenter.read_in_rows()
    noting = threading.Lock()
    readers = ThreadPoolExecutor(1 if in_rows else threads.readers)  # rows are read in their order
    writers = ThreadPoolExecutor(threads.writers)
    ahead = iter(todo.items())
    reading: deque[tuple[Index, list[Box], Future[list[Array]]]] = deque()
    writing: deque[Future[Index]] = deque()
    try:
        while True:
            while len(reading) < threads.readers and (following := next(ahead, None)):
                reading.append((*following, readers.submit(read, following[1])))
            if not reading:
                break
            index, boxes, coming = reading.popleft()
            blocks = coming.result()
            labels = []
            for box, pixels in zip(boxes, blocks, strict=True):
                labels.append((yield from mode_labels.iter_labels(box, pixels)))
            del blocks, coming
            writing.append(writers.submit(write, index, boxes, labels))
            while writing and (writing[0].done() or len(writing) > threads.writers):
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()
    finally:
        readers.shutdown(cancel_futures=True)
        writers.shutdown()


class _IoThreads(NamedTuple):
    readers: int
    """As many blocks wait to be segmented at most."""
    writers: int
    """As many shards wait to be written at most, beside those that are being written."""


def _io_threads(device: Device) -> _IoThreads:
    """A GPU outruns two readers and a writer, and leaves the cores to more of them."""
    if device.kind == "cpu":
        return _IoThreads(READERS, WRITERS)
    cores = os.cpu_count() or 1
    return _IoThreads(min(8, max(READERS, cores // 2)), min(4, max(WRITERS, cores // 4)))


def _segmented_by(
    workers: Connection,
    model: StudentModel,
    engine: str,
    mode_labels: PlanewiseLabels,
    store: LabelStore,
    todo: dict[Index, list[Box]],
    missing: set[str],
) -> Generator[Index, None, None]:
    """Have the workers do it; gives each shard when it is in the record, and adds to the chunks that have no file."""
    threads = store.notes["threads"]
    with closing(iter_shards(workers, model, engine, mode_labels, store.path, store.layout, todo, threads)) as shards:
        for index, boxes, digest, gone in shards:
            store.note(0, index, list(boxes), digest)
            missing |= gone
            yield index


class _Clock:
    """Count steps and estimate the time that the rest takes."""

    def __init__(self, start: float) -> None:
        self.start, self.total, self.index, self.computed = start, 0, 0, 0
        self._begun, self._pace = start, math.nan

    def begin(self, total: int, finished: int) -> None:
        """Begin with the first of ``total`` shards that is not finished."""
        self.total, self.index, self._begun = total, finished, time.monotonic()

    def step(self, level: int, *, computed: bool = True, count: int = 1) -> ShardDone:
        now = time.monotonic()
        self.index += count
        if computed and count:
            self.computed += count
            self._pace = (now - self._begun) / self.computed
        left = self._pace * (self.total - self.index)
        return ShardDone(self.index, self.total, level, computed, now - self.start, left)


def _paused(
    pauses: Generator[None, None, Result], clock: _Clock, is_wanted: bool
) -> Generator[ShardDone, None, Result]:
    """Do a part of the preparation; it gives a step at each pause where that is wanted."""
    run = GeneratorRun(pauses)
    for _ in run:
        if is_wanted:
            yield clock.step(0, count=0)
    return run.result()


def _iter_match(mode_labels: PlanewiseLabels) -> Generator[None, None, str]:
    """`VolumeSegmenter.match`, and a pause."""
    warning = mode_labels.segmenter.match()
    yield
    return warning


def _path_to_image(volume: Volume, out: Path) -> str | None:
    """From the labels to the image they are of, as OME-Zarr has it."""
    if volume.identity.get("kind") != "ome-zarr" or volume.path is None:
        return volume.address if volume.identity.get("kind") == "ome-zarr" else None
    return printable(Path(os.path.relpath(volume.path, out)).as_posix())


def _iter_fastest(
    model: StudentModel, mode_labels: PlanewiseLabels, wanted: Box, begun: Mapping[str, Any], tile: int | None
) -> Generator[None, None, tuple[StudentModel, PlanewiseLabels]]:
    """The model in the precision with which the labels were begun; or as is the fastest here, where it may choose.

    With it comes the mode, whose model it is then.
    """
    if begun:
        kind, _, precision = str(begun.get("device", "")).partition(" ")
        chosen = model.in_precision(precision) if kind == "cpu" else model
    else:
        zoom = model.preprocess.zoom_factor
        side = min(mode_labels.tile, TILE)  # larger ones may not fit every engine
        largest = max(model.tiles(mode_labels.segmenter.shape, tile=side), key=lambda tile: tile.area)
        height, width = (int(-(-(s.stop - s.start) // model.step) * model.step * zoom) for s in largest.outer)
        pixels = math.prod(stop - start for start, stop in wanted) * zoom**2
        chosen = yield from model.iter_calibrated((height, width), measure=pixels >= WORTH)
    if chosen is model:
        return model, mode_labels
    return chosen, make_mode(mode_labels.mode, mode_labels.volume, chosen, tile)


def _engine_of(store: LabelStore, engine: str) -> str:
    """The engine that labels were begun with: another rounds otherwise."""
    begun_with = str(store.notes.get("engine", describe_engine("torch")))  # before there was a choice it was torch
    name = begun_with.split()[0]
    if name == engine and begun_with != describe_engine(name):
        log.warning("%s: was begun with %s; labels may round otherwise here and there", store.path, begun_with)
    return name


def _run_by(engine: str, model: StudentModel, store: LabelStore) -> StudentModel:
    try:
        other = model.with_engine(engine)
    except SettingsError as error:
        raise SettingsError(
            f"{store.path}: was begun with engine {engine}, and goes on with it only: {error}"
        ) from error
    log.warning("going on with engine %s, as the run was begun with, not %s", engine, model.engine)
    return other


@contextmanager
def _threads(model: Segmenter, count: int) -> Iterator[None]:
    """Compute with as many threads as the run was begun with: with others, sums differ in the last bit."""
    before = torch.get_num_threads()
    if model.device.kind != "cpu" or before == count:
        yield
        return
    log.warning("going on with %d CPU threads, as the run was begun with, not %d", count, before)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
