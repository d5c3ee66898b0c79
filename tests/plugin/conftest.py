"""A place without a screen: Qt offscreen, and Xvfb for the tests that open a real window."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

WITHOUT_QT = ["test_sample_data.py"]


def pytest_ignore_collect(collection_path, config):
    """Without napari (extra 'napari') or what Qt needs of the system, there is nothing to test here."""
    if collection_path.name.startswith("test_") and collection_path.name not in WITHOUT_QT:
        try:
            import napari  # noqa: F401
            from qtpy import QtWidgets  # noqa: F401
        except ImportError:
            return True
    return None


DRAWS = """
from qtpy.QtGui import QGuiApplication, QOpenGLContext
app = QGuiApplication([])
raise SystemExit(0 if QOpenGLContext().create() else "no OpenGL context")
"""


@pytest.fixture(scope="session")
def display(qapp):
    """A screen that OpenGL can draw on: the one there is, or Xvfb."""
    from qtpy.QtGui import QOpenGLContext

    given = os.environ.get("DISPLAY")
    draws = bool(given) and _draws(given)
    if not draws:
        if shutil.which("Xvfb") is None:
            pytest.skip("a window needs a screen that OpenGL draws on; install Xvfb")
        os.environ["DISPLAY"] = _start_xvfb()
        draws = _draws(os.environ["DISPLAY"])
    if not draws or not QOpenGLContext().create():
        tried = f"on the screen {given!r} nor on Xvfb's" if given else "on Xvfb's"
        pytest.skip(f"OpenGL does not draw {tried} {os.environ['DISPLAY']!r}; install libgl1-mesa-dri, or try again")
    _abort_without_server()
    return os.environ["DISPLAY"]


_ABORT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: os.abort())


def _abort_without_server():
    """Xlib ends a process whose server has gone, silently; an abort leaves a traceback of all threads."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libX11.so.6").XSetIOErrorHandler(_ABORT)


def _draws(display):
    """Asked in another process, as Qt keeps the first display that it has tried."""
    environment = {**os.environ, "DISPLAY": display}
    return not subprocess.run(
        [sys.executable, "-c", DRAWS], env=environment, capture_output=True, timeout=120
    ).returncode


def _start_xvfb():
    # Qt keeps its connection to the end of this process, and a server that ends earlier takes the process with it:
    # so the server ends when the pipe it reads from is closed, which this process leaves to the system.
    alive, _ = os.pipe()
    end, other = os.pipe()
    command = f"Xvfb -displayfd {other} -screen 0 1280x800x24 -nolisten tcp -noreset & cat >/dev/null; kill $!"
    subprocess.Popen(
        ["sh", "-c", command], stdin=alive, pass_fds=[other], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(alive)
    os.close(other)
    with os.fdopen(end) as told:
        return f":{told.readline().strip()}"


@pytest.fixture(autouse=True)
def _no_progress_is_left(request):
    """What is still in the activity dock once everything is closed would stay there for good."""
    if not request.config.pluginmanager.hasplugin("pytest-qt"):
        yield
        return
    from napari.utils import progress

    qtbot = request.getfixturevalue("qtbot")
    yield
    qtbot.waitUntil(lambda: not progress._all_instances, timeout=20_000)


@pytest.fixture
def viewer(qtbot):
    """napari without its window: layers, dims and slicing are the real ones."""
    from napari.components import ViewerModel

    return ViewerModel()


@pytest.fixture
def open_dock(qtbot, tmp_path):
    """Opens the dock on a viewer; closed at the end, its work ended."""
    from napari_distillfss._widgets.dock import DistillDock

    docks = []

    def opened(viewer, folder=None):
        docks.append(DistillDock(viewer, folder or tmp_path / "kept"))
        return docks[-1]

    yield opened
    for dock in docks:
        dock.session.close()
        qtbot.waitUntil(lambda dock=dock: not dock.session.busy and not dock.preview.busy, timeout=60_000)
        dock.deleteLater()


@pytest.fixture
def told():
    """Gives the texts of napari's notifications since the test began."""
    from napari.utils.notifications import notification_manager

    notification_manager.records.clear()
    return lambda: [record.message for record in notification_manager.records]


@pytest.fixture
def open_path(qtbot):
    """Opens a path in a dock, and waits until it is open or has failed."""

    def opened(dock, path):
        dock.volume.open_path(path)
        qtbot.waitUntil(lambda: not dock.volume.opening.running, timeout=60_000)

    return opened


@pytest.fixture(scope="session")
def sample():
    from distillfss_core.samples import generate_sample

    return generate_sample(planes=8, size=96)


@pytest.fixture
def nuclei(viewer, sample):
    """The sample's image as a layer, in micrometers."""
    return viewer.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)


@pytest.fixture
def painted_truth(sample):
    """Truth as it would be painted: 1 background, 2 nucleus."""
    return (sample.labels > 0).astype(np.uint8) + 1


@pytest.fixture(scope="session")
def few():
    """Settings of a training that takes a second."""
    from distillfss_core import DistillSettings

    return DistillSettings(steps=3, crops=4, queries=1, shots=1, crop_size=64, zoom=Fraction(1))


@pytest.fixture(scope="session")
def student(tmp_path_factory, few):
    """A student that learned next to nothing, as a file."""
    from distillfss_core import AnnotatedSlice, SupportSet, distill
    from distillfss_core.samples import generate_sample
    from napari_distillfss._process import keep_triton_out

    keep_triton_out()
    sample = generate_sample(planes=2, size=96)
    slices = [AnnotatedSlice(i, (t > 0).astype(np.uint8)) for i, t in zip(sample.image, sample.labels, strict=True)]
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    distill(SupportSet(slices, planes_of_one_volume=True), few).save(path)
    return path
