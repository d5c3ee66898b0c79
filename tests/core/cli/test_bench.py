"""The commands of the benchmark."""

import json
import os
import subprocess
import sys

import pytest

from distillfss_core.bench import jobs
from distillfss_core.cli import bench as cli_bench
from distillfss_core.cli.console import ERROR, FINE, USAGE
from distillfss_core.cli.main import main
from layouts import write_pairs


@pytest.fixture
def here(tmp_path, monkeypatch):
    write_pairs(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(jobs, "run_apart", lambda job, threads: jobs.run_job(job))


def test_peers_are_measured_kept_and_shown(here, in_this_process, capsys):
    command = [
        "bench",
        "peers",
        "--data",
        "own=mine",
        "--shots=2",
        "--seeds=1",
        "--baselines=forest",
        "--max-test-images=1",
    ]
    assert main([*command, "-o", "out"]) == FINE
    said = capsys.readouterr().out
    assert "your own, 2 shots, dense (100.0 % of the support annotated), supports seed 0, 1 of 2 test pictures" in said
    assert "your own, 2 shots, scribbles" in said
    assert said.count("| random forest | ") == 2
    assert (here / "out" / "peers.md").read_text() == said
    lines = (here / "out" / "peers.jsonl").read_text()
    assert lines.count("\n") == 2
    assert main([*command, "-o", "out", "--json"]) == FINE
    again = json.loads(capsys.readouterr().out)
    assert [r["annotation"] for r in again] == ["dense", "scribbles"]
    assert (here / "out" / "peers.jsonl").read_text() == lines


def test_accuracy_stands_beside_the_paper(here, in_this_process, capsys):
    command = [
        "bench",
        "accuracy",
        "--data",
        "nucleus=mine",
        "--shots=5",
        "--repeats=1",
        "--methods=teacher",
        "--max-test-images=1",
    ]
    assert main([*command, "--device=cpu"]) == FINE
    said = capsys.readouterr().out
    assert "| Nucleus | 5 | seed 0 | 1 of 2 | 0." in said
    assert "| 0.7312 |" in said
    assert "arXiv:2512.05613" in said
    assert (here / cli_bench.FOLDER / "accuracy.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["peers", "--data", "own=nowhere"], "there is no folder nowhere"),
        (["peers", "--data", "cityscapes=mine"], "cityscapes"),
        (["peers", "--data", "own=mine", "--baselines=ilastik"], "ilastik"),
        (["peers", "--data", "own=mine", "--supports=boxes"], "boxes"),
        (["accuracy", "--data", "own=mine", "--methods=forest"], "forest"),
        (["peers", "--data", "own=mine", "--data", "own=other"], "--data own is given twice"),
        (["speed", "--device=quantum"], "quantum"),
    ],
)
def test_what_cannot_be_measured_is_one_line(here, capsys, arguments, text):
    assert main(["bench", *arguments]) == ERROR
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert text in said


@pytest.mark.parametrize("arguments", [["peers"], ["peers", "--data", "own"], [], ["speed", "--shots=0"]])
def test_wrong_usage_is_code_2(capsys, arguments):
    assert main(["bench", *arguments]) == USAGE
    assert "--help" in capsys.readouterr().err


def test_help_loads_nothing_heavy(root):
    code = (
        "import sys; from distillfss_core.cli.main import main; main(['bench', 'peers', '--help']); "
        "print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_an_unknown_baseline_is_named_with_its_option(here, capsys):
    assert main(["bench", "peers", "--data", "own=mine", "--baselines=forrest", "-o", "out"]) == ERROR
    assert "--baselines has 'forrest'; choose of" in capsys.readouterr().err
