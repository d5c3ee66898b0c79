"""Settings of the whole process that the dock and its jobs change; docs/architecture.md lists all of them."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

import distillfss_core as core

Value = TypeVar("Value")

_SWITCH = 0.001  # seconds
THREADS = "distillfss "  # that names of the threads of jobs begin with
_RARELY = 200  # collections of the middle generation before one of all objects; Python's default is 10


def keep_triton_out() -> None:
    """Disable triton where Mesa draws by LLVM (no GPU, remote desktops): two copies of LLVM crash the process.

    Nothing here needs triton. What has loaded it before is left as it is.
    """
    if not core.may_change_process():
        return
    maps = Path("/proc/self/maps")
    if "triton" not in sys.modules and maps.is_file() and "libLLVM" in maps.read_text():
        sys.modules["triton"] = None  # type: ignore[assignment]


class _WhileUsed(Generic[Value]):
    """A setting of the process that is another one while anybody uses it.

    After the last user it is what it was, unless somebody else has changed it meanwhile.
    """

    def __init__(
        self, get: Callable[[], Value], put: Callable[[Value], object], during: Callable[[Value], Value]
    ) -> None:
        self._get, self._put, self._of = get, put, during
        self._lock, self._users = Lock(), 0
        self._before = self._during = get()

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = self._get()
                if core.may_change_process():
                    self._put(self._of(self._before))
                self._during = self._get()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._get() == self._during:
                self._put(self._before)


quick_turns = _WhileUsed(sys.getswitchinterval, sys.setswitchinterval, lambda before: min(_SWITCH, before))
"""Give the window's thread its turn at once, while a job runs.

Python passes its lock on every 5 ms, and a turn of the window takes several passes: during work it is every 1 ms.
"""

rare_collections = _WhileUsed(
    gc.get_threshold, lambda value: gc.set_threshold(*value), lambda before: (*before[:2], max(_RARELY, before[2]))
)
"""Collect all garbage rarely, while a dock is open or a job runs.

A collection of all objects stops every thread for 0.2 to 0.4 s once torch's modules are there. Loading them calls for
several, and for one more during the next thing that the user does. Garbage that is new is collected as before.
"""


def _without_told(show: Callable[..., object]) -> Callable[..., object]:
    def shown(message: Warning | str, category: type[Warning], *where: Any) -> None:
        is_ours = threading.current_thread().name.startswith(THREADS)
        if not (is_ours and issubclass(category, (core.IntensityWarning, core.ConsensusWarning))):
            show(message, category, *where)

    return shown


told_warnings = _WhileUsed(
    lambda: warnings.showwarning, lambda show: setattr(warnings, "showwarning", show), _without_told
)
"""Show no notification for what the dock's message states, while a job runs; warnings of other threads are shown."""
