"""Many volumes, one after another, with one report of what became of each."""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillfss_core.errors import DistillFSSError, InputFileError, OutputError, SettingsError
from distillfss_core.io.writing import atomic_path, check_output
from distillfss_core.labelstore.layout import Part, parse_region
from distillfss_core.labelstore.store import count_voxels
from distillfss_core.models.student import StudentModel
from distillfss_core.segmentation.cluster import Connection
from distillfss_core.segmentation.to_zarr import ShardDone, check_region, iter_segment
from distillfss_core.types import as_run
from distillfss_core.volumes.opening import is_volume, stem_of
from distillfss_core.volumes.volume import open_volume

log = logging.getLogger(__name__)

REPORTS = (".csv", ".json")
_NUMBERS = ("level", "time", "series")
_OPTIONS = ("axes", "channel", *_NUMBERS)


@dataclass(frozen=True)
class Job:
    """A volume to segment.

    Parameters
    ----------
    source, output : Path
    region : part of the volume, or None for all
    options : mapping
        Options of `open_volume`.
    notes : mapping
        Further columns of the table it came from; they are repeated in the report.
    """

    source: Path
    output: Path
    region: Part | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchStep:
    """A step of the work: a shard of volume number ``index`` (from 1) of ``total``; None when that volume is over."""

    index: int
    total: int
    job: Job
    shard: ShardDone | None


def plan_batch(source: Path, out: Path, options: Mapping[str, Any], region: Part | None = None) -> list[Job]:
    """The volumes of a folder or a table.

    Parameters
    ----------
    source : path
        A folder whose entries are volumes (zarr, TIFF, .npy, folders of planes), or a CSV file with a column
        ``volume`` and, where wanted, ``output``, ``region``, ``level``, ``channel``, ``time``, ``series`` and ``axes``.
        Relative paths start at the table's folder.
    out : path
        Folder of the labels; each is called after its volume.
    options : mapping
        Options of `open_volume` for all; a table's columns go before them.
    region : optional
        For all, likewise.

    Raises
    ------
    InputFileError
        If it holds no volume or is no such table, or two volumes would have one output.
    """
    if source.is_dir():
        jobs = [Job(path, out / f"{stem_of(path)}.ome.zarr", region, options) for path in _volumes_in(source)]
        if not jobs:
            raise InputFileError(f"{source}: holds no volume; put OME-Zarr, TIFF, .npy or folders of planes there")
    else:
        jobs = _read_table(source, out, options, region)
    taken: dict[Path, Path] = {}
    for job in jobs:
        other = taken.setdefault(job.output.resolve(), job.source)
        if other is not job.source:
            raise InputFileError(
                f"{source}: {other} and {job.source} would both be written to {job.output}; rename one, or give a "
                "table with a column output"
            )
    return jobs


@as_run
def iter_batch(
    jobs: Sequence[Job],
    model: StudentModel,
    report: Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    mode: str = "planewise",
    tile: int | None = None,
    cluster: str | Connection | None = None,
) -> Generator[BatchStep, None, list[dict[str, Any]]]:
    """Segment volumes; one that fails does not stop the others. The report is written anew after each.

    Parameters
    ----------
    jobs : from `plan_batch`
    model : StudentModel
    report : path
        Ends in .csv or .json.
    resume, overwrite, mode, tile, cluster
        As for `iter_segment`.

    Returns
    -------
    list of dict
        The rows of the report: volume, output, status ("done" or "failed"), error, shape and scale, voxels of each
        class (within the region), shards computed and found finished, missing chunks, seconds.

    Raises
    ------
    SettingsError
        If the report has another suffix.
    OutputError
        If it cannot be written: before anything else where that is known, else at the end, when all volumes are done.
    """
    if report.suffix.lower() not in REPORTS:
        raise SettingsError(f"report {report}: end its name in .csv or .json")
    check_output(report)
    unwritten: OutputError | None = None
    rows: list[dict[str, Any]] = []
    for index, job in enumerate(jobs, 1):
        start = time.monotonic()
        row: dict[str, Any] = {**job.notes, "volume": str(job.source), "output": str(job.output), "status": "done"}
        try:
            run = _segment_job(job, model, resume=resume, overwrite=overwrite, mode=mode, tile=tile, cluster=cluster)
            while True:
                yield BatchStep(index, len(jobs), job, next(run))
        except StopIteration as end:
            row |= end.value
        except DistillFSSError as error:
            row |= {"status": "failed", "error": str(error)}
        rows.append({**row, "seconds": round(time.monotonic() - start, 1)})
        try:
            write_report(report, rows)
            unwritten = None
        except OutputError as error:
            log.warning("%s (%d of %d volumes; the others go on)", error, index, len(jobs))
            unwritten = error
        yield BatchStep(index, len(jobs), job, None)
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


def _segment_job(
    job: Job,
    model: StudentModel,
    *,
    resume: bool,
    overwrite: bool,
    mode: str,
    tile: int | None,
    cluster: str | Connection | None,
) -> Generator[ShardDone, None, dict[str, Any]]:
    with open_volume(job.source, **job.options) as volume:
        if not job.output.parent.is_dir():
            raise OutputError(f"cannot make {job.output}: there is no folder {job.output.parent}; make it first")
        done = yield from iter_segment(
            volume,
            model,
            job.output,
            region=job.region,
            resume=resume,
            overwrite=overwrite,
            mode=mode,
            tile=tile,
            cluster=cluster,
        )
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
        }


def _volumes_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and is_volume(path)]


def _read_table(path: Path, out: Path, options: Mapping[str, Any], region: Part | None) -> list[Job]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputFileError(f"{path}: cannot be read as a table ({error}); give a folder or a CSV file") from error
    if not rows or "volume" not in rows[0]:
        raise InputFileError(f"{path}: has no row with a column 'volume'; name the volumes there, one a line")
    jobs = []
    for line, row in enumerate(rows, 2):
        cells = {name: text.strip() for name, text in row.items() if name and isinstance(text, str) and text.strip()}
        if "volume" not in cells:
            raise InputFileError(f"{path} line {line}: names no volume; fill it in, or remove the line")
        source = path.parent / cells["volume"]
        output = path.parent / cells["output"] if "output" in cells else out / f"{stem_of(source)}.ome.zarr"
        notes = {n: t for n, t in cells.items() if n not in ("volume", "output", "region", *_OPTIONS)}
        try:
            part = parse_region(cells["region"]) if "region" in cells else region
            own = {name: _option(name, cells[name]) for name in _OPTIONS if name in cells}
        except ValueError as error:
            raise InputFileError(f"{path} line {line}: {error}") from error
        jobs.append(Job(source, output, part, {**options, **own}, notes))
    return jobs


def _option(name: str, text: str) -> str | int:
    if name in _NUMBERS and not text.isdecimal():
        raise ValueError(f"{name} {text!r} is no whole number from 0")
    return int(text) if text.isdecimal() else text
