"""Volumes of every kind open lazily, know their axes and scale, and say in one line what is wrong."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import tifffile
import zarr

from distillfss_core.errors import DistillFSSError, ImageError, InputFileError, SettingsError
from distillfss_core.io.images import read_stack
from distillfss_core.io.writing import write_labels
from distillfss_core.labelstore.layout import box_within
from distillfss_core.support.label_volumes import _open_labels
from distillfss_core.volumes import source as sources
from distillfss_core.volumes.source import Channel, spread
from distillfss_core.volumes.volume import open_volume, read_channels
from volumes import noise, write_ome_zarr

ZYX = (6, 40, 50)


def equal(volume, array: np.ndarray) -> bool:
    """The whole, a box and a plane are those of ``array``."""
    box = (slice(1, 4), slice(7, 33), slice(20, 50))
    return (
        volume.shape == array.shape
        and volume.dtype == array.dtype
        and np.array_equal(volume.read(), array)
        and np.array_equal(volume.read(*box), array[box])
        and np.array_equal(volume.plane(2), array[2])
        and np.array_equal(volume[-1, ::2, 3:9], array[-1, ::2, 3:9])
    )


@pytest.mark.parametrize(("version", "shards"), [("0.4", None), ("0.5", None), ("0.5", (16, 32, 32))])
def test_ome_zarr_of_both_versions_and_sharded(tmp_path, version, shards):
    data = noise(ZYX)
    path = write_ome_zarr(
        tmp_path / "a.ome.zarr",
        data,
        version=version,
        shards=shards,
        chunks=(4, 16, 16),
        scale=(2.0, 0.5, 0.25),
    )
    volume = open_volume(path)
    assert equal(volume, data)
    assert (volume.scale, volume.unit, volume.axes) == ((2.0, 0.5, 0.25), "micrometer", "zyx")
    assert volume.levels == ((6, 40, 50), (6, 20, 25))
    coarse = open_volume(path, level=1)
    assert equal_small(coarse, data[:, ::2, ::2])
    assert coarse.scale == (2.0, 1.0, 0.5)


def equal_small(volume, array: np.ndarray) -> bool:
    return volume.shape == array.shape and np.array_equal(volume.read(), array)


def test_a_library_that_is_not_ours_reads_what_our_test_files_hold(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    data = noise(ZYX)
    path = write_ome_zarr(tmp_path / "a.ome.zarr", data, shards=(16, 32, 32), chunks=(4, 16, 16))
    theirs = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{path}/0"}).result().read().result()
    assert np.array_equal(theirs, open_volume(path).read())


def test_channels_and_times_are_chosen_by_number_or_name_or_asked_for(tmp_path):
    data = noise((2, 3, *ZYX))
    path = write_ome_zarr(tmp_path / "a.zarr", data, axes="tczyx", channels=("DAPI", "GFP", "RFP"))
    with pytest.raises(SettingsError, match="2 time points; choose one, time 0 to 1"):
        open_volume(path)
    with pytest.raises(SettingsError, match=r"3 channels \(DAPI, GFP, RFP\)"):
        open_volume(path, time=1)
    assert equal(open_volume(path, time=1, channel="GFP"), data[1, 1])
    assert equal(open_volume(path, time=0, channel=2), data[0, 2])
    assert np.array_equal(open_volume(path, time=0, channel="all").read(), np.moveaxis(data[0], 0, -1))
    for wrong in ({"channel": 3}, {"channel": "Cy5"}, {"time": 2, "channel": 0}, {"time": -1, "channel": 0}):
        with pytest.raises(SettingsError):
            open_volume(path, **({"time": 0} | wrong))


def test_units_become_micrometers_and_unknown_ones_stay_unknown(tmp_path):
    data = noise(ZYX)
    nano = open_volume(write_ome_zarr(tmp_path / "a.zarr", data, scale=(40.0, 8.0, 8.0), unit="nanometer"))
    assert nano.scale == pytest.approx((0.04, 0.008, 0.008))
    assert nano.unit == "micrometer"
    bare = open_volume(write_ome_zarr(tmp_path / "b.zarr", data, scale=(5.0, 1.0, 1.0), unit=None))
    assert (bare.scale, bare.unit) == ((5.0, 1.0, 1.0), None)
    group = zarr.open_group(tmp_path / "a.zarr", mode="r+")
    about = group.attrs["ome"]
    del about["multiscales"][0]["axes"][0]["unit"]
    group.attrs["ome"] = about
    partly = open_volume(tmp_path / "a.zarr")
    assert partly.scale == (None, pytest.approx(0.008), pytest.approx(0.008))
    assert partly.unit == "micrometer"


def test_plain_zarr_numpy_dask_and_npy(tmp_path):
    data = noise(ZYX)
    zarr.save_array(tmp_path / "plain.zarr", data, zarr_format=2)
    np.save(tmp_path / "a.npy", data)
    for source in (tmp_path / "plain.zarr", tmp_path / "a.npy", data, da.from_array(data, chunks=16)):
        volume = open_volume(source)
        assert equal(volume, data)
        assert volume.scale == (None, None, None)
    swapped = open_volume(np.moveaxis(data, 0, 2), axes="yxz")
    assert equal(swapped, data)
    assert equal_small(open_volume(data[0]), data[:1])
    with pytest.raises(SettingsError, match="give axes"):
        open_volume(data[None])
    with pytest.raises(SettingsError, match="axes 'zyx' are 3"):
        open_volume(data[None], axes="zyx")
    with pytest.raises(ImageError, match="empty"):
        open_volume(data[:0])
    with pytest.raises(ImageError, match="complex"):
        open_volume(data.astype(complex))


def test_nothing_is_read_but_what_is_asked():
    class Spy:
        shape, dtype, asked = (100, 64, 64), np.dtype("u1"), []

        def __getitem__(self, box):
            self.asked.append(box)
            return np.zeros([s.stop - s.start for s in box], "u1")

    spy = Spy()
    volume = open_volume(spy)
    assert spy.asked == []
    volume.read(slice(3, 5), slice(0, 8))
    assert spy.asked == [(slice(3, 5), slice(0, 8), slice(0, 64))]


def write_tiffs(folder: Path, data: np.ndarray) -> dict[str, Path]:
    """The same stack in many kinds of TIFF."""
    kinds = {
        "plain": {},
        "big": {"bigtiff": True},
        "zlib": {"compression": "zlib", "predictor": True},
        "tiles": {"tile": (16, 16), "compression": "zstd"},
        "strips": {"rowsperstrip": 7, "compression": "lzw"},
        "imagej": {"imagej": True, "resolution": (4.0, 2.0), "metadata": {"spacing": 3.0, "unit": "um", "axes": "ZYX"}},
        "ome": {
            "ome": True,
            "metadata": {
                "axes": "ZYX",
                "PhysicalSizeX": 250,
                "PhysicalSizeXUnit": "nm",
                "PhysicalSizeY": 0.5,
                "PhysicalSizeZ": 3.0,
            },
        },
    }
    paths = {}
    for name, options in kinds.items():
        paths[name] = folder / f"{name}{'.ome' if name == 'ome' else ''}.tif"
        tifffile.imwrite(paths[name], data, photometric="minisblack", **options)
    return paths


def test_every_kind_of_tiff(tmp_path):
    data = noise(ZYX)
    for name, path in write_tiffs(tmp_path, data).items():
        with open_volume(path) as volume:
            assert equal(volume, data), name
            known = name in ("imagej", "ome")
            assert volume.scale == (pytest.approx((3.0, 0.5, 0.25)) if known else (None, None, None)), name
            assert volume.unit == ("micrometer" if known else None)


def test_an_imagej_hyperstack_and_a_color_tiff(tmp_path):
    data = noise((2, 4, 3, 20, 24))
    tifffile.imwrite(tmp_path / "h.tif", data, imagej=True, metadata={"axes": "TZCYX"})
    with open_volume(tmp_path / "h.tif", time=1, channel=2) as volume:
        assert np.array_equal(volume.read(), data[1, :, 2])
    rgb = noise((5, 20, 24, 3), "u1")
    tifffile.imwrite(tmp_path / "rgb.tif", rgb, photometric="rgb")
    with open_volume(tmp_path / "rgb.tif") as volume:
        assert np.array_equal(volume.read(), rgb)
        assert volume.axes == "zyxc"


def test_a_tiff_pyramid_has_levels(tmp_path):
    data = noise((4, 64, 64))
    with tifffile.TiffWriter(tmp_path / "p.ome.tif", ome=True) as file:
        file.write(data, subifds=1, metadata={"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})
        file.write(data[:, ::2, ::2], subfiletype=1)
    with open_volume(tmp_path / "p.ome.tif", level=1) as volume:
        assert np.array_equal(volume.read(), data[:, ::2, ::2])
        assert volume.levels == ((4, 64, 64), (4, 32, 32))
        assert volume.scale == (None, 1.0, 1.0)
    with pytest.raises(SettingsError, match="no level 2; its levels are 0 to 1"):
        open_volume(tmp_path / "p.ome.tif", level=2)


def test_a_folder_of_planes_in_natural_order(tmp_path):
    data = noise((11, 20, 24), "u1")
    for kind in (".tif", ".png"):
        folder = tmp_path / kind[1:]
        folder.mkdir()
        for z, plane in enumerate(data):
            write_labels(folder / f"plane_{z}{kind}", plane)
        assert equal_small(open_volume(folder), data)
        write_labels(folder / f"plane_5{kind}", data[5, :9])
        with pytest.raises(InputFileError, match="must be alike"):
            open_volume(folder).plane(5)


def test_the_order_of_planes_knows_no_case_and_takes_raised_digits_as_letters(tmp_path):
    data = noise((5, 20, 24), "u1")
    for name, plane in zip(("a_1", "A_2", "a_3", "a_10", "a_10²7"), data, strict=True):
        write_labels(tmp_path / f"{name}.tif", plane)
    assert equal_small(open_volume(tmp_path), data)


def test_a_volume_travels_to_another_process(tmp_path):
    data = noise(ZYX)
    path = write_ome_zarr(tmp_path / "a.zarr", data)
    again = pickle.loads(pickle.dumps(open_volume(path, level=1)))
    assert np.array_equal(again.read(), data[:, ::2, ::2])
    assert again.identity == open_volume(path, level=1).identity
    assert equal(pickle.loads(pickle.dumps(open_volume(data))), data)


def test_two_volumes_that_differ_have_other_identities(tmp_path):
    data, other = noise(ZYX), noise(ZYX, seed=1)
    a = open_volume(write_ome_zarr(tmp_path / "a.zarr", data))
    assert a.identity != open_volume(tmp_path / "a.zarr", level=1).identity
    json.dumps(a.identity)
    folders = []
    for name, array in (("a", data), ("b", other)):
        (tmp_path / name).mkdir()
        folders.append(tmp_path / name)
        for z, plane in enumerate(array):
            write_labels(tmp_path / name / f"{z}.tif", plane.astype(np.uint8))
    spot = data.copy()
    spot[-1, -1, -1] += 1
    pairs = {
        "zarr": (a, open_volume(write_ome_zarr(tmp_path / "b.zarr", other))),
        "array": (open_volume(zarr.open_array(tmp_path / f"{name}.zarr" / "0")) for name in "ab"),
        "memory": (open_volume(zarr.array(array)) for array in (data, other)),
        "dask": (open_volume(da.from_array(array)) for array in (data, other)),
        "folder": map(open_volume, folders),
        "numpy": map(open_volume, (data, other)),
        "voxel": map(open_volume, (data, spot)),
    }
    for kind, (one, two) in pairs.items():
        assert one.identity != two.identity, kind
        assert {**one.identity, "content": 0, "files": 0} == {**two.identity, "content": 0, "files": 0}, kind


def test_values_that_are_not_finite_are_read_as_a_number_on_demand(tmp_path):
    array = noise(ZYX).astype(np.float32)
    array[2, 3, 4:8] = np.nan, np.inf, -np.inf, 3.1e38
    array[0, 0, 0] = 2.9e38
    np.save(tmp_path / "v.npy", array)
    whole, as_it_is = array.copy(), open_volume(tmp_path / "v.npy")
    whole[2, 3, 4:8] = -7
    np.testing.assert_array_equal(as_it_is.read(), array)
    for source in (tmp_path / "v.npy", array, da.from_array(array)):
        volume = open_volume(source, replace_nan=-7)
        assert equal(volume, whole)
        assert volume.dtype == volume.plane(2).dtype == np.float32
        assert equal(volume.along("y"), whole.transpose(1, 0, 2))
        assert np.isnan(array[2, 3, 4])  # what was given is not changed
    volume = open_volume(tmp_path / "v.npy", replace_nan=-7)
    assert equal(pickle.loads(pickle.dumps(volume)), whole)
    others = [as_it_is, volume, open_volume(tmp_path / "v.npy", replace_nan=0)]
    assert len({json.dumps(dict(v.identity)) for v in others}) == 3
    assert "replace_nan" not in as_it_is.identity
    for value in (np.nan, np.inf, 1e39):
        with pytest.raises(SettingsError, match="is no finite float32; give one"):
            open_volume(array, replace_nan=value)
    assert equal(open_volume(noise(ZYX), replace_nan=3), noise(ZYX))


def test_a_replaced_value_of_a_missing_chunk_is_still_told(tmp_path):
    array = zarr.create_array(
        tmp_path / "v.zarr", shape=(2, 8, 8), chunks=(1, 8, 8), dtype="float32", fill_value=np.nan
    )
    array[0] = 1
    with open_volume(tmp_path / "v.zarr", replace_nan=0) as volume:
        assert not volume.plane(1).any()
        assert len(volume.missing) == 1


def test_an_unchanged_volume_keeps_its_identity_wherever_a_zarr_lies(tmp_path):
    data = noise(ZYX)
    path = write_ome_zarr(tmp_path / "a.zarr", data)
    before = dict(open_volume(path).identity)
    write_ome_zarr(path / "labels" / "cells", data)  # what is put beside the voxels does not change them
    shutil.copytree(path, tmp_path / "elsewhere.zarr")
    assert open_volume(path).identity == open_volume(tmp_path / "elsewhere.zarr").identity == before
    for array in (data, da.from_array(data)):
        assert open_volume(array).identity == open_volume(array.copy()).identity
    assert open_volume(data).along("y").identity == open_volume(data).identity


def test_a_turned_volume_is_another_for_dask_and_turned_when_it_is_opened_again(tmp_path):
    data = noise((4, 5, 6))
    volume = open_volume(write_ome_zarr(tmp_path / "a.zarr", data, scale=(3.0, 2.0, 1.0)))
    turned = [volume, volume.along("y"), volume.along("x"), volume.along("y").along("x"), volume.along("x").along("y")]
    assert len({each.order for each in turned}) == len({da.from_array(each).name for each in turned}) == 5
    for each in (*turned, volume.along("y").along("y"), volume.along("x").along("x")):
        again = pickle.loads(pickle.dumps(each))
        whole = data.transpose(["zyx".index(axis) for axis in each.order])
        assert np.array_equal(each[:], whole)
        assert np.array_equal(again[:], whole)
        assert again.order == each.order
        assert again.scale == each.scale == tuple((3.0, 2.0, 1.0)["zyx".index(axis)] for axis in each.order)
    assert volume.along("y").along("y").order == "zyx"


def test_an_array_that_was_filled_meanwhile_is_another_volume():
    array = np.zeros((3, 40, 50), np.uint16)
    volume = open_volume(array)
    before = dict(volume.identity)
    assert volume.identity == before
    array[:] = noise(array.shape)
    assert volume.identity == open_volume(array.copy()).identity != before


def test_an_array_in_memory_is_hashed_once_until_it_changes(monkeypatch):
    array = noise((3, 4, 40, 50))
    hashed, digest_of = [], sources._digest_of
    monkeypatch.setattr(sources, "_digest_of", lambda parts: (hashed.append(parts is array), digest_of(parts))[1])
    first = open_volume(array, axes="tzyx", time=0).identity
    for time in (1, 2, 0):
        assert open_volume(array, axes="tzyx", time=time).identity["content"] == first["content"]
    assert sum(hashed) == 1
    array[1] += 1
    changed = open_volume(array, axes="tzyx", time=0).identity
    assert changed != first
    assert sum(hashed) == 2
    assert open_volume(array.copy(), axes="tzyx", time=0).identity == changed


def test_options_for_a_volume_that_is_open_are_refused():
    volume = open_volume(np.zeros((3, 8, 9), np.float32))
    assert open_volume(volume) is volume
    for option in ({"level": 1}, {"channel": 0}, {"time": 0}, {"axes": "zyx"}, {"replace_nan": 0}, {"labels": True}):
        with pytest.raises(SettingsError, match=f"is open, so {next(iter(option))} cannot be chosen"):
            open_volume(volume, **option)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
def test_a_volume_that_is_refused_or_closed_leaves_no_file_open(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((2, 8, 9), np.uint8), photometric="minisblack", metadata={"axes": "CYX"})
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="w") as store:
        zarr.create_array(store, shape=(4, 8, 9), chunks=(1, 8, 9), dtype="uint8")[:] = 1
    tifffile.imwrite(tmp_path / "l.tif", np.zeros((4, 5, 9), np.uint8), photometric="minisblack")
    before, kept = open_files(), []
    for _ in range(5):
        with pytest.raises(SettingsError, match="has 2 channels") as caught:
            open_volume(path)
        kept.append(caught.value)
        with open_volume(tmp_path / "a.zip") as volume:
            assert volume.read().all()
            with pytest.raises(ImageError, match="same size") as refused:
                _open_labels(tmp_path / "l.tif", volume, {"level": 0})
            kept.append(refused.value)
        kept.append(volume)
    assert open_files() == before


def test_indices_and_levels_are_whole_numbers_of_any_kind():
    data = noise((3, 8, 9))
    volume = open_volume(data, level=np.int64(0))
    np.testing.assert_array_equal(volume[np.int64(-1)], data[-1])
    for index in (1.7, None, "1"):
        with pytest.raises(IndexError, match="is no whole number"):
            volume[index]
    with pytest.raises(SettingsError, match="level -1 is not possible"):
        open_volume(data, level=np.int64(-1))


def test_numpy_reads_a_volume_as_an_array(tmp_path):
    data = noise((3, 8, 9))
    np.save(tmp_path / "a.npy", data)
    with open_volume(tmp_path / "a.npy") as volume:
        np.testing.assert_array_equal(np.asarray(volume), data)
        assert np.array(volume, np.float32).dtype == np.float32


def test_a_region_has_three_spans():
    with pytest.raises(SettingsError, match=r"has 2 spans; give \(start, stop\) along z, y and x"):
        box_within((3, 8, 9), ((0, 1), (0, 1)), "a")


def test_little_is_read_to_tell_a_large_volume_from_another():
    class Spy:
        shape, dtype, asked = (4000, 30000, 20000), np.dtype("u2"), []

        def __getitem__(self, box):
            self.asked.append(box)
            return np.zeros([s.stop - s.start for s in box], "u2")

    spy = Spy()
    volume = open_volume(spy)
    assert volume.identity == volume.identity
    assert sum(np.prod([s.stop - s.start for s in box]) for box in spy.asked) * 2 <= 4e6
    for axis, length in enumerate(spy.shape):  # in every quarter of every axis
        assert {box[axis].start * 4 // length for box in spy.asked} == {0, 1, 2, 3}
    assert len(set(spread((50, 60, 70), 64))) == 64
    assert list(spread((2, 3), 64)) == [(y, x) for y in range(2) for x in range(3)]


def test_a_missing_chunk_is_the_fill_value_and_the_log_says_so_once(tmp_path, caplog):
    data = noise((16, 32, 32)) + 1
    path = write_ome_zarr(tmp_path / "a.zarr", data, levels=1)
    (path / "0" / "c" / "0" / "1" / "0").unlink()
    volume = open_volume(path)
    with caplog.at_level(logging.WARNING, "distillfss_core"):
        found = volume.read()
        volume.read()
    assert len(caplog.records) == 1
    assert "1 of 4 chunks" in caplog.text
    assert "fill value 0" in caplog.text
    assert len(volume.missing) == 1
    assert not found[:, 16:, :16].any()
    assert np.array_equal(found[:, :16], data[:, :16])


def test_what_is_not_there_is_said_plainly(tmp_path):
    with pytest.raises(InputFileError, match="no such file"):
        open_volume(tmp_path / "nothing.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(InputFileError, match="no zarr metadata"):
        open_volume(tmp_path / "empty.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputFileError, match="holds no plane"):
        open_volume(tmp_path / "folder")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputFileError, match=r"cannot read '\.txt'"):
        open_volume(tmp_path / "a.txt")
    path = write_ome_zarr(tmp_path / "a.zarr", noise(ZYX))
    with pytest.raises(SettingsError, match="no level 2; its levels are 0 to 1"):
        open_volume(path, level=2)
    shutil.rmtree(path / "1")
    assert open_volume(path).levels == (ZYX,)
    with pytest.raises(InputFileError, match="level 1 is named '1'"):
        open_volume(path, level=1)
    with pytest.raises(SettingsError, match="no plane 6; its planes are 0 to 5"):
        open_volume(path).plane(6)


def test_a_file_missing_from_an_ome_set_is_an_error_and_no_zeros(tmp_path):
    data = noise((2, 3, 20, 24)) + 1
    uid = "urn:uuid:{}".format
    names = ["s0.ome.tif", "s1.ome.tif"]
    ids = [uid(f"0000000{i}-0000-0000-0000-000000000000") for i in range(2)]
    blocks = "".join(
        f'<TiffData FirstC="{c}" FirstZ="{z}" IFD="{z}"><UUID FileName="{names[c]}">{ids[c]}</UUID></TiffData>'
        for c in range(2)
        for z in range(3)
    )
    for c in range(2):
        text = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="{ids[c]}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" '
            f'SizeX="24" SizeY="20" SizeZ="3" SizeC="2" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
            f'<Channel ID="Channel:0:1" SamplesPerPixel="1"/>{blocks}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / names[c], data[c], description=text, metadata=None, photometric="minisblack")
    with open_volume(tmp_path / names[0], channel=1) as volume:
        assert np.array_equal(volume.read(), data[1])
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputFileError, match="missing"), open_volume(tmp_path / names[0], channel=1) as volume:
        volume.read()


# damage


def _edit(path: Path, change) -> None:
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def damages(rng: random.Random):
    """Ways to harm a copy of a sound volume: (kind of source, function of its path)."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size - 1)])

    def cut_chunk(path: Path) -> None:
        chunks = sorted(f for f in (path / "0" / "c").rglob("*") if f.is_file())
        cut(rng.choice(chunks))

    def scramble_chunk(path: Path) -> None:
        chunk = rng.choice(sorted(f for f in (path / "0" / "c").rglob("*") if f.is_file()))
        chunk.write_bytes(rng.randbytes(chunk.stat().st_size))

    def metadata(change):
        return lambda path: _edit(path / "zarr.json", change)

    image = lambda a: a["attributes"]["ome"]["multiscales"][0]  # noqa: E731
    return [
        ("tiff", cut),
        ("ome-tiff", cut),
        ("pages", cut),
        ("zarr", cut_chunk),
        ("shards", cut_chunk),
        ("zarr", scramble_chunk),
        ("zarr", lambda path: cut(path / "zarr.json")),
        ("zarr", lambda path: cut(path / "0" / "zarr.json")),
        ("zarr", lambda path: (path / "0" / "zarr.json").unlink()),
        ("zarr", metadata(lambda a: image(a).pop("datasets"))),
        ("zarr", metadata(lambda a: image(a)["axes"].pop())),
        ("zarr", metadata(lambda a: image(a)["axes"][0].pop("name"))),
        ("zarr", metadata(lambda a: image(a)["datasets"][0].update(path="9"))),
        ("zarr", metadata(lambda a: image(a).update(axes="zyx!"))),
        ("zarr", metadata(lambda a: image(a)["axes"][0].update(name="q"))),
        ("zarr", metadata(lambda a: image(a)["datasets"][0]["coordinateTransformations"][0]["scale"].pop())),
        ("zarr", metadata(lambda a: image(a)["datasets"][0]["coordinateTransformations"][0].update(scale=[0, 1, "x"]))),
        ("zarr", metadata(lambda a: a["attributes"].update(ome=[1]))),
        ("zarr", metadata(lambda a: a["attributes"]["ome"].update(multiscales=[]))),
    ]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[dict[str, Path], np.ndarray]:
    folder = tmp_path_factory.mktemp("sound")
    data = noise((8, 40, 48)) + 1
    paths = {kind: folder / f"{kind}.tif" for kind in ("tiff", "pages")} | {"ome-tiff": folder / "a.ome.tif"}
    tifffile.imwrite(paths["tiff"], data, photometric="minisblack")
    tifffile.imwrite(paths["ome-tiff"], data, photometric="minisblack", compression="zlib")
    with tifffile.TiffWriter(paths["pages"]) as file:
        for plane in data:
            file.write(plane, metadata=None, contiguous=False, photometric="minisblack", compression="zlib")
    paths["zarr"] = write_ome_zarr(folder / "a.zarr", data, levels=1)
    paths["shards"] = write_ome_zarr(folder / "s.zarr", data, levels=1, shards=(16, 32, 32))
    return paths, data


