"""Memory of this process in megabytes of 10^6 bytes, and what may be changed of the process as a whole."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

KEEP = "DISTILLFSS_KEEP_PROCESS"
"""Environment variable: 1 leaves the settings of the process as they are, see docs/architecture.md for which."""

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # M_MMAP_THRESHOLD and M_ARENA_MAX of glibc's malloc.h
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def may_change_process() -> bool:
    """Whether settings that hold for the whole process may be changed: unless the user forbids it by `KEEP`."""
    return os.environ.get(KEEP, "0") in ("", "0")


def return_large_buffers() -> None:
    """Let large buffers go back to the system when they are freed, for the rest of the process.

    glibc raises the size from which they do with every one that is freed, and each thread's heap then keeps the most
    that it ever needed: 0.2 GB with readers, writer and an engine. New threads share a heap, which saves 50 MB more.
    Elsewhere nothing is done.
    """
    if may_change_process() and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 23)
        libc.mallopt(_ARENA_MAX, 1)


def leave_triton_out() -> None:
    """Do not load triton, which only GPUs need: it comes with torch's compiler, by timm, and takes 70 MB.

    What has loaded it before is left as it is.
    """
    if may_change_process() and "triton" not in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]


def reset_peak() -> None:
    """Measure the peak anew from here (Linux; elsewhere the peak is that of the process so far)."""
    with suppress(OSError):
        _RESET.write_text("5")


def give_back() -> None:
    """Hand freed memory back to the system, so that what is taken next is seen to be taken."""
    gc.collect()
    return_freed_memory()


def return_freed_memory() -> None:
    """Return memory that was freed in small pieces to the system (glibc; elsewhere nothing is done).

    glibc keeps it for what comes next: after a training 0.3 GB. Other threads go on meanwhile.
    """
    if may_change_process():
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)


def resident_mb() -> float | None:
    """Memory of this process now, megabytes; None where the system does not report it."""
    return _status("VmRSS")


def peak_mb() -> float | None:
    """Largest memory of this process since `reset_peak`, megabytes; None where the system does not report it."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024) / 1e6


def _status(name: str) -> float | None:
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    return int(text.split(f"{name}:")[1].split()[0]) * 1024 / 1e6
