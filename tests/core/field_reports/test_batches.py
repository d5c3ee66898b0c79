"""A batch goes on whatever one volume, row or name is like, and output ends no run."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from distillfss_core import StudentModel, open_volume
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.errors import InputFileError
from distillfss_core.io.tables import read_table
from distillfss_core.segmentation import batch
from distillfss_core.segmentation.batch import iter_batch, plan_batch
from pictures import blobs

STACK = np.stack([blobs(seed, 64).image for seed in range(3)])


@pytest.fixture
def here(tmp_path, monkeypatch, saved_model):
    """s.tif and m.safetensors in the current folder."""
    tifffile.imwrite(tmp_path / "s.tif", STACK, photometric="minisblack", metadata={"axes": "ZYX"})
    shutil.copy(saved_model, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_batch(source: str, *more: str) -> int:
    return main(["batch", source, "-m", "m.safetensors", "-o", "out", "--device=cpu", *more])


def report() -> dict[str, dict[str, str]]:
    with open("out/report.csv", newline="", encoding="utf-8") as file:
        return {Path(row["volume"]).name: row for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("name", "status"), [(b"a" * 250 + b".tif", "failed"), (b"a_\xe4.tif", "done")], ids=["long", "latin1"]
)
def test_a_name_that_cannot_be_used_stops_no_other_volume(here, capsys, name, status):
    """A folder from an old disk holds a name of 254 letters, or one that is not UTF-8."""
    folder = here / "volumes"
    folder.mkdir()
    for inside in (name, b"good.tif"):
        (folder / os.fsdecode(inside)).write_bytes((here / "s.tif").read_bytes())
    assert run_batch("volumes") == (ERROR if status == "failed" else FINE)
    assert capsys.readouterr().err.count("\n") == (status == "failed")
    rows = report()
    assert [row["status"] for row in rows.values()] == [status, "done"]
    student = StudentModel.load("m.safetensors", device="cpu")
    expected = np.stack([student.predict_labels(plane) for plane in STACK])
    assert np.array_equal(zarr.open_array("out/good.ome.zarr/0", mode="r")[...], expected)
    assert rows["good.tif"]["voxels_blob"] == str((expected == 1).sum())


def test_an_error_that_nobody_foresaw_is_a_row(here, capsys, monkeypatch):
    """A library fails on one file in a way of its own."""
    for name in ("a.tif", "b.tif"):
        Path(name).write_bytes(Path("s.tif").read_bytes())
    Path("t.csv").write_text("volume\na.tif\nb.tif\n")
    original = batch.open_volume

    def fails(path, **options):
        if path.name == "a.tif":
            raise ZeroDivisionError("division by zero")
        return original(path, **options)

    monkeypatch.setattr(batch, "open_volume", fails)
    assert run_batch("t.csv") == ERROR
    assert "ZeroDivisionError division by zero" in capsys.readouterr().err
    assert [row["status"] for row in report().values()] == ["failed", "done"]


@pytest.mark.parametrize(
    "text",
    [
        "volume;region\r\ns.tif;0:2\r\n",
        "volume\tregion\ns.tif\t0:2\n",
        "volume|region\ns.tif|0:2\n",
        "Volume,Region\ns.tif,0:2\n",
        "VOLUME ; region \n s.tif ; 0:2 \n",
        "region, volume\n0:2, s.tif\n",
        '"volume", "region"\n"s.tif", "0:2,:,:"\n',
        "\n\nvolume,region,\ns.tif,0:2,\n,,\n\n",
        "sep=;\nvolume;region\ns.tif;0:2\n",
        "volume,region\rs.tif,0:2\r",
        "\ufeffvolume;region;who\ns.tif;0:2,:;Ägäis\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_tables_are_read_as_people_write_them(tmp_path, monkeypatch, text, encoding):
    """Tables as spreadsheets of many countries save them."""
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_bytes(text.lstrip("\ufeff" if encoding != "utf-8" else "").encode(encoding))
    (job,) = plan_batch(Path("t.csv"), Path("out"), {})
    assert job.source == Path("s.tif")
    assert next(iter(job.region)) == (0, 2)
    assert job.notes == ({"who": "Ägäis"} if "who" in text else {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("s.tif,0:2,:,10:40", "'10:40' in no column of the header (4 cells, 3 columns)"),
        ("s.tif", "has 1 cells, but the header 3 columns"),
        ('"s.tif\ns.tif",0:2,x', "line break in column volume"),
        (",0:2,x", "names no volume"),
        ("s.tif,2,x", "region '2'"),
        ("none.tif,,x", "no such file"),
        ("s.tif,0:9,x", "region z 0:9"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_the_others_go_on(here, capsys, row, reason):
    """One row of the table has a comma too many, a cell too few, or names nothing."""
    Path("good.tif").write_bytes(Path("s.tif").read_bytes())
    Path("t.csv").write_text(f"volume,region,mouse\n{row}\ngood.tif,0:1,M8\n")
    assert run_batch("t.csv") == ERROR
    assert reason in capsys.readouterr().err
    with open("out/report.csv", newline="") as file:
        bad, good = csv.DictReader(file)
    assert bad["status"] == "failed"
    assert reason in bad["error"]
    assert (good["status"], good["mouse"], good["z"]) == ("done", "M8", "3")


def test_a_table_without_any_good_row_has_a_report(here, capsys):
    """All rows of the table are wrong."""
    Path("t.csv").write_text("volume,region\ns.tif,2\nnone.tif,0:1\n")
    assert run_batch("t.csv") == ERROR
    assert "0 of 2 volumes segmented" in capsys.readouterr().out
    assert [row["status"] for row in report().values()] == ["failed", "failed"]
    Path("u.csv").write_text("volume,region\ns.tif,2\n")
    with pytest.raises(InputFileError, match="region '2'"):
        plan_batch(Path("u.csv"), Path("out"), {})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"path;region\na;b\n", "no column 'volume', its first line is 'path;region'"),
        (b"volume,Volume\na,b\n", "two columns 'volume'"),
        (b"volume;region\n;\n", "has no row below"),
        (b"PK\x03\x04rest", "is a workbook"),
        (b"II*\0nonsense", "is no text"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, content, reason):
    """A workbook, a picture or a table without the column is given to batch."""
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputFileError, match=reason):
        read_table(tmp_path / "t.csv", "volume", ("volume",))


def test_two_volumes_of_one_output_stop_no_other(here, capsys):
    """Two volumes of a folder have one stem."""
    Path("v").mkdir()
    for name in ("a.tif", "a.ome.tif", "b.tif"):
        (here / "v" / name).write_bytes(Path("s.tif").read_bytes())
    assert run_batch("v") == ERROR
    rows = report()
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.ome.tif": "failed",
        "a.tif": "failed",
        "b.tif": "done",
    }
    assert "both be written" in rows["a.tif"]["error"]


def test_a_batch_that_is_stopped_has_a_report(here, plain_student):
    """A batch is closed within its second volume."""
    Path("t.csv").write_text("volume,output\ns.tif,a.ome.zarr\ns.tif,b.ome.zarr\ns.tif,c.ome.zarr\n")
    run = iter_batch(plan_batch(Path("t.csv"), here, {}), plain_student, here / "r.json")
    for step in run:
        if step.index == 2:
            break
    run.close()
    assert [row["status"] for row in json.loads((here / "r.json").read_text())] == ["done", "interrupted"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_ends_no_run(here, monkeypatch, encoding):
    """Output goes to a file in a code page without the letters of the name."""
    Path("日").mkdir()
    Path("日/\udce4.tif").write_bytes(Path("s.tif").read_bytes())
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["segment", "日", "-m", "m.safetensors", "-o", "日/out", "--json"]) == FINE
    assert main(["segment", "日/\udce4.tif", "-m", "m.safetensors", "-o", "日/o.tif"]) == FINE
    assert main(["evaluate", "日/o.tif", "日/out/\udce4.tif"]) == FINE
    assert main(["info", "日/none"]) == ERROR
    out.flush()
    err.flush()
    text = out.buffer.getvalue().decode(encoding)
    shown = "日" if encoding == "utf-8" else "\\u65e5"
    assert f"segmented: {shown}/o.tif" in text
    assert f"error: {shown}/none" in err.buffer.getvalue().decode(encoding)


def test_a_code_page_ends_no_process(here, root):
    """distillfss ... > log.txt on Windows, whose code page has no Japanese letters."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONIOENCODING": "cp1252"}
    os.rename("m.safetensors", "日.safetensors")
    command = [sys.executable, "-m", "distillfss_core.cli.main", "info", "日.safetensors"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (FINE, b"")
    assert b"\\u65e5.safetensors" in done.stdout


def test_what_is_no_volume_in_a_folder_is_named(here, capsys):
    """A folder holds a format that is not read, notes and a subfolder beside the volumes."""
    folder = here / "volumes"
    (folder / "old").mkdir(parents=True)
    shutil.copy(here / "s.tif", folder / "a.tif")
    for name in ("b.czi", "notes.txt", ".hidden"):
        (folder / name).write_bytes(b"something")
    assert run_batch("volumes") == FINE
    left_out = "distillfss: warning: 3 file(s) or folder(s) in volumes are no volumes and are left out: "
    assert capsys.readouterr().err.splitlines() == [f"{left_out}b.czi, notes.txt, old"]
    assert [row["status"] for row in report().values()] == ["done"]


def test_a_zarr_without_metadata_is_a_row(here, capsys):
    """A copy of a zarr was interrupted before its metadata came."""
    folder = here / "volumes"
    folder.mkdir()
    shutil.copy(here / "s.tif", folder / "a.tif")
    zarr.create_array(folder / "b.zarr", data=STACK, chunks=(1, 64, 64))
    (folder / "b.zarr" / "zarr.json").unlink()
    assert run_batch("volumes") == ERROR
    assert "has no zarr metadata" in capsys.readouterr().err
    rows = report()
    assert [rows[name]["status"] for name in ("a.tif", "b.zarr")] == ["done", "failed"]
    assert "b.zarr: has no zarr metadata" in rows["b.zarr"]["error"]


def test_labels_without_metadata_are_named_when_folders_are_compared(here, capsys):
    """Of a folder of labels one zarr was copied without its metadata; the truth has both."""
    for side in ("predicted", "truth"):
        (here / side).mkdir()
        for name in "ab":
            zarr.create_array(here / side / f"{name}.zarr", data=(STACK > 100).astype(np.uint8), chunks=(1, 64, 64))
    (here / "predicted" / "b.zarr" / "zarr.json").unlink()
    assert main(["evaluate", "predicted", "truth"]) == ERROR
    assert "predicted/b.zarr: has no zarr metadata" in capsys.readouterr().err


def test_all_time_points_of_the_files_that_have_several_are_segmented(here):
    """A folder holds a time series beside a stack and a file that cannot be read."""
    folder = here / "volumes"
    folder.mkdir()
    shutil.copy("s.tif", folder)
    (folder / "x.tif").write_bytes(b"no image")
    series = np.stack([STACK[:2], STACK[1:]])
    tifffile.imwrite(folder / "a.b.tif", series, photometric="minisblack", metadata={"axes": "TZYX"})
    assert run_batch("volumes", "--all-times") == ERROR
    student = StudentModel.load("m.safetensors", device="cpu")
    for time in range(2):
        expected = np.stack([student.predict_labels(plane) for plane in series[time]])
        assert np.array_equal(zarr.open_array(f"out/a.b_t{time}.ome.zarr/0", mode="r")[...], expected)
    with open("out/report.csv", newline="", encoding="utf-8") as file:
        rows = [(Path(row["volume"]).name, row["time"], row["status"]) for row in csv.DictReader(file)]
    assert rows == [("a.b.tif", "0", "done"), ("a.b.tif", "1", "done"), ("s.tif", "", "done"), ("x.tif", "", "failed")]


def test_one_time_point_and_all_of_them_exclude_each_other(here, capsys):
    """A command names a time point and all of them."""
    assert run_batch("s.tif", "--all-times", "--time", "0") == ERROR
    assert "--time chooses one time point" in capsys.readouterr().err


def test_an_open_volume_is_segmented_and_stays_open(here, plain_student):
    """A script segments arrays beside files, with one report."""
    volume = open_volume(STACK)
    jobs = [batch.BatchJob(Path("mine"), here / "mine.ome.zarr", opened=volume)]
    steps = list(iter_batch(jobs, plain_student, here / "report.csv"))
    assert steps[-1].row["status"] == "done"
    assert steps[-1].row["volume"] == "mine"
    expected = np.stack([plain_student.predict_labels(plane) for plane in STACK])
    assert np.array_equal(zarr.open_array("mine.ome.zarr/0", mode="r")[...], expected)
    assert np.array_equal(volume.plane(1), STACK[1])
