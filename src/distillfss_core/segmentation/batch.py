"""Segmentation of many volumes, one after another, with a report of all."""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from distillfss_core.errors import DistillFSSError, InputFileError, OutputError, SettingsError, printable
from distillfss_core.io.tables import TableRow, read_table
from distillfss_core.io.tiff import first_of_sets
from distillfss_core.io.writing import atomic_path, check_output, check_replaceable
from distillfss_core.labelstore.layout import Part, parse_region
from distillfss_core.labelstore.store import check_apart, check_choice, count_voxels
from distillfss_core.models.student import StudentModel
from distillfss_core.segmentation.cluster import Connection
from distillfss_core.segmentation.to_zarr import ShardDone, VolumeReport, check_region, iter_segment
from distillfss_core.types import GeneratorRun, as_run
from distillfss_core.volumes.opening import is_one_volume, is_volume, stem_of, volumes_in
from distillfss_core.volumes.remote import address_of
from distillfss_core.volumes.volume import Volume, count_choices, open_volume

log: logging.Logger = logging.getLogger(__name__)

REPORTS = (".csv", ".json")
_NUMBERS = ("level", "time", "series")
_OPTIONS = ("axes", "channel", *_NUMBERS)
_COLUMNS = ("volume", "output", "region", *_OPTIONS)
_REPORTED = ("volume", "output", "status")  # columns by which a report is recognized


@dataclass(frozen=True)
class BatchJob:
    """A volume to segment.

    Parameters
    ----------
    source, output : Path
    region : part of the volume, or None for all
    options : mapping
        Options of `open_volume`.
    notes : mapping
        Further columns of the table it came from; they are repeated in the report.
    error : str
        Why it cannot be segmented, where that is known before; it becomes the error of its row.
    opened : Volume, optional
        The volume, where it is open already; ``source`` is its name in the report then. It is not closed.
    """

    source: Path
    output: Path
    region: Part | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    opened: Volume | None = None


@dataclass(frozen=True)
class BatchStep:
    """A step of the work: a shard of volume number ``index`` (from 1) of ``total``.

    When that volume is over, ``shard`` is None and ``row`` is its row of the report. ``error`` is what it has failed
    with.
    """

    index: int
    total: int
    job: BatchJob
    shard: ShardDone | None
    row: Mapping[str, Any] | None = None
    error: Exception | None = None


def plan_batch(
    source: Path | Sequence[Path],
    out: Path,
    options: Mapping[str, Any],
    region: Part | None = None,
    *,
    all_times: bool = False,
) -> list[BatchJob]:
    """The volumes of a folder, a table or a list; what is wrong with one of them is the error of its job.

    Parameters
    ----------
    source : path, or sequence of paths
        Volumes, one a path. Or one path: a folder whose entries are volumes (zarr, TIFF, .npy, folders of planes), one
        zarr or DICOM series, or a CSV file with a column ``volume`` and, where wanted, ``output``, ``region``,
        ``level``, ``channel``, ``time``, ``series`` and ``axes``. Relative paths start at the table's folder.
        Delimiters and encodings are those of `read_table`. Of a plate, a well and a collection of images in OME-Zarr,
        every image is a volume.
    out : path
        Folder of the labels; each is called after its volume.
    options : mapping
        Options of `open_volume` for all; a table's columns go before them.
    region : optional
        For all, likewise.
    all_times : bool
        Each time point of a volume is segmented to NAME_t0.ome.zarr, NAME_t1.ome.zarr, ... unless one is chosen for it.

    Raises
    ------
    InputFileError
        If it holds no volume or is no such table, or none of the volumes can be segmented.
    """
    jobs = plan_jobs(source, out, options, region, all_times=all_times)
    if all(job.error for job in jobs):
        raise InputFileError(jobs[0].error)
    return jobs


