"""Nothing is sent to anybody, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from distillfss_core.io.writing import write_labels
from pictures import blobs

FEW = ["--steps=2", "--crops=4", "--queries=1", "--shots=1", "--crop-size=64", "--zoom=1", "--device=cpu"]

WATCHED = """
import json, os, socket, sys, threading, _socket
calls = []
def refuse(name):
    def call(self, *args, **options):
        calls.append(f"{name} {args}")
        raise OSError("no network here")
    return call
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse(name))
socket.getaddrinfo = refuse("getaddrinfo")
from distillfss_core.cli.main import main
codes = [main(command) for command in json.loads(sys.argv[1])]
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon:
        thread.join(20)
sent = [name for name in sys.modules if name.startswith("openvino_telemetry")]
print(json.dumps({"codes": codes, "calls": calls, "telemetry": sent, "ort": os.environ["ORT_DISABLE_TELEMETRY"]}))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """s.tif with l.tif, its labels, in the current folder."""
    write_labels(tmp_path / "s.tif", np.stack([blobs(seed, 64).image for seed in range(2)]))
    write_labels(tmp_path / "l.tif", np.stack([blobs(seed, 64).labels for seed in range(2)]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_commands_call_nobody_and_leave_a_home_empty(here, root):
    """Data that must not leave the hospital are segmented with every engine, in a fresh home."""
    commands = [["distill", "s.tif", "l.tif", "-o", "m.safetensors", *FEW]]
    for engine in ("auto", "torch", "onnxruntime", "openvino"):
        if engine in ("auto", "torch") or find_spec(engine):
            commands.append(["segment", "s.tif", "-m", "m.safetensors", "-o", f"{engine}.tif", f"--engine={engine}"])
    commands += [
        ["batch", "s.tif.csv", "-m", "m.safetensors", "-o", "out"],
        ["instances", "out/s.ome.zarr", "-o", "n.ome.zarr", "--table", "t.csv"],
        ["evaluate", "torch.tif", "l.tif"],
        ["info", "m.safetensors"],
        ["backbones"],
    ]
    if find_spec("onnx") and find_spec("onnxruntime"):
        commands.append(["export", "m.safetensors", "-o", "m.onnx"])
    (here / "s.tif.csv").write_text("volume\ns.tif\n")
    home, temporary = here / "home", here / "tmp"
    home.mkdir()
    temporary.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "HF_", "CI"))}
    environment = kept | {"PYTHONPATH": str(root / "src"), "HOME": str(home), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {"codes": [0] * len(commands), "calls": [], "telemetry": [], "ort": "1"}
    assert list(home.rglob("*")) == []
    assert [path for path in temporary.rglob("*") if not path.name.startswith("torchinductor_")] == []  # docs name it


def test_a_user_who_wants_telemetry_has_it(root):
    """The switch of ONNX Runtime is set by the user."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "ORT_DISABLE_TELEMETRY": "0"}
    code = "import os, distillfss_core; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
