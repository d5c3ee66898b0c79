"""SIGTERM and SIGHUP do what Ctrl-C does, in commands and in the workers of a cluster."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from distillfss_core import StudentModel, open_volume, segment_to_zarr
from distillfss_core.cli.console import FINE, INTERRUPTED
from distillfss_core.cli.main import main
from distillfss_core.cli.stopping import check_stopped, stop_code, stop_on_signals
from distillfss_core.io.writing import write_labels
from distillfss_core.labelstore import layout as label_layout
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.training import DistillRun
from pictures import blobs
from volumes import write_ome_zarr

FEW = ["--steps=3", "--crops=4", "--queries=1", "--shots=1", "--crop-size=64", "--zoom=1", "--device=cpu"]
STACK = np.stack([blobs(seed, 64).image for seed in range(3)])
TERM, HUP = int(signal.SIGTERM), int(signal.SIGHUP)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGHUP")


@pytest.fixture(autouse=True)
def default_handlers():
    """The signals have their default handlers, whatever earlier tests of this process have left."""
    defaults = {signal.SIGINT: signal.default_int_handler, TERM: signal.SIG_DFL, HUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, defaults[number] if handler is None else handler)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """s.tif with l.tif, its labels, in the current folder; no halo is measured."""
    monkeypatch.setattr(Segmenter, "fit_halo", lambda self, image: None)
    write_labels(tmp_path / "s.tif", STACK)
    write_labels(tmp_path / "l.tif", np.stack([blobs(seed, 64).labels for seed in range(3)]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def signal_at(step: int, numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Send signals within the training step after this one."""
    original, taken = DistillRun.__next__, []

    def one_step(self):
        if len(taken) == step:
            for number in numbers:
                signal.raise_signal(number)
        current = original(self)
        if not current.is_preparation:
            taken.append(current)
        return current

    monkeypatch.setattr(DistillRun, "__next__", one_step)


@pytest.mark.parametrize(("numbers", "code"), [([TERM], 143), ([HUP], 129)])
def test_a_training_that_is_told_to_end_saves_the_best_so_far(here, capsys, monkeypatch, numbers, code):
    """scancel, docker stop, or logging out ends a training."""
    signal_at(2, numbers, monkeypatch)
    assert main(["distill", "s.tif", "l.tif", "-o", "m.safetensors", *FEW]) == code
    assert "interrupted at step 2 of 3" in capsys.readouterr().err
    assert StudentModel.load("m.safetensors").training["steps"] == 2
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_signals_while_the_model_is_saved_do_not_lose_it(here, monkeypatch):
    """Logging out sends SIGTERM, and SIGHUP a moment later."""
    signal_at(2, [TERM], monkeypatch)
    original = StudentModel.save

    def save(self, *args, **options):
        signal.raise_signal(HUP)
        signal.raise_signal(TERM)
        signal.raise_signal(signal.SIGINT)
        original(self, *args, **options)

    monkeypatch.setattr(StudentModel, "save", save)
    assert main(["distill", "s.tif", "l.tif", "-o", "m.safetensors", *FEW]) == 143
    assert StudentModel.load("m.safetensors").training["steps"] == 2


def test_a_signal_after_the_last_step_saves_the_model(here, monkeypatch):
    """The signal comes while the halo of the finished model is measured."""
    monkeypatch.setattr(Segmenter, "fit_halo", lambda self, image: signal.raise_signal(TERM))
    assert main(["distill", "s.tif", "l.tif", "-o", "m.safetensors", *FEW]) == 143
    assert StudentModel.load("m.safetensors").training["steps"] == 3


def test_a_training_without_a_student_says_so(here, capsys, monkeypatch):
    """A two-stage training is ended while it refines its teacher."""
    signal_at(2, [TERM], monkeypatch)
    assert main(["distill", "s.tif", "l.tif", "-o", "m.safetensors", "--method=two-stage", *FEW]) == 143
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "interrupted, and nothing was saved: there is no student after 2 steps" in err
    assert not Path("m.safetensors").exists()


def test_a_stack_that_is_interrupted_leaves_no_parts(here, capsys, monkeypatch, plain_student):
    """Walltime ends while the planes of a stack are segmented; an older result is there."""
    plain_student.save("m.safetensors")
    Path("o.tif").write_bytes(b"older")
    original, planes = StudentModel.predict_labels, []

    def predict(self, plane):
        planes.append(plane)
        if len(planes) == 2:
            signal.raise_signal(TERM)
        return original(self, plane)

    with monkeypatch.context() as patch:
        patch.setattr(StudentModel, "predict_labels", predict)
        assert main(["segment", "s.tif", "-m", "m.safetensors", "-o", "o.tif", "--overwrite"]) == 143
    assert capsys.readouterr().err == "distillfss: interrupted\n"
    assert Path("o.tif").read_bytes() == b"older"
    assert sorted(os.listdir()) == ["l.tif", "m.safetensors", "o.tif", "s.tif"]


