"""Fixtures for all tests."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

if sys.platform == "linux":
    import resource

# The same examples in every run; --hypothesis-profile=random draws others.
settings.register_profile("random")
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

# A test that takes ever more memory fails; otherwise the system ends its process, without a trace.
_MOST_MEMORY = 12 << 30  # bytes; drivers of GPUs reserve more
if sys.platform == "linux" and not Path("/dev/nvidiactl").exists():
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))

# One core is left free: on a machine that is busy elsewhere, a thread on every core is many times slower.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="device of the tests that are marked cuda (default: cuda)")


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """Print the test in which a process ended, at once: a run that is stopped from outside prints no summary."""
    print(f"\nthe process ended in {crashitem}", file=sys.stderr, flush=True)


class _SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_NO_STACK = _SignalStack(None, 2, 0)  # SS_DISABLE


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let handlers of signals run on the usual stack.

    Native libraries (wasmtime, which ngff-zarr runs) give the thread a stack for handlers. Once that is unmapped, any
    signal with a handler ends the process silently, and faulthandler cannot print either.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_NO_STACK), None)


TRAIN_OR_DRAW = {"tiny", "student", "plain_student", "saved_model", "viewer", "open_dock", "workers", "data"}
"""Fixtures of tests that train a model, start a cluster or open a window of napari."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as slow by their fixtures."""
    for item in items:
        if isinstance(item, pytest.Function) and TRAIN_OR_DRAW & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def any_processor() -> Iterator[None]:
    """Tests mean the same on all processors: "auto" is float32, also where a processor multiplies bfloat16.

    Times of engines are neither read from the user's cache nor kept there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distillfss_core.models.engines.multiplies_bfloat16", lambda: False)
        patch.setattr("distillfss_core.models.calibration.cache_file", lambda: None)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="module")
def import_benchmark(root: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of ``benchmarks`` by its name; they import one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "benchmarks")
        yield import_module


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images beside the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared beside the project")
    return folder
