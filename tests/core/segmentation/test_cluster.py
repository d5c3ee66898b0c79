"""Workers write the labels that one process writes, and losing one loses nothing."""

from __future__ import annotations

import os
import signal
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
import torch

from distillfss_core.cli.console import FINE
from distillfss_core.cli.main import main
from distillfss_core.errors import InputFileError, OutputError, SettingsError
from distillfss_core.labelstore.store import JOURNAL
from distillfss_core.segmentation.cluster import Connection, connect
from distillfss_core.segmentation.to_zarr import iter_segment, segment_to_zarr
from distillfss_core.volumes.volume import open_volume
from pictures import blobs
from volumes import write_ome_zarr

pytest.importorskip("distributed", reason="needs distributed: pip install distributed")

TILE = 64
STACK = np.stack([blobs(seed, 200).image for seed in range(12)])


@pytest.fixture(scope="module")
def workers():
    with connect("local:2") as connection:
        yield connection


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers do
    yield
    torch.set_num_threads(before)


@pytest.fixture
def volume(tmp_path, monkeypatch):
    monkeypatch.setattr("distillfss_core.labelstore.layout._SIDE", 64)
    monkeypatch.setattr("distillfss_core.labelstore.layout._SHARD", 2 * 64 * 64)
    return open_volume(write_ome_zarr(tmp_path / "image.ome.zarr", STACK, levels=1))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != JOURNAL.name}


def test_a_cluster_that_loses_a_worker_writes_the_bytes_of_one_process(volume, plain_student, workers, tmp_path):
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    one, many = tmp_path / "one" / "out.zarr", tmp_path / "many" / "out.zarr"
    segment_to_zarr(volume, plain_student, one, tile=TILE)
    run = iter_segment(volume, plain_student, many, tile=TILE, cluster=workers)
    steps = [next(run) for _ in range(5)]
    os.kill(next(iter(workers.client.run(os.getpid).values())), signal.SIGKILL)
    steps += list(run)
    assert [s.index for s in steps] == list(range(1, steps[-1].total + 1))
    assert files_of(many) == files_of(one)
    assert (
        segment_to_zarr(volume, plain_student, many, resume=True, tile=TILE).computed == 0
    )  # one process may go on with it


def test_workers_turn_the_image_too(volume, plain_student, workers, tmp_path):
    model, labels = plain_student.with_tta(), {}
    for name, cluster in (("one", None), ("many", workers)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "out.zarr"
        segment_to_zarr(volume, model, path, tile=TILE, cluster=cluster)
        labels[name] = files_of(path)
    segment_to_zarr(volume, plain_student, tmp_path / "plain.zarr", tile=TILE)
    assert labels["many"] == labels["one"]
    assert files_of(tmp_path / "plain.zarr" / "0") != files_of(tmp_path / "one" / "out.zarr" / "0")


def test_a_cancelled_run_is_resumed_by_other_workers(volume, plain_student, workers, tmp_path):
    (tmp_path / "a").mkdir()
    out = tmp_path / "a" / "out.zarr"
    run = iter_segment(volume, plain_student, out, tile=TILE, cluster=workers)
    for _ in range(3):
        next(run)
    run.close()
    report = segment_to_zarr(volume, plain_student, out, resume=True, tile=TILE)
    assert report.finished >= 3
    segment_to_zarr(volume, plain_student, tmp_path / "once.zarr", tile=TILE)
    assert files_of(out / "0") == files_of(tmp_path / "once.zarr" / "0")


def test_what_goes_wrong_on_a_worker_is_said_in_one_line(plain_student, workers, tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", STACK, chunks=(1, 200, 200), levels=1)
    (path / "0" / "c" / "4" / "0" / "0").write_bytes(b"nothing of the kind")
    with pytest.raises(InputFileError, match=r"a\.zarr.*z 4:5"):
        segment_to_zarr(open_volume(path), plain_student, tmp_path / "out.zarr", cluster=workers)
    with pytest.raises(SettingsError, match="array in memory"):
        segment_to_zarr(open_volume(STACK), plain_student, tmp_path / "mem.zarr", cluster=workers)
    (path / "0" / "c" / "4" / "0" / "0").unlink()
    with pytest.raises(SettingsError, match="another volume"):  # it has changed meanwhile
        segment_to_zarr(open_volume(path), plain_student, tmp_path / "out.zarr", resume=True, cluster=workers)
    report = segment_to_zarr(open_volume(path), plain_student, tmp_path / "out.zarr", overwrite=True, cluster=workers)
    assert report.missing_chunks == 1


def test_a_scheduler_without_workers_is_said(volume, plain_student, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(n_workers=0, dashboard_address=None, host="127.0.0.1") as cluster:
        address = cluster.scheduler_address
        with pytest.raises(SettingsError, match="no worker yet"):
            segment_to_zarr(volume, plain_student, tmp_path / "out.zarr", cluster=address)
    assert not (tmp_path / "out.zarr").exists()


class LostClient:
    """A client whose scheduler has died: tasks are cancelled, and it is told at the first or the second look."""

    def __init__(self, *, is_told: bool) -> None:
        self.is_told = is_told

    def run(self, *_, **__):
        return {"worker": "cpu float32"}

    def nthreads(self):
        if self.is_told:
            raise OSError("Timed out trying to connect")
        return {}

    def submit(self, *_, **__):
        return self

    def result(self):
        raise CancelledError("cancelled for reason: scheduler-connection-lost\nClient lost the connection")

    def register_plugin(self, *_, **__):
        pass

    def cancel(self, *_):
        raise OSError("closed")

    unregister_worker_plugin = cancel


@pytest.mark.parametrize("is_told", [False, True])
def test_a_scheduler_that_dies_is_said_in_one_line(volume, plain_student, tmp_path, monkeypatch, is_told):
    class Completed(list):
        add = list.append

        def __next__(self):
            return self.pop()

    monkeypatch.setattr("distributed.as_completed", Completed)
    client = Connection(LostClient(is_told=is_told), "cpu", "float32")
    with pytest.raises(OutputError, match=r"the scheduler was lost; what is finished is kept.* resume$"):
        segment_to_zarr(volume, plain_student, tmp_path / "out.zarr", tile=TILE, cluster=client)


@pytest.mark.parametrize(
    "address", ["", "lokal", "local:x", "http://a:1", "slurm:many", "tcp://", "tcp://localhost", "tls://:8786"]
)
def test_what_is_no_cluster_is_refused(address):
    with pytest.raises(SettingsError, match="cluster"), connect(address):
        pass


def test_an_encrypted_scheduler_needs_certificates():
    with pytest.raises(SettingsError, match="certificates"), connect("tls://localhost:8786"):
        pass


def test_slurm_without_its_configuration_is_said(monkeypatch):
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue: pip install dask-jobqueue")
    with pytest.raises(SettingsError, match="not configured for SLURM"), connect("slurm:2"):
        pass


def test_the_command_uses_a_scheduler_that_runs(volume, plain_student, workers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_student.save("m.safetensors")
    address = workers.client.scheduler.address
    command = ["segment", "image.ome.zarr", "-m", "m.safetensors", "-o", "out.ome.zarr", "--region", "0:2"]
    assert main([*command, "--cluster", address]) == FINE
    assert main([*command, "--device", "cpu", "--resume"]) == FINE