def test_a_signal_that_is_ignored_stays_ignored(here, monkeypatch):
    """The command runs under nohup."""
    signal_at(1, [HUP], monkeypatch)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["distill", "s.tif", "l.tif", "-o", "m.safetensors", *FEW]) == FINE
    finally:
        signal.signal(signal.SIGHUP, before)
    assert StudentModel.load("m.safetensors").training["steps"] == 3


def test_handlers_are_put_back_and_a_lost_exception_is_raised_again(monkeypatch):
    """The signal comes within a destructor, whose exceptions Python drops."""

    class Dropped:
        def __del__(self):
            signal.raise_signal(TERM)

    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals():
        check_stopped()
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
        Dropped()
        with pytest.raises(KeyboardInterrupt):
            check_stopped()
        assert stop_code() == 143
    assert signal.getsignal(signal.SIGTERM) is before
    with stop_on_signals():
        assert stop_code() == INTERRUPTED


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_a_training_with_its_model(here, root):
    """The window of the terminal is closed: SIGHUP, and nothing can be printed any more."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = ["distill", "s.tif", "l.tif", "-o", "m.safetensors", *FEW, "--steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "distillfss_core.cli.main", *command],
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    shown = b""
    while b"iou" not in shown and b"training, " not in shown:
        shown += os.read(master, 1 << 16)
    os.close(master)
    assert process.wait(60) == 129
    assert StudentModel.load("m.safetensors").training["steps"] >= 1
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_a_worker_that_slurm_ends_gives_its_shards_back(tmp_path, plain_student, monkeypatch):
    """SLURM sends SIGTERM to a job before its walltime; the other workers go on."""
    distributed = pytest.importorskip("distributed")
    from distillfss_core.segmentation.cluster import connect
    from distillfss_core.segmentation.to_zarr import iter_segment

    monkeypatch.setattr(label_layout, "_SIDE", 64)
    monkeypatch.setattr(label_layout, "_SHARD", 2 * 64**2)
    stack = np.stack([blobs(seed, 200).image for seed in range(8)])
    volume = open_volume(write_ome_zarr(tmp_path / "v.zarr", stack, chunks=(1, 200, 200), levels=1))
    segment_to_zarr(volume, plain_student, tmp_path / "once.zarr", tile=64)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        connect(cluster.scheduler_address) as connection,
    ):
        run = iter_segment(volume, plain_student, tmp_path / "many.zarr", tile=64, cluster=connection)
        next(run)
        client = connection.client
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGTERM)
        steps = list(run)
        deadline = time.monotonic() + 60
        while len(client.scheduler_info()["workers"]) > 1 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(client.scheduler_info()["workers"]) == 1
        removed = [event for _, event in client.get_events("all") if event.get("action") == "remove-worker"]
    assert steps[-1].index == steps[-1].total
    assert [event["expected"] for event in removed] == [True]
    for path in ("0/c", "0/zarr.json"):
        assert files_of(tmp_path / "many.zarr" / path) == files_of(tmp_path / "once.zarr" / path)


def files_of(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.slow
def test_kills_lose_nothing(root, tmp_path):
    """Commands are killed at random moments and run again."""
    command = [sys.executable, "benchmarks/kills.py", str(tmp_path), "--kills=4", "--planes=4", "--size=96"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--cases=distill,segment,batch,instances"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["kills"], counts["equal_after_the_second_run"]) == (4, 4)
    assert counts["lost"] == counts["broken"] == counts["wrong_codes"] == counts["left_by_others"] == 0


@pytest.mark.slow
def test_a_cluster_on_slurm_takes_no_handler(tmp_path):
    """Ctrl-C in a run on SLURM: dask-jobqueue has handlers of its own, set when it is imported."""
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue: pip install dask-jobqueue")
    program = (
        "import signal\n"
        "from distillfss_core import SettingsError\n"
        "from distillfss_core.segmentation import cluster\n"
        "numbers = (signal.SIGINT, signal.SIGTERM)\n"
        "before = [signal.getsignal(number) for number in numbers]\n"
        "try:\n"
        "    cluster._start('slurm', 1)\n"
        "except SettingsError:\n"
        "    pass  # there is no SLURM\n"
        "import sys\n"
        "assert 'dask_jobqueue' in sys.modules\n"
        "assert [signal.getsignal(number) for number in numbers] == before\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