@pytest.mark.parametrize("seed", range(20))
def test_damaged_inputs_give_one_clear_error_and_never_silent_zeros(sound, tmp_path, seed):
    paths, data = sound
    for number, (kind, harm) in enumerate(damages(random.Random(seed))):
        source = paths[kind]
        copy = tmp_path / f"{number}_{source.name}"
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
        harm(copy)
        message, found = None, data
        try:
            with open_volume(copy) as volume:
                found = volume.read()
        except DistillFSSError as error:
            message = str(error)
        assert message is None or ("\n" not in message and copy.name in message), (number, message)
        assert np.array_equal(found, data), (number, kind)  # without an error the harm did not reach the voxels


# alpha


@pytest.mark.parametrize(
    ("side", "y", "x"),
    [(None, (0, 7), (0, 12)), (4, (1, 5), (4, 8)), (8, (0, 7), (2, 10)), (5, (1, 6), (3, 8)), (100, (0, 7), (0, 12))],
)
def test_the_middle_of_a_plane(side, y, x):
    array = noise((3, 7, 12))
    np.testing.assert_array_equal(open_volume(array).plane(2, side), array[2, slice(*y), slice(*x)])


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_volume_and_an_image_agree_on_alpha(tmp_path, planes, planar):
    colors = noise((planes, 20, 24, 3), "u1")
    plain = np.concatenate([colors, np.full((planes, 20, 24, 1), 255, np.uint8)], 3)
    clear = plain.copy()
    clear[0, 3, 4, 3] = 7
    for name, rgba, expected in (("plain", plain, colors), ("clear", clear, clear)):
        path = tmp_path / f"{name}.tif"
        stored = rgba if planar == "contig" else rgba.transpose(0, 3, 1, 2)
        tifffile.imwrite(path, stored, photometric="rgb", planarconfig=planar, extrasamples=["unassalpha"])
        with open_volume(path) as volume:
            assert volume.shape == expected.shape, name
            assert np.array_equal(volume.read(), expected)
            assert np.array_equal(volume.read(slice(0, 1), slice(2, 5), slice(3, 9)), expected[:1, 2:5, 3:9])
        assert np.array_equal(read_stack(path), expected)


