"""Code that runs on a worker of a cluster: it loads model and volume once, then segments one shard at a time."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distributed import WorkerPlugin, get_worker

from distillfss_core.labelstore.layout import Box, Layout
from distillfss_core.labelstore.metadata import open_level
from distillfss_core.labelstore.store import write_shard
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.device import choose_device
from distillfss_core.segmentation.modes import PlanewiseLabels, make_mode
from distillfss_core.volumes.volume import Volume


@dataclass(frozen=True)
class Spec:
    """Settings of a run, sent once to each worker; ``model`` is the content of a student file."""

    model: bytes
    volume: Volume
    mode: str
    tile: int
    path: Path
    layout: Layout
    device: str
    precision: str
    engine: str
    tta: bool
    threads: int


class Job(WorkerPlugin):
    """A run on a worker, prepared with its first task."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def setup(self, worker: Any) -> None:
        """Prepare the job on a worker; the model is loaded with the first shard."""
        _close_on_sigterm(worker)
        self._lock = threading.Lock()
        self._mode: PlanewiseLabels | None = None

    def teardown(self, worker: Any) -> None:
        """Close the volume, when the worker closes or the plugin is removed."""
        if self._mode is not None:
            self._mode.volume.close()

    def segment(self, boxes: Sequence[Box]) -> tuple[str, frozenset[str]]:
        """Write (parts of) a shard; gives the digest of its file, and the volume's chunks that had no file."""
        mode_labels, spec = self._ready(), self.spec
        array = open_level(spec.path, 0)
        before = mode_labels.volume.missing
        digest = ""
        for box in boxes:
            labels = mode_labels.labels(box, mode_labels.read(box))
            digest = write_shard(spec.path, array, spec.layout, 0, box, labels)
        return digest, mode_labels.volume.missing - before

    def _ready(self) -> PlanewiseLabels:
        with self._lock:
            if self._mode is None:
                spec = self.spec
                torch.set_num_threads(spec.threads)
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "model.safetensors"
                    file.write_bytes(spec.model)
                    device = choose_device(spec.device, spec.precision)  # "auto" is the same for all CPUs here
                    model = StudentModel.load(file, device=device.name, precision=device.precision, engine=spec.engine)
                self._mode = make_mode(spec.mode, spec.volume, model.with_tta(spec.tta), spec.tile)
            return self._mode


def _close_on_sigterm(worker: Any) -> None:
    """On SIGTERM, which SLURM sends before the walltime, the worker gives its tasks back and closes.

    A worker that has a handler already, and one that runs in a thread, is left as it is.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    loop = asyncio.get_running_loop()
    closing: set[asyncio.Task[None]] = set()  # a loop holds its tasks weakly

    def close() -> None:
        closing.add(loop.create_task(worker.close_gracefully(reason="SIGTERM")))

    with suppress(NotImplementedError):  # Windows
        loop.add_signal_handler(signal.SIGTERM, close)


def segment_shard(name: str, boxes: Sequence[Box]) -> tuple[str, frozenset[str]]:
    """A task: the worker's plugin ``name`` does it."""
    job: Any = get_worker().plugins[name]
    segmented: tuple[str, frozenset[str]] = job.segment(boxes)
    return segmented
