"""The benchmark of damaged inputs for the commands finds what is wrong, and finds nothing in a few cases."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("fuzz_commands")


def ran(code: int, err: str = "", result: object = None) -> dict:
    return {"code": code, "out": "", "err": err, "result": {"labels": result}}


def test_the_outcome_of_a_command_is_judged(fuzz, tmp_path):
    path, expected = tmp_path / "a.tif", {"labels": [0, 1]}
    error = f"distillfss: error: {path}: is cut short\n"

    def judged(outcome: dict, *stated: dict) -> str:
        return fuzz.judge(path, outcome, lambda: expected, [lambda other=other: other for other in stated])

    assert judged(ran(1, error)) == "error"
    assert judged(ran(1, "distillfss: error: is cut short\n")) == "traceback"  # names no file
    assert judged(ran(1, error * 2)) == "traceback"
    assert judged(ran(1, f"Traceback (most recent call last):\n{error}")) == "traceback"
    assert judged(ran(0, "", [0, 1])) == "equal"
    assert judged(ran(0, "", [0, 0])) == "silent"
    assert judged(ran(0, "distillfss: warning: dark\n", [0, 0])) == "warning"
    assert judged(ran(0, "", [0, 0]), {"labels": [0, 0]}) == "as stated"


@pytest.mark.slow
def test_a_few_cases_have_no_defect(tmp_path):
    results = tmp_path / "fuzz.jsonl"
    command = [sys.executable, str(FOLDER / "fuzz_commands.py"), "--cases", "6", "--seed", "5"]
    done = subprocess.run([*command, "--results", str(results)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [json.loads(line) for line in results.read_text().splitlines()]
    assert [case["number"] for case in cases] == list(range(6))
    assert {case["outcome"] for case in cases} <= {"error", "warning", "equal", "as stated"}
