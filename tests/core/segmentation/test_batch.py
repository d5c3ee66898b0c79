"""Volumes on the command line: one, or many with a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from distillfss_core import InputFileError, OutputError, SettingsError, StudentModel
from distillfss_core.cli.console import ERROR, FINE, INTERRUPTED, USAGE
from distillfss_core.cli.main import main
from distillfss_core.labelstore.layout import parse_region
from distillfss_core.labelstore.store import LabelStore
from distillfss_core.segmentation import batch
from distillfss_core.segmentation.batch import plan_batch
from pictures import blobs
from volumes import write_ome_zarr

STACK = np.stack([blobs(seed, 64).image for seed in range(3)])


@pytest.fixture
def here(tmp_path, monkeypatch, saved_model):
    """a.ome.zarr (two levels), b.tif and c/ (planes) in volumes/, of the same voxels."""
    folder = tmp_path / "volumes"
    (folder / "c").mkdir(parents=True)
    write_ome_zarr(folder / "a.ome.zarr", STACK)
    tifffile.imwrite(folder / "b.tif", STACK, photometric="minisblack", metadata={"axes": "ZYX"})
    for z, plane in enumerate(STACK):
        tifffile.imwrite(folder / "c" / f"{z}.tif", plane)
    (tmp_path / "m.safetensors").symlink_to(saved_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return main([*arguments, "-m", "m.safetensors", "--device", "cpu"])


def labels_of(path: str) -> np.ndarray:
    return zarr.open_array(Path(path) / "0", mode="r")[...]


def test_a_volume_goes_to_ome_zarr_and_is_that_of_the_model(here, capsys):
    assert run("segment", "volumes/a.ome.zarr", "-o", "out.ome.zarr", "--json") == FINE
    said = json.loads(capsys.readouterr().out)
    assert said["shards_computed"] > 0
    student = StudentModel.load("m.safetensors", device="cpu")
    expected = np.stack([student.predict_labels(plane) for plane in STACK])
    assert np.array_equal(labels_of("out.ome.zarr"), expected)
    assert run("segment", "volumes/c", "-o", "c.ome.zarr") == FINE  # a folder of planes is a volume then
    assert np.array_equal(labels_of("c.ome.zarr"), expected)
    region = ["--region", "1:2,:,10:40"]
    assert run("segment", "volumes/b.tif", "-o", "part.ome.zarr", *region) == FINE
    inside = np.zeros_like(expected)
    inside[1:2, :, 10:40] = expected[1:2, :, 10:40]
    assert np.array_equal(labels_of("part.ome.zarr"), inside)
    assert run("segment", "volumes/a.ome.zarr", "-o", "coarse.ome.zarr", "--level", "1") == FINE
    assert labels_of("coarse.ome.zarr").shape == (3, 32, 32)


def test_going_on_and_replacing_are_asked_for(here, capsys):
    command = ["segment", "volumes/b.tif", "-o", "out.ome.zarr"]
    assert run(*command, "--region", "0:1") == FINE
    assert run(*command) == ERROR
    assert "resume" in capsys.readouterr().err
    assert run(*command, "--resume") == FINE
    capsys.readouterr()
    assert run(*command, "--resume", "--json") == FINE
    assert json.loads(capsys.readouterr().out)["shards_computed"] == 0
    assert run(*command, "--overwrite") == FINE


def test_an_interrupt_keeps_what_is_finished(here, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LabelStore, "finish", interrupted)
        assert run("segment", "volumes/b.tif", "-o", "volumes/a.ome.zarr/labels/blob") == INTERRUPTED
    assert "--resume" in capsys.readouterr().err
    assert run("segment", "volumes/b.tif", "-o", "volumes/a.ome.zarr/labels/blob", "--resume") == FINE
    assert "1 found finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["segment", "volumes/b.tif", "-o", "out.tif", "--level", "1"], "--level is for volumes"),
        (["segment", "volumes/b.tif", "-o", "out.zarr", "--level", "7"], "has no level 7"),
        (["segment", "volumes/b.tif", "-o", "out.zarr", "--region", "2:9"], "region z 2:9"),
        (["segment", "volumes/b.tif", "-o", "out.zarr", "--uncertainty"], "not written for volumes"),
        (["segment", "none.tif", "-o", "out.zarr"], "no such file"),
        (["segment", "volumes/b.tif", "-o", "no/out.zarr"], "no folder"),
        (["batch", "volumes", "-o", "out", "--report", "no/report.csv"], "no folder"),
        (["batch", "volumes", "-o", "out", "--report", "volumes"], "end its name in .csv or .json"),
    ],
)
def test_what_cannot_be_done_is_one_line(here, capsys, arguments, told):
    assert run(*arguments) == ERROR
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert told in said[0]
    assert not list(here.glob("**/*out*/zarr.json"))


def test_a_report_that_cannot_be_written_stops_no_volume(here, capsys, monkeypatch):
    def full(path, rows):
        raise OutputError(f"cannot write {path}: no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_report", full)
        assert run("batch", "volumes", "-o", "out") == ERROR
    said = capsys.readouterr().err
    assert "3 of 3 volumes" in said
    assert said.count("error: cannot write") == 1
    assert all((here / "out" / f"{name}.ome.zarr" / "zarr.json").is_file() for name in "abc")
    assert run("batch", "volumes", "-o", "out", "--resume") == FINE


def test_regions_are_read_as_written():
    assert list(parse_region("1:2,:,10:")) == [(1, 2), (None, None), (10, None)]
    assert list(parse_region("5:6")) == [(5, 6), (None, None), (None, None)]
    for wrong in ("1", "1:2:3", "a:b", "-1:2", "1:2,1:2,1:2,1:2"):
        with pytest.raises(SettingsError, match="region"):
            parse_region(wrong)
    assert run("segment", "b.tif", "-o", "out.zarr", "--region", "7") == USAGE


def test_a_folder_of_volumes_gives_a_report_and_one_failure_stops_no_other(here, capsys):
    (here / "volumes" / "d.tif").write_bytes(b"nothing")
    assert run("batch", "volumes", "-o", "out") == ERROR
    said = capsys.readouterr()
    assert "3 of 4 volumes segmented" in said.out
    assert "d.tif" in said.err
    with open(here / "out" / "report.csv", newline="") as file:
        rows = {Path(row["volume"]).name: row for row in csv.DictReader(file)}
    assert [rows[n]["status"] for n in ("a.ome.zarr", "b.tif", "c", "d.tif")] == ["done", "done", "done", "failed"]
    labels = labels_of("out/b.ome.zarr")
    assert int(rows["b.tif"]["voxels_blob"]) == (labels == 1).sum()
    assert int(rows["b.tif"]["voxels_background"]) == (labels == 0).sum()
    assert rows["a.ome.zarr"]["voxels_blob"] == rows["b.tif"]["voxels_blob"]
    assert rows["a.ome.zarr"]["scale_y"] == "1.0"
    (here / "volumes" / "d.tif").unlink()
    assert run("batch", "volumes", "-o", "out", "--resume", "--report", "again.json") == FINE
    assert all(row["shards_computed"] == 0 for row in json.loads((here / "again.json").read_text()))


def test_a_table_says_what_of_each_volume(here, capsys):
    (here / "table.csv").write_text(
        "volume,output,region,level,mouse\nvolumes/a.ome.zarr,mine.ome.zarr,0:1,1,M7\nvolumes/b.tif,,,,M8\n"
    )
    assert run("batch", "table.csv", "-o", "out", "--json") == FINE
    rows = json.loads(capsys.readouterr().out)
    assert [row["mouse"] for row in rows] == ["M7", "M8"]
    assert labels_of("mine.ome.zarr").shape == (3, 32, 32)
    assert rows[0]["voxels_blob"] + rows[0]["voxels_background"] == 32 * 32  # of the region
    assert labels_of("out/b.ome.zarr").shape == (3, 64, 64)


def test_tables_that_make_no_sense_are_refused(here):
    def refused(text: str, told: str) -> None:
        (here / "t.csv").write_text(text)
        with pytest.raises(InputFileError, match=told):
            plan_batch(here / "t.csv", here, {})

    refused("path\na.zarr\n", "column 'volume'")
    refused("volume,level\na.zarr,high\n", "line 2: level 'high'")
    refused("volume,region\na.zarr,7\n", "line 2: region '7'")
    refused("volume,level\n,1\n", "line 2: names no volume")
    refused("volume\nx/a.zarr\ny/a.zarr\n", "both be written")
    (here / "empty").mkdir()
    with pytest.raises(InputFileError, match="holds no volume"):
        plan_batch(here / "empty", here, {})
    assert run("batch", "volumes", "-o", "out", "--report", "r.txt") == ERROR
