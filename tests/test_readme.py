"""The README's commands and its Python run, on a small generated sample."""

import re
import shlex
from fractions import Fraction

import numpy as np
import pytest

from distillfss_core.io.writing import write_labels
from distillfss_core.samples import generate_sample
from volumes import write_ome_zarr


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("distillfss ")]


@pytest.mark.parametrize("page", ["README.md", "docs/volumes.md", "docs/bench.md"])
def test_every_command_of_a_page_parses(root, page):
    from distillfss_core.cli.main import build_parser

    found = commands((root / page).read_text(encoding="utf-8"))
    assert len(found) >= 5
    for arguments in found:
        try:
            build_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page} has: distillfss {shlex.join(arguments)}")


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """The current folder, as the README speaks of it: images/, labels/ of a few of them, a stack, volumes."""
    sample = generate_sample(planes=11, size=64)
    for folder in (tmp_path, tmp_path / "my_data"):
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True)
        for z in range(4):
            write_labels(folder / "images" / f"plane_{z:02d}.tif", sample.image[z])
        for z in (0, 2):
            write_labels(folder / "labels" / f"plane_{z:02d}_mask.tif", (sample.labels[z] > 0).astype(np.uint8))
    write_labels(tmp_path / "stack.tif", sample.image)
    write_labels(tmp_path / "stack_labels.tif", sample.labels)
    write_ome_zarr(tmp_path / "brain.ome.zarr", sample.image)
    write_ome_zarr(tmp_path / "folder_of_volumes" / "a.ome.zarr", sample.image[:2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_its_order(readme, own_data, capsys, monkeypatch):
    from distillfss_core.cli.main import main
    from distillfss_core.models.segmenter import Segmenter

    monkeypatch.setattr(Segmenter, "fit_halo", lambda self, image: None)  # takes longer than these trainings

    few = ["--steps=2", "--crops=4", "--queries=1", "--shots=1", "--crop-size=64", "--zoom=1"]
    for arguments in commands(readme):
        trains = arguments[0] in ("distill", "demo")
        assert main([*arguments, *(few if trains else [])]) == 0, capsys.readouterr().err
    for name in ("nuclei.safetensors", "segmented/plane_03.tif", "stack_segmented_uncertainty.tif", "objects.csv"):
        assert (own_data / name).stat().st_size > 0


@pytest.mark.slow
def test_the_python_of_the_readme_runs(readme, own_data, monkeypatch):
    import distillfss_core
    from distillfss_core import DistillSettings, distill

    # The README's code has the default settings; here only that it runs is asked, so a few steps will do.
    few = DistillSettings(steps=2, crops=4, queries=1, shots=1, crop_size=64, zoom=Fraction(1))
    monkeypatch.setattr(distillfss_core, "distill", lambda support: distill(support, few))
    found = blocks(readme, "python")
    assert found
    namespace: dict[str, object] = {}
    for code in found:
        exec(compile(code, "README.md", "exec"), namespace)
    assert (own_data / "nuclei.safetensors").stat().st_size > 0
