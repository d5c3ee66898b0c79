"""The script for a day with a GPU works: all of it, in tiny sizes on a CPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_dry_run_measures_everything_and_training_goes_on_from_its_checkpoint(root, tmp_path):
    out, prepared = tmp_path / "results", tmp_path / "prepared"
    environment = {**os.environ, "OUT": str(out), "PREPARED": str(prepared), "PYTHON": sys.executable}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["bash", str(root / "benchmarks" / "gpu.sh"), *arguments, "--dry"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run()
    rows = json.loads((out / "gpu.json").read_text())["rows"]
    found = {row["what"] for row in rows}
    measured = "tests, network, distill, refine the teacher, planes in memory, zarr to zarr, teacher, meta-training"
    assert found == {*measured.split(", "), "distill a backbone"}
    assert not [row for row in rows if row["case"] == "failed"]
    table = (out / "gpu.md").read_text()
    assert all(row["result"] in table for row in rows)
    assert "Self CPU" in (out / "profile.txt").read_text()
    assert (out / "head.safetensors").stat().st_size > 4e6

    (prepared / "checkpoint").mkdir(parents=True)
    for part in out.glob("checkpoint.*"):
        shutil.copy(part, prepared / "checkpoint")
    assert "going on from the checkpoint" in run("train")
    last = json.loads((out / "gpu.json").read_text())["rows"][-1]
    assert "step 6," in last["result"]

    next((prepared / "checkpoint").iterdir()).unlink()
    with pytest.raises(AssertionError, match="put all of them there, or none"):
        run("train")
