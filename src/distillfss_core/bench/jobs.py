"""Benchmark jobs: one model learns one task and is scored and timed, in a separate process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from distillfss_core import __version__
from distillfss_core.bench.apart import call_apart
from distillfss_core.bench.datasets import Split, find_set
from distillfss_core.bench.rows import Row, Rows
from distillfss_core.bench.supports import fingerprint, read_support, share_annotated, spread_tests
from distillfss_core.errors import DistillFSSError
from distillfss_core.nn.pretrained import packaged_head
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet

SUPPORT_KINDS = ("dense", "scribbles")


@dataclass(frozen=True)
class Job:
    """Identity of a figure: data, support, annotation, model and settings.

    Parameters
    ----------
    data : str
        A key of `SETS`.
    folder : str
        Where it lies; what lies there identifies a figure, see `iter_jobs`.
    shots : int
    seed : int
        Draws the support and its scribbles, and starts the training; -1 is the published choice of the support.
    annotation : {"dense", "scribbles"}
    peer : str
        A key of `PEERS`.
    tests : int or None
        Test pictures, spread evenly; None: all.
    settings : dict
        Settings of a student or teacher that differ from the default.
    """

    data: str
    folder: str
    shots: int
    seed: int
    annotation: str
    peer: str
    tests: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def key(self) -> dict[str, Any]:
        """All fields but ``folder``, by name: the key of the row in a table."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


@dataclass(frozen=True)
class Outcome:
    """A row of a job, or the reason for its absence."""

    job: Job
    row: Row | None
    error: str | None = None


def run_job(job: Job) -> Row:
    """Do a job here.

    Returns
    -------
    Row
        The job's key; pooled, mean, dice, boundary and by_class (see `Accuracy`); seconds to learn; seconds for a
        megapixel of predictions, without reading and scoring of images; megabytes at most and before learning; ids of
        the support.

    Raises
    ------
    DistillFSSError
        If the data set is not whole or the peer is not available here.
    """
    from distillfss_core.bench.judge import Judge
    from distillfss_core.bench.peers import PEERS
    from distillfss_core.process import peak_mb, reset_peak, resident_mb

    dataset, peer = find_set(job.data), PEERS[job.peer]
    split = dataset.open(job.folder)
    support = _support(split, job.shots, job.seed, job.annotation)
    settings = DistillSettings.from_json({"seed": max(job.seed, 0)} | job.settings)
    peer.load()
    before = resident_mb()
    reset_peak()
    began = time.perf_counter()
    model = peer.learn(support, settings)
    learned = time.perf_counter() - began
    judge, pixels, seconds = Judge(support.classes, dataset.side), 0, 0.0
    queries = spread_tests(split, job.tests)
    peak = None
    for number, item in enumerate(queries):
        query = item.read()
        if number == 0:
            model.predict_labels(query.image)  # what is set up once does not count
        began = time.perf_counter()
        predicted = model.predict_labels(query.image)
        seconds += time.perf_counter() - began
        pixels += predicted.size
        peak = peak_mb()
        judge.add(predicted, query.labels)
    zoom = getattr(getattr(model, "preprocess", None), "zoom", None)
    return job.key() | {
        **judge.accuracy().to_json(),
        "test_pictures": len(split.test),
        "seconds": round(learned, 2),
        "seconds_per_megapixel": round(seconds / pixels * 1e6, 4),
        "peak_mb": peak and round(peak),
        "before_mb": before and round(before),
        "zoom": zoom,
        "annotated": round(share_annotated(support), 5),
        "support": [s.source for s in support.slices],
    }


def run_apart(job: Job, threads: int) -> Row:
    """`run_job` in a process of its own; errors as of `call_apart`."""
    return call_apart(_run_record, asdict(job), threads)


def _run_record(record: dict[str, Any]) -> Row:
    return run_job(Job(**record))


def iter_jobs(jobs: Sequence[Job], rows: Rows, run: Callable[[Job], Row]) -> Iterator[Outcome]:
    """Jobs one after another; those whose figures are in ``rows`` are not done again.

    A row stands for a job if it was made of the same support images and test names, by the same version of this program
    and of its head; any other stays where it is and is not taken. A peer that is not available here, and a job that
    fails, give an `Outcome` with an error and stop no other job.
    """
    head = packaged_head(DistillSettings().backbone)
    program = {"version": __version__, "head": head and head.name}
    digests = lru_cache(_digests)
    for job in jobs:
        try:
            identity = digests(job.data, job.folder, job.shots, job.seed, job.annotation, job.tests)
            outcome = _outcome(job, job.key() | program | identity, rows, run)
        except DistillFSSError as error:
            outcome = Outcome(job, None, str(error))
        yield outcome


def _outcome(job: Job, identity: Row, rows: Rows, run: Callable[[Job], Row]) -> Outcome:
    from distillfss_core.bench.peers import PEERS

    if (row := rows.find(identity)) is not None:
        return Outcome(job, row)
    if (missing := PEERS[job.peer].missing()) is not None:
        return Outcome(job, None, missing)
    return Outcome(job, rows.add(run(job) | identity))


def _digests(data: str, folder: str, shots: int, seed: int, annotation: str, tests: int | None) -> Row:
    """Digests of the support and test images of a job."""
    split = find_set(data).open(folder)
    tested = "\n".join(item.name for item in spread_tests(split, tests))
    return {
        "support_digest": fingerprint(_support(split, shots, seed, annotation)),
        "tests_digest": hashlib.sha256(tested.encode()).hexdigest()[:12],
    }


def _support(split: Split, shots: int, seed: int, annotation: str) -> SupportSet:
    return read_support(split, shots, seed, scribbled=annotation == "scribbles")
