"""Objects are numbered and measured block by block as they would be in memory."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from scipy import ndimage
from skimage.measure import regionprops
from skimage.segmentation import relabel_sequential

from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.errors import ImageError, InputFileError, OutputError, SettingsError
from distillfss_core.labelstore.store import JOURNAL
from distillfss_core.objects.instances import iter_instances, label_instances
from distillfss_core.volumes.volume import open_volume
from volumes import noise, write_ome_zarr

SHAPE = (20, 70, 90)
BLOCK = (8, 32, 32)


@pytest.fixture(scope="module")
def worms() -> np.ndarray:
    """Tangled objects that go through many blocks, of classes 1 and 2."""
    rough = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 1.5)
    return np.where(rough > 0.08, 1, np.where(rough < -0.08, 2, 0)).astype(np.uint8)


@pytest.fixture(scope="module")
def balls() -> np.ndarray:
    """Balls of radius 6 that touch, so that only a watershed takes them apart."""
    z, y, x = np.indices((30, 80, 80))
    found = np.zeros(z.shape, np.uint8)
    for cy in range(8, 80, 11):
        for cx in range(8, 80, 11):
            found[(z - 10 - cx % 3) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 <= 36] = 1
    return found


def numbered(path: Path, level: int = 0) -> np.ndarray:
    return zarr.open_array(path / str(level), mode="r")[...]


def rows_of(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("connectivity", "axes"), [(6, 1), (18, 2), (26, 3)])
def test_components_over_blocks_are_those_of_the_whole(worms, tmp_path, connectivity, axes):
    structure = ndimage.generate_binary_structure(3, axes)
    for value in (1, None):
        expected, count = ndimage.label(worms == value if value else worms > 0, structure)
        assert count > 1
        out = tmp_path / f"{value}.zarr"
        report = label_instances(open_volume(worms), out, class_id=value, connectivity=connectivity, block=BLOCK)
        assert report.objects == count
        assert np.array_equal(numbered(out), expected)  # the order of first voxels is that of scipy


def test_the_table_has_what_regionprops_measures(worms, tmp_path):
    image = noise(SHAPE)
    labels = open_volume(write_ome_zarr(tmp_path / "labels.zarr", worms, scale=(2.0, 0.5, 0.5)))
    report = label_instances(
        labels,
        tmp_path / "out.zarr",
        table=tmp_path / "t.csv",
        image=open_volume(image),
        class_id=1,
        min_voxels=5,
        block=BLOCK,
    )
    every, count = ndimage.label(worms == 1)
    sizes = np.bincount(every.reshape(-1))
    expected, _, _ = relabel_sequential(np.where(sizes[every] >= 5, every, 0))
    assert np.array_equal(numbered(tmp_path / "out.zarr"), expected)
    assert (report.objects, report.too_small) == (expected.max(), count - expected.max())
    assert report.too_small > 0
    rows, theirs = rows_of(tmp_path / "t.csv"), regionprops(expected, intensity_image=image)
    assert [row["label"] for row in rows] == [p.label for p in theirs]
    for row, p in zip(rows, theirs, strict=True):
        assert row["voxels"] == p.num_pixels
        assert row["volume_um3"] == pytest.approx(p.num_pixels * 0.5)
        center = [row[f"centroid_{a}_um"] for a in "zyx"]
        assert center == pytest.approx(np.multiply(p.centroid, (2.0, 0.5, 0.5)))
        assert [row[f"box_{a}{end}"] for end in (0, 1) for a in "zyx"] == list(p.bbox)
        assert row["mean_intensity"] == pytest.approx(p.intensity_mean)


def test_a_table_may_be_parquet_and_without_scale_or_image(worms, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out.zarr"
    label_instances(open_volume(worms), out, table=tmp_path / "t.parquet", block=BLOCK)
    label_instances(
        open_volume(worms), out, table=tmp_path / "t.csv", resume=True, block=BLOCK
    )  # all is there: the table only
    theirs = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert theirs == rows_of(tmp_path / "t.csv")
    assert "volume_voxels" in theirs[0]
    assert "mean_intensity" not in theirs[0]


def test_means_are_in_the_table_where_an_image_was_given_whatever_it_holds(worms, tmp_path):
    image = noise(SHAPE).astype(np.float32)
    first = tuple(np.argwhere(worms)[0])
    image[first] = np.nan
    table = tmp_path / "t.csv"
    label_instances(open_volume(worms), tmp_path / "a.zarr", image=open_volume(image), table=table, block=BLOCK)
    means = [row["mean_intensity"] for row in rows_of(table)]
    assert np.isnan(means[0])
    assert np.isfinite(means[1:]).all()
    assert len(means) > 1
    empty = open_volume(np.zeros(SHAPE, np.uint8))
    for options, has in (({}, False), ({"image": open_volume(image)}, True)):
        label_instances(empty, tmp_path / f"{has}.zarr", table=table, block=BLOCK, overwrite=True, **options)
        assert table.read_text().strip().endswith("mean_intensity") == has


def test_a_watershed_takes_touching_objects_apart_alike_for_any_blocks(balls, tmp_path):
    assert ndimage.label(balls)[1] < 49
    options = {"method": "watershed", "radius": 6.0}
    report = label_instances(open_volume(balls), tmp_path / "whole.zarr", block=(64, 128, 128), **options)
    assert report.objects == 49
    whole = numbered(tmp_path / "whole.zarr")
    assert np.array_equal(whole > 0, balls > 0)
    label_instances(open_volume(balls), tmp_path / "parts.zarr", block=(8, 32, 32), **options)
    parts = numbered(tmp_path / "parts.zarr")
    assert parts.max() == 49
    assert (parts == whole)[balls > 0].mean() > 0.999  # voxels as far from two seeds may go to either


def test_a_watershed_keeps_what_has_no_seed_of_its_own(tmp_path):
    labels = np.zeros((9, 40, 40), np.uint8)
    labels[2:7, 5:20, 5:20] = 1
    labels[4, 10, 21] = 1  # a speck beside a large object
    label_instances(open_volume(labels), tmp_path / "out.zarr", method="watershed", radius=6.0)
    found = numbered(tmp_path / "out.zarr")
    assert found[4, 10, 21] > 0
    assert found[4, 10, 21] not in found[2:7, 5:20, 5:20]
    label_instances(open_volume(np.ones((4, 8, 8), np.uint8)), tmp_path / "full.zarr", method="watershed", radius=2.0)
    assert (numbered(tmp_path / "full.zarr") > 0).all()


def test_a_watershed_keeps_voxels_that_are_joined_by_edges_and_corners_only(tmp_path):
    z, y, x = np.indices((30, 40, 40))
    ball = (z - 15) ** 2 + (y - 15) ** 2 + (x - 15) ** 2 <= 64
    ball[15, 15:24, 15] = True
    for step in range(1, 5):
        ball[15, 23 + step, 15 + step] = True  # a tail
        ball[15 - step, 23 + step, 15 - step] = True
    label_instances(open_volume(ball.astype(np.uint8)), tmp_path / "out.zarr", method="watershed", radius=8.0)
    assert np.array_equal(numbered(tmp_path / "out.zarr") > 0, ball)
    scattered = np.random.default_rng(0).random((12, 40, 40)) > 0.7
    options = {"method": "watershed", "radius": 2.0, "block": (8, 32, 32)}
    label_instances(open_volume(scattered.astype(np.uint8)), tmp_path / "scattered.zarr", **options)
    assert np.array_equal(numbered(tmp_path / "scattered.zarr") > 0, scattered)


def test_a_voxel_size_that_is_not_known_is_not_measured_with(balls, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", balls, imagej=True, resolution=(5, 5), metadata={"unit": "um", "axes": "ZYX"})
    with open_volume(tmp_path / "a.tif") as labels:
        assert labels.scale == (None, pytest.approx(0.2), pytest.approx(0.2))
        label_instances(labels, tmp_path / "out.zarr")
        again = open_volume(tmp_path / "out.zarr")
        assert (again.scale, again.unit) == (labels.scale, "micrometer")
    label_instances(again, tmp_path / "again.zarr", table=tmp_path / "t.csv")
    assert all(row["volume_voxels"] == row["voxels"] for row in rows_of(tmp_path / "t.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 20, 40, 55, 80])
def test_stopped_anywhere_a_run_goes_on_to_the_same_bytes(worms, tmp_path, stop):
    out, once = tmp_path / "a" / "out.zarr", tmp_path / "b" / "out.zarr"
    for path in (out, once):
        path.parent.mkdir()
    label_instances(open_volume(worms), once, block=BLOCK)
    run = iter_instances(open_volume(worms), out, block=BLOCK)
    for _ in range(stop):
        next(run)
    run.close()
    half = next((out / "0").rglob("[0-9]"), None) if stop == 20 else None
    if half is not None and half.is_file():
        half.write_bytes(half.read_bytes()[:-3])
    label_instances(open_volume(worms), out, resume=True, block=BLOCK)

    def files(path: Path) -> dict[str, bytes]:
        return {
            str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != JOURNAL.name
        }

    assert files(out) == files(once)
    assert not (out / JOURNAL).with_name("pieces").exists()


def test_labels_made_anew_are_not_taken_for_the_old_ones(worms, tmp_path):
    path = write_ome_zarr(tmp_path / "labels.zarr", worms)
    label_instances(open_volume(path), tmp_path / "out.zarr", block=BLOCK)
    zarr.open_group(path, mode="r+").attrs["distillfss"] = {
        "model": "another",
        "finished": [[[0, n] for n in SHAPE]],
    }
    with pytest.raises(SettingsError, match="another labels"):
        label_instances(open_volume(path), tmp_path / "out.zarr", resume=True, block=BLOCK)


def test_what_is_read_is_never_overwritten(worms, tmp_path):
    label_instances(open_volume(worms), tmp_path / "labels.zarr", block=BLOCK)
    labels = open_volume(tmp_path / "labels.zarr")
    image = open_volume(write_ome_zarr(tmp_path / "image.zarr", noise(SHAPE)))
    (tmp_path / "link.zarr").symlink_to(tmp_path / "labels.zarr")
    before = numbered(tmp_path / "labels.zarr")
    for out, given in (
        ("labels.zarr", labels),
        ("link.zarr", labels),
        ("labels.zarr", open_volume(tmp_path / "labels.zarr" / "0")),
        ("labels.zarr/again.zarr", labels),
    ):
        with pytest.raises(OutputError, match=r"labels\.zarr.*is read"):
            label_instances(given, tmp_path / out, overwrite=True, block=BLOCK)
    with pytest.raises(OutputError, match=r"image\.zarr.*is read"):
        label_instances(labels, tmp_path / "image.zarr" / "here", image=image, overwrite=True, block=BLOCK)
    assert np.array_equal(numbered(tmp_path / "labels.zarr"), before)
    for _ in range(2):  # among the labels of its image it has its place
        label_instances(labels, tmp_path / "image.zarr" / "labels" / "cells", image=image, overwrite=True, block=BLOCK)
    assert len(open_volume(tmp_path / "image.zarr" / "labels" / "cells").levels) == len(image.levels) == 2


@pytest.mark.parametrize(
    ("finished", "told"),
    [
        ([[[0, 20], [0, 70], [0, 90]]], None),
        ([[[0, 9], [0, 70], [0, 90]], [[5, 20], [0, 70], [0, 90]]], None),
        ([[[5, 15], [0, 70], [0, 90]]], "only z 5:15, y 0:70, x 0:90 is finished (50% of the voxels)"),
        (
            [[[0, 20], [0, 70], [0, 45]], [[0, 10], [0, 70], [30, 90]]],
            "x 0:45; z 0:10, y 0:70, x 30:90 is finished (75",
        ),
        ([], "nothing of it is finished"),
    ],
)
def test_a_half_finished_segmentation_is_not_taken_for_whole(worms, tmp_path, caplog, finished, told):
    path = write_ome_zarr(tmp_path / "labels.zarr", worms)
    zarr.open_group(path, mode="r+").attrs["distillfss"] = {"finished": finished}
    if not finished:
        with pytest.raises(InputFileError, match=told):
            label_instances(open_volume(path), tmp_path / "out.zarr")
        assert not (tmp_path / "out.zarr").exists()
        return
    label_instances(open_volume(path), tmp_path / "out.zarr")
    assert len(caplog.messages) == (told is not None)
    assert (told or "") in caplog.text


def test_no_objects_are_no_error(tmp_path):
    report = label_instances(open_volume(np.zeros((3, 9, 9), np.uint8)), tmp_path / "o.zarr", table=tmp_path / "t.csv")
    assert report.objects == 0
    assert rows_of(tmp_path / "t.csv") == []


def test_what_cannot_be_is_said_in_one_line(worms, tmp_path):
    labels, out = open_volume(worms), tmp_path / "out.zarr"
    refused: list[tuple[dict, type[Exception], str]] = [
        ({"method": "magic"}, SettingsError, "no method 'magic'"),
        ({"connectivity": 7}, SettingsError, "connectivity 7"),
        ({"method": "watershed"}, SettingsError, "radius None"),
        ({"method": "watershed", "radius": 17.0}, SettingsError, "at most 16"),
        ({"min_voxels": 0}, SettingsError, "min_voxels 0"),
        ({"class_id": 0}, SettingsError, "class_id 0 is not possible in uint8 labels; give 1 to 255"),
        ({"class_id": 300}, SettingsError, "class_id 300"),
        ({"radius": 5.0}, SettingsError, "method components has no radius"),
        ({"method": "numbered", "radius": 5.0}, SettingsError, "method numbered has no radius"),
        ({"method": "numbered", "connectivity": 26}, SettingsError, "method numbered has no connectivity"),
        ({"method": "watershed", "radius": 5.0, "connectivity": 18}, SettingsError, "method watershed has no conn"),
        ({"block": (0, 64, 64)}, SettingsError, r"\(0, 64, 64\) voxels \(z y x\) are not possible"),
        ({"resume": True, "overwrite": True}, SettingsError, "resume and overwrite contradict one another"),
        ({"table": tmp_path / "t.xlsx"}, SettingsError, r"\.csv or \.parquet"),
        ({"table": tmp_path / "no" / "t.csv"}, OutputError, "no folder"),
        ({"image": open_volume(worms[:, :9])}, ImageError, "but the labels are"),
    ]
    for options, kind, told in refused:
        with pytest.raises(kind, match=told):
            label_instances(labels, out, **options)
    with pytest.raises(ImageError, match="float32"):
        label_instances(open_volume(worms.astype(np.float32)), out)
    assert not out.exists()


def test_the_command_numbers_and_measures(worms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_ome_zarr(tmp_path / "labels.zarr", worms)
    write_ome_zarr(tmp_path / "image.zarr", noise(SHAPE))
    command = ["instances", "labels.zarr", "-o", "out.zarr", "--class-id", "1", "--table", "t.csv"]
    assert main([*command, "--image", "image.zarr"]) == FINE
    assert f"{ndimage.label(worms == 1)[1]} objects" in capsys.readouterr().out
    assert main([*command, "--image", "image.zarr"]) == ERROR  # is there already
    assert main([*command, "--image", "image.zarr", "--resume", "--json"]) == FINE
    assert main([*command, "--image", "image.zarr", "--image-level", "1", "--overwrite"]) == ERROR
    assert main(["instances", "labels.zarr", "-o", "out.tif"]) == ERROR
    assert "end its name in .ome.zarr" in capsys.readouterr().err


def test_labels_that_state_an_absurd_size_are_refused(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", shape=(4, 99_999_999_999, 256), chunks=(1, 128, 128), dtype="u1")
    with pytest.raises(SettingsError, match=r"102399999998976 voxels .* at most 8796093022208 are possible in one run"):
        label_instances(open_volume(tmp_path / "a.zarr"), tmp_path / "o.ome.zarr")
    assert not (tmp_path / "o.ome.zarr").exists()


def test_labels_that_state_too_many_small_planes_are_refused(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", shape=(2**31, 40, 48), chunks=(1, 16, 16), dtype="u1")
    with pytest.raises(SettingsError, match=r"33554432 shards .* at most 1048576 are possible in one run"):
        label_instances(open_volume(tmp_path / "a.zarr"), tmp_path / "o.ome.zarr")
    assert not (tmp_path / "o.ome.zarr").exists()


def test_numbers_that_are_there_stay_objects_where_they_touch(tmp_path):
    labels = np.zeros((6, 20, 20), np.int32)
    labels[1:5, 2:10, 2:10] = 4
    labels[1:5, 2:10, 10:18] = 9  # touches the other
    labels[0, 19, 19] = 70_000
    volume = open_volume(labels)
    made = label_instances(
        volume, tmp_path / "o.ome.zarr", table=tmp_path / "o.csv", method="numbered", block=(4, 8, 8)
    )
    assert made.objects == 3
    expected = np.select([labels == 4, labels == 9, labels == 70_000], [1, 2, 3])
    np.testing.assert_array_equal(numbered(tmp_path / "o.ome.zarr"), expected)
    assert [row["voxels"] for row in rows_of(tmp_path / "o.csv")] == [256, 256, 1]


def test_numbered_labels_have_no_class_and_no_negative_number(tmp_path):
    labels = np.full((2, 8, 8), -1, np.int16)
    with pytest.raises(ImageError, match="holds the label -1"):
        label_instances(open_volume(labels), tmp_path / "o.ome.zarr", method="numbered")
    with pytest.raises(SettingsError, match="no classes"):
        label_instances(open_volume(labels), tmp_path / "o.ome.zarr", method="numbered", class_id=1)