def plan_jobs(
    source: Path | Sequence[Path],
    out: Path,
    options: Mapping[str, Any],
    region: Part | None = None,
    *,
    all_times: bool = False,
    reads: Sequence[Path] = (),
) -> list[BatchJob]:
    """As `plan_batch`, also where none of the volumes can be segmented.

    Parameters
    ----------
    source, out, options, region, all_times
        As for `plan_batch`.
    reads : paths
        Files that are read as well, beside the volumes and the table; no labels are written over them.

    Raises
    ------
    InputFileError
        If the source holds no volume or is no such table.
    """
    if not isinstance(source, Path):
        jobs = [job for path in source for job in _jobs_at(path, out, options, region)]
    elif source.is_dir() or address_of(source):
        jobs = _jobs_in(source, out, options, region)
        if not jobs:
            raise InputFileError(f"{source}: holds no volume; put OME-Zarr, TIFF, .npy or folders of planes there")
    else:
        rows = read_table(source, "volume", _COLUMNS)
        jobs = [job for row in rows for job in _jobs_of(row, source, out, options, region)]
    jobs = [each for job in jobs for each in _each_time(job)] if all_times else jobs
    if not isinstance(source, Path):
        return _apart(_of_one_output(jobs, "the list"), reads)
    return _apart(_of_one_output(jobs, str(source)), [source, *reads] if source.is_file() else reads)


@as_run
def iter_batch(
    jobs: Sequence[BatchJob],
    model: StudentModel,
    report: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    mode: str = "planewise",
    tile: int | None = None,
    cluster: str | Connection | None = None,
    by_plane: bool = False,
) -> Generator[BatchStep, None, list[dict[str, Any]]]:
    """Segment volumes; one that fails does not stop the others. The report is written anew after each.

    Parameters
    ----------
    jobs : from `plan_batch`
    model : StudentModel
    report : path
        Ends in .csv or .json.
    resume, overwrite, mode, tile, cluster, by_plane
        As for `iter_segment`.

    Returns
    -------
    list of dict
        The rows of the report: volume, output, status ("done" or "failed"), error, shape and scale, voxels of each
        class (within the region), shards computed and found finished, missing chunks, warning, seconds.

    Raises
    ------
    SettingsError
        If the report has another suffix, or ``resume`` and ``overwrite`` are both given.
    OutputError
        If it cannot be written: before anything else where that is known, else at the end, when all volumes are done.
    """
    if report.suffix.lower() not in REPORTS:
        raise SettingsError(f"report {report}: end its name in .csv or .json")
    check_choice(resume=resume, overwrite=overwrite)
    check_output(report)
    goes_on = resume and _is_report_of(report, jobs)
    check_replaceable([report], _sources(jobs), overwrite=overwrite or goes_on)
    check_apart(report, *(job.output for job in jobs), *_sources(jobs))
    segment = partial(
        iter_segment, resume=resume, overwrite=overwrite, mode=mode, tile=tile, cluster=cluster, by_plane=by_plane
    )
    unwritten: OutputError | None = None
    rows: list[dict[str, Any]] = []
    for index, job in enumerate(jobs, 1):
        start = time.monotonic()
        volume = printable(address_of(job.source) or job.source)
        row: dict[str, Any] = {**job.notes, "volume": volume, "output": printable(job.output), "status": "done"}
        failed: Exception | None = None
        try:
            run = _segment_job(job, model, segment)
            while True:
                yield BatchStep(index, len(jobs), job, next(run))
        except StopIteration as end:
            row |= end.value
        except Exception as error:
            failed = error
            row |= {"status": "failed", "error": printable(_reason(error, job))}
            log.debug("%s", job.source, exc_info=True)
        except BaseException:
            with suppress(OutputError):
                write_report(report, [*rows, row | {"status": "interrupted"}])
            raise
        rows.append({**row, "seconds": round(time.monotonic() - start, 1)})
        try:
            write_report(report, rows)
            unwritten = None
        except OutputError as error:
            log.warning("%s (%d of %d volumes; the others go on)", error, index, len(jobs))
            unwritten = error
        yield BatchStep(index, len(jobs), job, None, rows[-1], failed)
    if unwritten is not None:
        raise unwritten
    return rows


