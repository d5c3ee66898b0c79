"""The examples run as they stand."""

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def run_example(root, name: str, folder, *before: str) -> str:
    done = subprocess.run(
        [*before, sys.executable, str(root / "examples" / name)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_folder_of_images(root, tmp_path):
    assert "IoU 0." in run_example(root, "folder_of_images.py", tmp_path)
    assert (tmp_path / "nuclei.safetensors").is_file()


def test_a_large_volume(root, tmp_path):
    printed = run_example(root, "large_volume.py", tmp_path)
    assert "shards computed" in printed
    assert (tmp_path / "objects.csv").read_text().count("\n") > 5


def test_napari_from_a_script(root, tmp_path, monkeypatch):
    """All of it but the event loop, in a real window."""
    pytest.importorskip("napari", reason="napari is not installed")
    if not shutil.which("xvfb-run"):
        pytest.skip("needs a screen; install xvfb and xauth")
    monkeypatch.delenv("QT_QPA_PLATFORM", raising=False)
    script = (root / "examples" / "napari_from_a_script.py").read_text()
    (tmp_path / "script.py").write_text(script.replace("napari.run()", "viewer.close()"))
    run_example(root, str(tmp_path / "script.py"), tmp_path, "xvfb-run", "-a", "-s", "-screen 0 1280x900x24")
