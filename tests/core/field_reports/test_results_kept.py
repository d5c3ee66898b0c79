"""Nothing is replaced unless --overwrite is given, and nothing that is read is ever written."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from distillfss_core import OutputError, StudentModel, label_instances, open_volume
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.io.writing import check_replaceable, write_labels
from distillfss_core.models.segmenter import Segmenter
from pictures import blobs

FEW = ["--steps=2", "--crops=4", "--queries=1", "--shots=1", "--crop-size=64", "--zoom=1", "--device=cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch, saved_model):
    """images/ and labels/ of two planes, stack.tif, m.safetensors; the current folder."""
    monkeypatch.setattr(Segmenter, "fit_halo", lambda self, image: None)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    planes = [blobs(seed, 64) for seed in range(2)]
    for z, plane in enumerate(planes):
        write_labels(tmp_path / "images" / f"p{z}.tif", plane.image)
        write_labels(tmp_path / "labels" / f"p{z}.tif", plane.labels)
    write_labels(tmp_path / "stack.tif", np.stack([plane.image for plane in planes]))
    shutil.copy(saved_model, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments: str) -> str:
    """The one line with which a command is refused; no file has changed."""
    before = files(Path.cwd())
    assert main(list(arguments)) == ERROR
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert files(Path.cwd()) == before
    return lines[0]


def test_a_model_is_replaced_only_on_request(here, capsys):
    """A student of an hour's training bears the name that the next command gives to its own."""
    distill = ["distill", "images", "labels", "-o", "m.safetensors", *FEW]
    assert "m.safetensors is already there; give --overwrite" in refused(capsys, *distill)
    assert main([*distill, "--overwrite"]) == FINE
    assert StudentModel.load("m.safetensors").training["steps"] == 2


@pytest.mark.parametrize("name", ["measurements.csv", "m.onnx", "m.zip", "m.json", "m.pt", "m.npy", "m.xlsx"])
def test_a_model_is_not_written_under_the_name_of_something_else(here, capsys, name):
    """The option -o of distill names a table by mistake."""
    Path(name).write_text("cell,area\n1,20\n")
    for more in ([], ["--overwrite"]):
        assert "end its name in .safetensors" in refused(capsys, "distill", "images", "labels", "-o", name, *FEW, *more)


def test_a_model_is_not_written_over_the_one_it_starts_from(here, capsys):
    """A model is refined with new slices, and -o names the old one."""
    line = refused(
        capsys,
        *("distill", "images", "labels", "--init-from", "m.safetensors", "-o", "m.safetensors", "--overwrite"),
        *FEW[:-2],
    )
    assert "m.safetensors is read by this command" in line


def test_extra_outputs_do_not_replace_the_image(here, capsys):
    """The image is called as the uncertainty of another result would be."""
    os.rename("images/p0.tif", "a_uncertainty.tif")
    line = refused(
        capsys,
        *("segment", "a_uncertainty.tif", "-m", "m.safetensors", "-o", "a.tif", "--uncertainty", "--overwrite"),
    )
    assert "a_uncertainty.tif is read by this command" in line


def test_labels_do_not_go_through_a_link_to_the_image(here, capsys):
    """The folder of results holds a link to an original."""
    Path("out").mkdir()
    Path("out/p0.tif").symlink_to(here / "images" / "p0.tif")
    line = refused(capsys, "segment", "images", "-m", "m.safetensors", "-o", "out", "--overwrite")
    assert "out/p0.tif is read by this command" in line


@pytest.mark.parametrize("command", [["segment", "images"], ["batch", "images"]], ids=lambda c: c[0])
@pytest.mark.parametrize("name", ["out.csv", "out.safetensors", "out.tif"])
def test_a_folder_is_not_called_as_a_file(here, capsys, command, name):
    """A folder of results is asked for with the name of a table."""
    assert "is the name of a file" in refused(capsys, *command, "-m", "m.safetensors", "-o", name)


def test_labels_of_a_volume_do_not_take_the_model_along(here, capsys):
    """The model lies in the folder of the labels that --overwrite deletes."""
    segment = ["segment", "stack.tif", "-o", "out.ome.zarr", "--overwrite", "-m"]
    assert main([*segment, "m.safetensors"]) == FINE
    capsys.readouterr()
    os.rename("m.safetensors", "out.ome.zarr/m.safetensors")
    assert "out.ome.zarr/m.safetensors is read" in refused(capsys, *segment, "out.ome.zarr/m.safetensors")


def test_what_a_user_put_beside_labels_is_not_deleted(here, capsys):
    """Notes and corrected labels lie in the folder of the labels that --overwrite deletes."""
    segment = ["segment", "stack.tif", "-o", "out.ome.zarr", "-m", "m.safetensors", "--overwrite"]
    assert main(segment) == FINE
    capsys.readouterr()
    Path("out.ome.zarr/notes.txt").write_text("mine")
    assert "holds notes.txt" in refused(capsys, *segment)
    os.remove("out.ome.zarr/notes.txt")
    assert main(segment) == FINE


