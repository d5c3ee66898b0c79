"""What concerns the process as a whole."""

import resource
import sys

import pytest

from distillfss_core.nn.device import leave_a_core_free
from distillfss_core.process import (
    KEEP,
    leave_triton_out,
    may_change_process,
    peak_mb,
    reset_peak,
    resident_mb,
    return_freed_memory,
)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_memory_is_in_megabytes_of_a_million_bytes():
    reset_peak()
    block = b"x" * 200_000_000
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    assert resident_mb() == pytest.approx(pages * resource.getpagesize() / 1e6, rel=0.02)
    assert peak_mb() >= resident_mb() - 1
    del block


@pytest.mark.parametrize(("value", "may"), [(None, True), ("", True), ("0", True), ("1", False), ("yes", False)])
def test_settings_of_the_process_are_left_where_the_user_wants_them_kept(monkeypatch, value, may):
    monkeypatch.delenv(KEEP, raising=False)
    if value is not None:
        monkeypatch.setenv(KEEP, value)
    calls: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", calls.append)
    leave_a_core_free()
    assert may_change_process() is may
    assert bool(calls) is may


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps what is freed in small pieces")
def test_memory_that_is_freed_in_small_pieces_returns_to_the_system():
    pieces = [bytearray(100_000) for _ in range(2000)]
    last = bytearray(100_000)  # above the others, so that glibc does not return them by itself
    full = resident_mb()
    pieces.clear()
    return_freed_memory()
    assert resident_mb() < full - 100
    del last


def test_triton_is_left_out_unless_it_is_there_or_the_user_forbids_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", "loaded before")
    leave_triton_out()
    assert sys.modules["triton"] == "loaded before"
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.setenv(KEEP, "1")
    leave_triton_out()
    assert "triton" not in sys.modules
    monkeypatch.delenv(KEEP)
    leave_triton_out()
    with pytest.raises(ImportError):
        import triton  # noqa: F401
    monkeypatch.delitem(sys.modules, "triton")
