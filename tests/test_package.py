"""What importing costs, and that every public name is there."""

import os
import subprocess
import sys

import pytest


def loaded_after(statement: str, root) -> set[str]:
    """Names of the top-level modules that a fresh process has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_core_loads_neither_torch_nor_a_gui(root):
    loaded = loaded_after("import distillfss_core; distillfss_core.generate_sample; distillfss_core.read_image", root)
    assert "distillfss_core" in loaded
    assert not loaded & {"torch", "timm", "napari", "qtpy", "magicgui", "superqt"}


def test_importing_the_plugin_loads_no_torch(root):
    loaded = loaded_after("import napari_distillfss._sample_data", root)
    assert "napari_distillfss" in loaded
    assert not loaded & {"torch", "timm"}


def test_every_public_name_resolves():
    import distillfss_core

    for name in distillfss_core.__all__:
        assert getattr(distillfss_core, name) is not None, name
        assert name in dir(distillfss_core)


def test_a_name_that_is_not_there_is_an_attribute_error():
    import distillfss_core

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = distillfss_core.no_such_name