def test_gray_with_alpha_is_gray_and_a_folder_follows(tmp_path):
    gray = noise((4, 20, 24), "u1")
    for z, plane in enumerate(gray):
        pair = np.dstack([plane, np.full_like(plane, 255)])
        tifffile.imwrite(tmp_path / f"{z}.tif", pair, photometric="minisblack", extrasamples=["unassalpha"])
    with open_volume(tmp_path) as volume:
        assert equal(volume, gray)


def test_an_alpha_that_differs_between_the_looked_at_tiles_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("distillfss_core.volumes.tiff._READ_WHOLE", 0)
    monkeypatch.setattr("distillfss_core.volumes.tiff._SIDE", 4)
    rgba = noise((64, 64, 4), "u1")
    rgba[..., 3] = 255
    rgba[63, 63, 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    with open_volume(tmp_path / "a.tif") as volume:
        assert np.array_equal(volume[0, :60, :60], rgba[:60, :60, :3])
        with pytest.raises(InputFileError, match="its alpha channel has several values, though most of it is 255"):
            volume.read()


# zarr that is damaged, or states another size


def test_damaged_chunks_are_one_error_without_messages_beside_it(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(8, 128, 128), chunks=(1, 32, 32), dtype="u2")
    array[:] = noise((8, 128, 128)) + 1
    for chunk in (f for f in (tmp_path / "a.zarr" / "c").rglob("*") if f.is_file()):
        chunk.write_bytes(chunk.read_bytes()[:40])
    program = (
        "from distillfss_core import open_volume, DistillFSSError\n"
        f"v = open_volume({str(tmp_path / 'a.zarr')!r})\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        v.read()\n"
        "    except DistillFSSError as error:\n"
        "        print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["InputFileError"] * 3
    assert done.stderr == ""


def test_an_array_that_states_an_absurd_size_is_named(tmp_path, caplog):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(4, 256, 256), chunks=(1, 128, 128), dtype="u2")
    array[:] = noise((4, 256, 256))
    with open_volume(tmp_path / "a.zarr") as volume:
        assert volume.shape == (4, 256, 256)
    assert caplog.text == ""
    _edit(tmp_path / "a.zarr" / "zarr.json", lambda a: a.update(shape=[4, 10**9, 256]))
    with open_volume(tmp_path / "a.zarr") as volume:
        assert volume.shape == (4, 10**9, 256)
    assert "1024000000000 voxels in 62500000 chunks, and at most 17 of them have a file" in caplog.text


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_channels_of_ome_zarr_have_names_colors_and_ranges(version, tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", noise((4, 2, 8, 8)), axes="czyx", version=version, channels=("a", "b"))
    file = path / ("zarr.json" if version == "0.5" else ".zattrs")

    def describe(about):
        about = about["attributes"]["ome"] if version == "0.5" else about
        about["omero"]["channels"] = [
            {"label": "DAPI", "color": "0000FF", "window": {"start": 5, "end": 90.5, "min": 0, "max": 255}},
            {"label": None, "color": "blue", "window": {"start": 7, "end": 7}},
            {"label": "GFP", "window": "wide"},
        ]

    _edit(file, describe)
    assert read_channels(path) == (
        Channel("DAPI", "#0000ff", (5.0, 90.5)),
        Channel(),
        Channel("GFP"),
        Channel(),
    )
    with open_volume(path, channel="dapi") as volume:
        np.testing.assert_array_equal(volume.plane(1), noise((4, 2, 8, 8))[0, 1])


def test_channels_of_ome_tiff_have_names_and_colors(tmp_path):
    colors = [-16776961, 16711935, -1]  # red, green and white, opaque
    about = {"axes": "CYX", "Channel": {"Name": ["a", "b", "c"], "Color": colors}}
    tifffile.imwrite(tmp_path / "a.ome.tif", noise((3, 8, 8)), photometric="minisblack", metadata=about)
    expected = (Channel("a", "#ff0000"), Channel("b", "#00ff00"), Channel("c", "#ffffff"))
    assert read_channels(tmp_path / "a.ome.tif") == expected


def test_channels_of_imagej_have_labels_color_tables_and_ranges(tmp_path):
    tables = np.zeros((2, 3, 256), np.uint8)
    tables[0, 2], tables[1, 1] = np.arange(256), np.arange(256)
    labels = [f"{name} z {z}" for z in range(3) for name in ("DAPI", "GFP")]
    about = {"axes": "ZCYX", "LUTs": list(tables), "Ranges": (1.0, 20.0, 30.0, 400.0), "Labels": labels}
    tifffile.imwrite(tmp_path / "a.tif", noise((3, 2, 8, 8)), imagej=True, metadata=about)
    expected = (Channel("DAPI z 0", "#0000ff", (1.0, 20.0)), Channel("GFP z 0", "#00ff00", (30.0, 400.0)))
    assert read_channels(tmp_path / "a.tif") == expected


def test_what_has_no_choice_of_channels_has_none(tmp_path):
    tifffile.imwrite(tmp_path / "gray.tif", noise((8, 8)))
    tifffile.imwrite(tmp_path / "color.tif", noise((8, 8, 3), "u1"), photometric="rgb")
    assert read_channels(tmp_path / "gray.tif") == read_channels(tmp_path / "color.tif") == ()