def write_report(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table as CSV or JSON (by the suffix), whole or not at all; what a row does not have is empty.

    Raises
    ------
    OutputError
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        if path.suffix.lower() == ".json":
            json.dump(list(rows), file, indent=2)
            return
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _is_report_of(path: Path, jobs: Sequence[BatchJob]) -> bool:
    """Whether a file is a report of these jobs, of a run that can go on."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = json.load(file) if path.suffix.lower() == ".json" else list(csv.DictReader(file))
        if not all(name in row for row in rows for name in _REPORTED):
            return False
        outputs = {printable(job.output.resolve()) for job in jobs}
        return bool(rows) and all(
            str(Path(row["output"]).resolve()) in outputs for row in rows if row["status"] == "done"
        )
    except (OSError, ValueError, TypeError, csv.Error):
        return False


def _reason(error: Exception, job: BatchJob) -> str:
    """What the report says of a volume that failed."""
    if isinstance(error, DistillFSSError):
        return str(error)
    what = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__} {error}"
    return f"{job.source}: cannot be segmented ({' '.join(what.split())[:200]}); check its name and that it is whole"


def _segment_job(
    job: BatchJob, model: StudentModel, segment: Callable[..., GeneratorRun[ShardDone, VolumeReport]]
) -> Generator[ShardDone, None, dict[str, Any]]:
    if job.error:
        raise InputFileError(job.error)
    with open_volume(job.source, **job.options) if job.opened is None else nullcontext(job.opened) as volume:
        if not job.output.parent.is_dir():
            raise OutputError(f"cannot make {job.output}: there is no folder {job.output.parent}; make it first")
        done = yield from segment(volume, model, job.output, region=job.region)
        counts = count_voxels(job.output, check_region(volume, job.region), len(model.class_names))
        scale = dict(zip(("scale_z", "scale_y", "scale_x"), volume.scale, strict=True))
        return {
            **dict(zip("zyx", volume.shape, strict=False)),
            **scale,
            "unit": volume.unit,
            **{f"voxels_{name}": count for name, count in zip(model.class_names, counts[1:], strict=True)},
            "voxels_background": counts[0],
            "shards_computed": done.computed,
            "shards_found": done.finished,
            "missing_chunks": done.missing_chunks,
            "warning": done.warning,
        }


def _volumes_of(path: Path, options: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """The volumes of a path, a plate or a collection, and their names; a series that was chosen is one volume."""
    single = [(path, stem_of(path))]
    try:
        return single if "series" in options else volumes_in(path)
    except InputFileError:  # reported as the error of this volume, when its turn comes
        return single


def _jobs_in(folder: Path, out: Path, options: Mapping[str, Any], region: Part | None) -> list[BatchJob]:
    jobs, others = [], []
    is_single = address_of(folder) or is_one_volume(folder)
    for path in [folder] if is_single else first_of_sets(sorted(folder.iterdir())):
        if path.name.startswith("."):
            continue
        with suppress(OSError):  # it cannot be read, which is the error of its job
            if path != folder and not is_volume(path):
                others.append(path.name)
                continue
        jobs += _jobs_at(path, out, options, region)
    if others and jobs:
        names = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        log.warning("%d file(s) or folder(s) in %s are no volumes and are left out: %s", len(others), folder, names)
    return jobs


def _jobs_at(path: Path, out: Path, options: Mapping[str, Any], region: Part | None) -> list[BatchJob]:
    """The jobs of a path; several for a plate or a collection of images."""
    error = ""
    try:
        volumes = _volumes_of(path, options)
    except OSError as refused:
        error = f"{path}: cannot be read ({refused.strerror}); check its permissions"
        volumes = [(path, stem_of(path))]
    return [BatchJob(volume, out / f"{name}.ome.zarr", region, options, error=error) for volume, name in volumes]


def _jobs_of(row: TableRow, table: Path, out: Path, options: Mapping[str, Any], region: Part | None) -> list[BatchJob]:
    """The jobs of a row; several for a plate or a collection of images."""
    cells, where = row.cells, f"{table} line {row.line}:"
    notes = {name: text for name, text in cells.items() if name not in _COLUMNS}
    source = table.parent / cells.get("volume", "")
    try:
        source = source if address_of(cells.get("volume", "")) is None else Path(cells["volume"])
    except SettingsError as unknown:
        return [BatchJob(source, out / f"line_{row.line}.ome.zarr", region, options, notes, f"{where} {unknown}")]
    if row.error or "volume" not in cells:
        error = f"{where} {row.error or 'names no volume; fill it in, or remove the line'}"
        return [BatchJob(source, out / f"line_{row.line}.ome.zarr", region, options, notes, error)]
    output = table.parent / cells["output"] if "output" in cells else out / f"{stem_of(source)}.ome.zarr"
    try:
        part = parse_region(cells["region"]) if "region" in cells else region
        own = {**options, **{name: _option(name, cells[name]) for name in _OPTIONS if name in cells}}
    except ValueError as error:
        return [BatchJob(source, output, region, options, notes, f"{where} {error}")]
    volumes = _volumes_of(source, own)
    if "output" not in cells:
        return [BatchJob(volume, out / f"{name}.ome.zarr", part, own, notes) for volume, name in volumes]
    several = f"{where} {source} holds {len(volumes)} images; leave its output out" if len(volumes) > 1 else ""
    return [BatchJob(source if several else volumes[0][0], output, part, own, notes, several)]


def _of_one_output(jobs: Sequence[BatchJob], source: str) -> list[BatchJob]:
    """The jobs, with an error for each whose labels would be written where those of another one are."""
    places: dict[Path, list[BatchJob]] = {}
    for job in jobs:
        places.setdefault(job.output.resolve(), []).append(job)
    checked = []
    for job in jobs:
        others = [other.source for other in places[job.output.resolve()] if other is not job]
        if others and not job.error:
            error = (
                f"{source}: {job.source} and {others[0]} would both be written to {job.output}; rename one, or give a "
                "table with a column output"
            )
            job = replace(job, error=error)
        checked.append(job)
    return checked


def _sources(jobs: Sequence[BatchJob]) -> list[Path]:
    """The files of the volumes that are read."""
    sources = (job.source if job.opened is None else job.opened.path for job in jobs if not job.error)
    return [source for source in sources if source is not None]


def _each_time(job: BatchJob) -> list[BatchJob]:
    """A job for each time point of a volume that has several."""
    if job.error or "time" in job.options:
        return [job]
    of_file = {name: job.options[name] for name in ("axes", "series") if name in job.options}
    try:
        points = count_choices(job.source, **of_file).get("t", 1)
    except (DistillFSSError, OSError, ValueError):  # reported as the error of this volume, when its turn comes
        return [job]
    if points == 1:
        return [job]
    end = next(suffix for suffix in (".ome.zarr", ".zarr", "") if job.output.name.endswith(suffix))
    stem, digits = job.output.name.removesuffix(end), len(str(points - 1))
    return [
        replace(
            job,
            output=job.output.with_name(f"{stem}_t{time:0{digits}}{end}"),
            options={**job.options, "time": time},
            notes={**job.notes, "time": str(time)},
        )
        for time in range(points)
    ]


def _apart(jobs: Sequence[BatchJob], reads: Sequence[Path]) -> list[BatchJob]:
    """The jobs, with an error for each whose labels would be written where anything is read."""
    inputs = {path.resolve(): path for path in (*_sources(jobs), *reads)}
    above = {parent: path for resolved, path in inputs.items() for parent in resolved.parents}
    checked = []
    for job in jobs:
        out = job.output.resolve()
        near = [inputs[place] for place in (out, *out.parents) if place in inputs]
        near += [above[out]] if out in above else []
        try:
            check_apart(job.output, *near)
        except OutputError as error:
            job = job if job.error else replace(job, error=str(error))
        checked.append(job)
    return checked


def _option(name: str, text: str) -> str | int:
    if name in _NUMBERS and not text.isdecimal():
        raise ValueError(f"{name} {text!r} is no whole number from 0")
    return int(text) if text.isdecimal() else text
