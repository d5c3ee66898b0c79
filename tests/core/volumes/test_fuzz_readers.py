"""The benchmark of damaged inputs finds what is wrong, and finds nothing in a dozen cases."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "fuzz_readers.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_readers", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_differs_without_a_word_is_a_defect(fuzz, tmp_path):
    data = fuzz.truth()
    assert fuzz.judge("tiff", "cut", tmp_path / "a.tif", data, warned=False) == "equal"
    zeros = data.copy()
    zeros[3] = 0
    assert fuzz.judge("tiff", "cut", tmp_path / "a.tif", zeros, warned=False) == "silent"
    assert fuzz.judge("tiff", "cut", tmp_path / "a.tif", data[:2], warned=False) == "silent"
    assert fuzz.judge("tiff", "cut", tmp_path / "a.tif", zeros, warned=True) == "warning"
    np.save(tmp_path / "a.npy", zeros)
    assert fuzz.judge("npy", "flip", tmp_path / "a.npy", zeros, warned=False) == "as stated"
    assert fuzz.judge("npy", "flip", tmp_path / "a.npy", zeros + 1, warned=False) == "silent"


def test_a_dozen_cases_have_no_defect_and_a_stopped_run_goes_on(tmp_path):
    import subprocess

    results = tmp_path / "fuzz.jsonl"
    command = [sys.executable, str(PROGRAM), "--seed", "3", "--results", str(results), "--cases"]
    subprocess.run([*command, "5"], check=True, capture_output=True)
    five = results.read_text().splitlines()
    table = subprocess.run([*command, "12"], check=True, capture_output=True, text=True).stdout
    cases = [json.loads(line) for line in results.read_text().splitlines()]
    assert results.read_text().splitlines()[:5] == five
    assert [case["number"] for case in cases] == list(range(12))
    assert table.splitlines()[-1].split() == ["all", *(str(sum(c["outcome"] == o for c in cases)) for o in OUTCOMES)]


OUTCOMES = ("error", "warning", "equal", "as stated", "silent", "traceback", "hang", "memory")