def test_a_table_of_objects_is_replaced_only_on_request(here, capsys):
    """A table of that name was corrected by hand."""
    labels = np.zeros((4, 16, 16), np.uint8)
    labels[1:3, 2:5, 2:5] = 1
    write_labels("l.tif", labels)
    Path("t.csv").write_text("label,by hand\n")
    instances = ["instances", "l.tif", "-o", "n.ome.zarr", "--table", "t.csv"]
    assert "t.csv is already there" in refused(capsys, *instances)
    assert main([*instances, "--overwrite"]) == FINE
    with open("t.csv", newline="") as file:
        assert [row["voxels"] for row in csv.DictReader(file)] == ["18"]
    assert main([*instances, "--resume"]) == FINE  # its own table, unchanged
    Path("t.csv").write_text(Path("t.csv").read_text().replace("18", "19"))
    capsys.readouterr()
    assert "t.csv is already there, with other content" in refused(capsys, *instances, "--resume")
    with pytest.raises(OutputError, match="already there"):
        label_instances(open_volume(labels), here / "other.ome.zarr", table=here / "t.csv")
    with pytest.raises(OutputError, match=r"n\.ome\.zarr is read"):
        label_instances(open_volume(labels), here / "n.ome.zarr", table=here / "n.ome.zarr" / "t.csv")


def test_an_export_is_replaced_only_on_request(here, capsys):
    """An exported network of that name is in use."""
    pytest.importorskip("onnx")
    Path("m.onnx").write_bytes(b"in use")
    export = ["export", "m.safetensors", "-o", "m.onnx"]
    assert "m.onnx is already there" in refused(capsys, *export)
    assert main([*export, "--overwrite"]) == FINE
    assert Path("m.onnx").stat().st_size > 10_000


def test_the_demo_replaces_its_files_only_on_request(here, capsys):
    """The demo has run on own data before, and its model is in use."""
    demo = ["demo", "--data", "images", "labels", "-o", "out", *FEW]
    assert main(demo) == FINE
    capsys.readouterr()
    assert "out/model.safetensors and 2 more are already there" in refused(capsys, *demo)
    assert main([*demo, "--overwrite"]) == FINE


def test_a_meta_training_replaces_no_head_of_another(here, capsys):
    """A head file lies in the folder, but not the checkpoint of its training."""
    Path("heads").mkdir()
    Path("heads/head.safetensors").write_bytes(b"of another")
    assert "heads/head.safetensors is already there" in refused(capsys, "pretrain", "-o", "heads", "--steps=1")


def test_a_batch_does_not_replace_its_table(here, capsys):
    """The table of volumes is called report.csv, or named by --report."""
    Path("report.csv").write_text("volume,region\nstack.tif,0:1\n")
    for more in ([], ["--resume"], ["--overwrite"]):
        line = refused(capsys, "batch", "report.csv", "-m", "m.safetensors", "-o", ".", *more)
        assert "report.csv is read by this command" in line
        line = refused(capsys, "batch", "report.csv", "-m", "m.safetensors", "-o", "out", "--report=report.csv", *more)
        assert "report.csv is read by this command" in line


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_report_is_replaced_by_that_of_the_same_volumes_only(here, capsys, suffix):
    """A batch is resumed, and its report is there; another batch writes to the same folder."""
    report, other = Path(f"out/r{suffix}"), Path("other.csv")
    Path("table.csv").write_text("volume\nstack.tif\n")
    other.write_text("volume,output\nstack.tif,other.ome.zarr\n")
    batch = ["-m", "m.safetensors", "-o", "out", "--report", str(report)]
    Path("out").mkdir()
    report.write_text("volume,of hand\n")
    assert f"{report} is already there" in refused(capsys, "batch", "table.csv", *batch)
    assert f"{report} is already there" in refused(capsys, "batch", "table.csv", *batch, "--resume")
    assert main(["batch", "table.csv", *batch, "--overwrite"]) == FINE
    assert main(["batch", "table.csv", *batch, "--resume"]) == FINE
    capsys.readouterr()
    assert f"{report} is already there" in refused(capsys, "batch", "table.csv", *batch)
    assert f"{report} is already there" in refused(capsys, "batch", "other.csv", *batch, "--resume")
    text = report.read_text()
    rows = json.loads(text) if suffix == ".json" else list(csv.DictReader(text.splitlines()))
    assert [row["output"] for row in rows] == ["out/stack.ome.zarr"]


def test_a_batch_does_not_write_over_another_of_its_volumes(here, capsys):
    """A row of the table puts labels where the volume of the next row lies."""
    group = zarr.open_group("b.zarr", mode="w")
    group.create_array("x", data=np.zeros((2, 8, 8), np.uint8))
    before = files(here / "b.zarr")
    Path("table.csv").write_text("volume,output\nstack.tif,b.zarr\nb.zarr/x,c.ome.zarr\nstack.tif,d.ome.zarr\n")
    assert main(["batch", "table.csv", "-m", "m.safetensors", "-o", "out", "--overwrite", "--json"]) == ERROR
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["status"] == "failed"
    assert "b.zarr/x is read, and would be lost" in rows[0]["error"]
    assert rows[2]["status"] == "done"
    assert files(here / "b.zarr") == before


def test_only_files_that_exist_are_checked(tmp_path):
    there = tmp_path / "a"
    there.write_text("x")
    check_replaceable([tmp_path / "new"], [there], overwrite=False)
    check_replaceable([there], [tmp_path / "other"], overwrite=True)
    with pytest.raises(OutputError, match="a is read"):
        check_replaceable([there], [tmp_path], overwrite=True)
