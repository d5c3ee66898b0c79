"""Segmentation on many processes or machines by dask.distributed: a task is a whole shard of labels.

::

    this process                       workers
    plan, journal, pyramid  <-------   read, infer, write a shard, force it to disk, send its digest

Workers see the same files. A task that is lost with its worker is done again by another; it writes the same file.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from distillfss_core.errors import OutOfMemoryError, OutputError, SettingsError
from distillfss_core.labelstore.layout import Box, Index, Layout
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.device import choose_device
from distillfss_core.segmentation.modes import PlanewiseLabels

log: logging.Logger = logging.getLogger(__name__)

_AHEAD = 3  # tasks that wait for each thread of the workers
_RETRIES = 2  # of a task that ends in an error, e.g. of a file system that is away for a moment


@dataclass(frozen=True)
class Connection:
    """A dask.distributed client and the device of its workers; `connect` makes it."""

    client: Any
    device: str
    precision: str

    def worker_device(self) -> str:
        """What the workers compute on, as "cpu float32".

        Raises
        ------
        SettingsError
            If there are none, they differ, or do not have this program.
        """
        try:
            devices = set(self.client.run(_describe_device, self.device, self.precision).values())
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"the workers have no {error.name}; install napari-distillfss where they run"
            ) from error
        if not devices:
            raise SettingsError("the scheduler has no worker yet; start some by dask worker")
        if len(devices) > 1:
            raise SettingsError(
                f"the workers compute on different devices ({', '.join(sorted(devices))}), so shards would differ; "
                "give --device, or workers of one kind"
            )
        return str(devices.pop())


@contextmanager
def connect(address: str, *, device: str = "auto", precision: str = "auto") -> Iterator[Connection]:
    """Workers to compute on.

    Parameters
    ----------
    address : str
        "local" or "local:N" starts N processes here (by default one less than there are cores; one for each GPU where
        dask-cuda is installed; a script then needs ``if __name__ == "__main__":``), "slurm:N" asks SLURM for N jobs as
        dask-jobqueue's own configuration describes them, "tcp://HOST:PORT" is a scheduler that runs
        ("tls://" likewise, with the certificates of dask's configuration).
    device, precision : str
        Of the workers, as for `StudentModel.load`.

    Raises
    ------
    SettingsError
        If there is no such kind of cluster, a library is missing, or no scheduler responds.
    """
    kind, _, count = address.partition(":")
    if not re.fullmatch(r"(local|slurm)(:\d*)?|(tcp|tls)://.+:\d+", address):
        raise SettingsError(f"cluster {address!r} is not possible; give local, local:N, slurm:N or tcp://HOST:PORT")
    if find_spec("distributed") is None:
        raise SettingsError("a cluster needs distributed: pip install 'napari-distillfss[cluster]'")
    from distributed import Client
    from distributed.security import Security

    if kind == "tls" and Security().get_connection_args("client")["ssl_context"] is None:
        raise SettingsError(f"{address} needs certificates; name them in dask's configuration, distributed.comm.tls")
    if kind in ("tcp", "tls"):
        try:
            client = Client(address, timeout="30s")
        except OSError as error:
            raise SettingsError(f"no scheduler answers at {address}; start one by dask scheduler") from error
        with client:
            yield Connection(client, device, precision)
        return
    with _start(kind, int(count or 0)) as cluster, Client(cluster) as client:
        if kind == "slurm":
            log.warning("waiting for SLURM to start a job")
        client.wait_for_workers(1)
        yield Connection(client, device, precision)


def iter_shards(
    connection: Connection,
    model: StudentModel,
    engine: str,
    mode_labels: PlanewiseLabels,
    path: Path,
    layout: Layout,
    todo: Mapping[Index, Sequence[Box]],
    threads: int,
) -> Generator[tuple[Index, Sequence[Box], str, frozenset[str]], None, None]:
    """Have shards of labels written by the workers, whose networks are run by ``engine``.

    Yields
    ------
    index, boxes : of a shard that is on disk
    digest : of its file
    missing : chunks of the volume without a file that were met

    Raises
    ------
    OutOfMemoryError
        If workers die of a shard again and again.
    OutputError
        If the scheduler is lost, which is known after half a minute.
    DistillFSSError
        What went wrong on a worker.
    """
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    from distillfss_core.segmentation.worker import Job, Spec, segment_shard

    client, name = connection.client, f"distillfss-{secrets.token_hex(4)}"
    spec = Spec(
        _model_bytes(model),
        mode_labels.volume,
        mode_labels.mode,
        mode_labels.tile,
        path.absolute(),
        layout,
        connection.device,
        connection.precision,
        engine,
        model.tta,
        threads,
    )
    client.register_plugin(Job(spec), name=name)
    ahead = iter(todo.items())
    running: dict[Any, tuple[Index, Sequence[Box]]] = {}
    finished = as_completed()
    try:
        while True:
            try:
                room = _AHEAD * max(1, sum(client.nthreads().values()))
            except OSError as error:
                raise _lost(path) from error
            while len(running) < room and (following := next(ahead, None)):
                future = client.submit(segment_shard, name, following[1], pure=False, retries=_RETRIES)
                running[future] = following
                finished.add(future)
            if not running:
                return
            future = next(finished)
            index, boxes = running.pop(future)
            try:
                digest, missing = future.result()
            except KilledWorker as error:
                raise OutOfMemoryError(
                    f"{path}: shard {index} ended one worker after another, most likely for want of memory; what is "
                    "finished is kept, give workers more memory and resume"
                ) from error
            except CancelledError as error:  # nobody else cancels them
                raise _lost(path) from error
            yield index, boxes, digest, missing
    finally:
        with suppress(OSError):  # of a scheduler that is lost
            client.cancel(list(running))
        with suppress(OSError):  # of a worker that closes at this moment
            client.unregister_worker_plugin(name)


def _lost(path: Path) -> OutputError:
    return OutputError(f"{path}: the scheduler was lost; what is finished is kept, start it anew and resume")


def _describe_device(device: str, precision: str) -> str:
    chosen = choose_device(device, precision)
    return f"{chosen.kind} {chosen.precision}"


def _model_bytes(model: StudentModel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        model.save(file)
        return file.read_bytes()


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Put back the handlers of SIGINT and SIGTERM in the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _start(kind: str, count: int) -> Any:
    """A cluster of our own; it is closed by leaving it."""
    if kind == "slurm":
        if find_spec("dask_jobqueue") is None:
            raise SettingsError("slurm needs dask-jobqueue: pip install 'napari-distillfss[cluster]'")
        with _kept_handlers():  # dask-jobqueue ends the process on Ctrl-C and SIGTERM once it is imported
            from dask_jobqueue import SLURMCluster

        try:
            cluster: Any = SLURMCluster()
        except ValueError as error:
            raise SettingsError(
                f"dask-jobqueue is not configured for SLURM ({' '.join(str(error).split())[:120]}); "
                "see docs/clusters.md"
            ) from error
        cluster.scale(jobs=count or 1)
        return cluster
    if torch.cuda.is_available() and find_spec("dask_cuda") is not None:
        from dask_cuda import LocalCUDACluster

        return LocalCUDACluster(n_workers=count or None, threads_per_worker=1, dashboard_address=None)
    from distributed import LocalCluster

    return LocalCluster(
        n_workers=count or max(1, (os.cpu_count() or 2) - 1),
        threads_per_worker=1,
        dashboard_address=None,
        host="127.0.0.1",
    )
