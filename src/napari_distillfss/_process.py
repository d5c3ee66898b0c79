"""Settings of the whole process that jobs of the dock change; docs/architecture.md lists all of them."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from threading import Lock

import distillfss_core as core

_SWITCH = 0.001  # seconds
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


class _Considerate:
    """While a job runs, give the window's thread its turn at once and collect garbage rarely.

    Python passes its lock on every 5 ms, and a turn of the window takes several passes: during work it is every 1 ms.
    A collection of all objects stops every thread for some 0.2 s once torch's modules are there, and loading them calls
    for several. Garbage that is new is collected as before. After the last job both settings are what they were, unless
    somebody else has changed them meanwhile.
    """

    def __init__(self) -> None:
        self._lock, self._working = Lock(), 0
        self._before = self._during = sys.getswitchinterval(), gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            self._working += 1
            if self._working == 1:
                interval, (young, middle, old) = self._before = sys.getswitchinterval(), gc.get_threshold()
                if core.may_change_process():
                    sys.setswitchinterval(min(_SWITCH, interval))
                    gc.set_threshold(young, middle, max(_RARELY, old))
                self._during = sys.getswitchinterval(), gc.get_threshold()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._working -= 1
            if self._working == 0:
                if sys.getswitchinterval() == self._during[0]:
                    sys.setswitchinterval(self._before[0])
                if gc.get_threshold() == self._during[1]:
                    gc.set_threshold(*self._before[1])


considerate = _Considerate()
