"""What opening the dock loads."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from qtpy.QtWidgets import QApplication
app = QApplication([])
from napari.components import ViewerModel
import numpy as np
viewer = ViewerModel()
from napari_distillfss._widgets.dock import DistillDock
dock = DistillDock(viewer)
print(*sorted({m.partition('.')[0] for m in sys.modules}))
dock.session.close()
"""


def test_opening_the_dock_loads_no_torch(root, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "napari_distillfss" in loaded
    assert not loaded & {"torch", "timm", "torchvision"}


READERS = """
import sys, threading
from qtpy.QtWidgets import QApplication
app = QApplication([])
from napari.components import ViewerModel
from napari_distillfss._widgets.dock import DistillDock
READERS = "distillfss_core.volumes.opening"
seen = []
class Finder:
    def find_spec(self, name, *_):
        if name == READERS:
            seen.append(threading.current_thread() is threading.main_thread())
sys.meta_path.insert(0, Finder())
dock = DistillDock(ViewerModel())
for thread in threading.enumerate():
    if thread is not threading.main_thread() and not thread.daemon:
        thread.join()
print(READERS in sys.modules, seen)
dock.session.close()
"""


def test_the_readers_of_volumes_are_imported_beside_the_window(root, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", READERS], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.split(maxsplit=1) == ["True", "[False]\n"], done.stderr


LOADING = """
import sys
import distillfss_core as core
from napari_distillfss._tasks import load_torch
core.leave_a_core_free = lambda: print("torch" in sys.modules, "libtorch_cpu" in open("/proc/self/maps").read())
load_torch()
import torch
print(torch.ones(2).sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_libraries_of_torch_are_open_before_it_is_imported(root):
    done = subprocess.run(
        [sys.executable, "-c", LOADING],
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.split() == ["False", "True", "2.0"], done.stderr
