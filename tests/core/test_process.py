"""What concerns the process as a whole."""

import resource
import sys

import pytest

from distillfss_core.process import peak_mb, reset_peak, resident_mb


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_memory_is_in_megabytes_of_a_million_bytes():
    reset_peak()
    block = b"x" * 200_000_000
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    assert resident_mb() == pytest.approx(pages * resource.getpagesize() / 1e6, rel=0.02)
    assert peak_mb() >= resident_mb() - 1
    del block
