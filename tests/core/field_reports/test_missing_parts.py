"""Inputs of which a part is not there: an error names the part, whichever way the input is read."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from distillfss_core.errors import InputFileError
from distillfss_core.io.images import read_stack
from distillfss_core.io.labels import load_pair, read_label_stack
from distillfss_core.io.writing import write_labels
from distillfss_core.segmentation.batch import plan_batch
from distillfss_core.support.support_set import load_support
from distillfss_core.volumes.volume import open_volume
from ome_sets import OME, ome_xml, write_ome_set, write_pages

STACK = np.random.default_rng(0).integers(1, 9, (6, 20, 24)).astype(np.uint16)


def as_image(path: Path) -> np.ndarray:
    return read_stack(path)


def as_labels(path: Path) -> np.ndarray:
    return read_label_stack(path)


def as_support(path: Path) -> np.ndarray:
    slices, _ = load_pair(path, path, None, "classes", None)
    return np.stack([s.image for s in slices])


def as_volume(path: Path) -> np.ndarray:
    with open_volume(path) as volume:
        return volume.read()


ROUTES = pytest.mark.parametrize("route", [as_image, as_labels, as_support, as_volume])


@ROUTES
def test_one_file_of_an_ome_set_was_copied_without_the_other(tmp_path, route):
    """A user copies one of two files of an OME-TIFF to another disk."""
    first, second = write_ome_set(tmp_path, STACK, ["a.ome.tif", "b.ome.tif"])
    np.testing.assert_array_equal(route(first), STACK)
    np.testing.assert_array_equal(route(second), STACK)
    second.unlink()
    with pytest.raises(InputFileError, match=r"a\.ome\.tif: plane 3 is missing: there is no b\.ome\.tif"):
        route(first)


@ROUTES
def test_one_file_of_an_ome_set_is_cut_short(tmp_path, route):
    """The second file of an OME-TIFF broke off while it was copied."""
    first, second = write_ome_set(tmp_path, STACK, ["a.ome.tif", "b.ome.tif"])
    second.write_bytes(second.read_bytes()[:2000])
    with pytest.raises(InputFileError, match=r"a\.ome\.tif"):
        route(first)


@ROUTES
def test_the_metadata_state_more_planes_than_the_file_holds(tmp_path, route):
    """An acquisition was stopped early, and its metadata still state the planned ten planes."""
    path = write_pages(
        tmp_path / "t.ome.tif", STACK, ome_xml("u", [("t.ome.tif", k, "u") for k in range(10)], (20, 24), 10)
    )
    with pytest.raises(InputFileError, match="plane 6 is missing"):
        route(path)
    path = write_pages(tmp_path / "s.ome.tif", STACK, ome_xml("u", [(None, k, "u") for k in range(6)], (20, 24), 10))
    with pytest.raises(InputFileError, match="plane 6 is missing"):
        route(path)


@ROUTES
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_an_imagej_stack_broke_off(tmp_path, route, share):
    """A stack saved by Fiji was copied in part; its first plane is whole."""
    tifffile.imwrite(tmp_path / "a.tif", np.tile(STACK, (1, 8, 8)), imagej=True, metadata={"axes": "ZYX"})
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputFileError, match=r"a\.tif: (is cut short|states 6 planes)"):
        route(tmp_path / "a.tif")


@ROUTES
def test_a_stack_of_one_page_broke_off(tmp_path, route):
    """Fiji writes stacks above 4 GB with the list of one page only; the copy has two of six planes."""
    path = tmp_path / "a.tif"
    description = "ImageJ=1.54f\nimages=6\nslices=6\nloop=false\n"
    with tifffile.TiffWriter(path) as file:
        file.write(STACK[0], description=description, metadata=None, photometric="minisblack")
    assert len(tifffile.TiffFile(path).pages) == 1
    whole = path.read_bytes() + STACK[1:].tobytes()
    path.write_bytes(whole)
    np.testing.assert_array_equal(route(path), STACK)
    path.write_bytes(whole[: len(whole) - 4 * STACK[0].nbytes])
    with pytest.raises(InputFileError, match="states 6 planes, 1 can be read"):
        route(path)


@ROUTES
@pytest.mark.parametrize("tile", [(16, 16), None])
def test_a_tile_or_strip_without_data(tmp_path, route, tile):
    """A writer was stopped before all tiles of a plane were written; its list has empty entries."""
    path = tmp_path / "a.tif"
    options = {"tile": tile} if tile else {"rowsperstrip": 5}
    with tifffile.TiffWriter(path) as file:
        for plane in STACK:
            file.write(plane, metadata=None, contiguous=False, compression="zlib", photometric="minisblack", **options)
    with tifffile.TiffFile(path, mode="r+") as file:
        name = "TileByteCounts" if tile else "StripByteCounts"
        tag = file.pages[4].tags[name]
        tag.overwrite([0 if i == 2 else n for i, n in enumerate(tag.value)])
    with pytest.raises(InputFileError, match=r"plane 4 has no data in 1 of its 4 (tiles|strips) \(the first is 2\)"):
        route(path)


def test_a_sparse_file_that_states_the_value_of_its_empty_tiles_is_read_with_a_warning(tmp_path, caplog):
    """GDAL leaves tiles without data out, and states which value they have."""
    path = tmp_path / "a.tif"
    tags = [(42113, 2, 0, "0", True)]
    tifffile.imwrite(path, STACK[0], tile=(16, 16), compression="zlib", metadata=None, extratags=tags)
    with tifffile.TiffFile(path, mode="r+") as file:
        tag = file.pages[0].tags["TileByteCounts"]
        tag.overwrite([0, *tag.value[1:]])
    expected = STACK[0].copy()
    expected[:16, :16] = 0
    for route in (as_image, as_volume):
        with caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(route(path)[0], expected)
        assert "plane 0 has 1 empty tiles" in caplog.text
        caplog.clear()


@ROUTES
def test_metadata_in_another_file(tmp_path, route):
    """The files of an acquisition name a companion file that holds their metadata."""
    text = f'<OME xmlns="{OME}" UUID="urn:uuid:b"><BinaryOnly MetadataFile="x.companion.ome" UUID="urn:uuid:c"/></OME>'
    path = write_pages(tmp_path / "a.ome.tif", STACK, text)
    with pytest.raises(InputFileError, match=r"its metadata lie in x\.companion\.ome"):
        route(path)
    plan = [("a.ome.tif", k, "b") for k in range(6)]
    (tmp_path / "x.companion.ome").write_text(ome_xml("c", plan, (20, 24), 6), encoding="utf-8")
    np.testing.assert_array_equal(route(path), STACK)


@ROUTES
def test_an_ome_file_that_was_renamed(tmp_path, route):
    """A single OME-TIFF has another name than its metadata state; two channels stay channels."""
    for own in (None, "u"):
        text = ome_xml(own, [("old.ome.tif", k, "u") for k in range(6)], (20, 24), 6)
        np.testing.assert_array_equal(route(write_pages(tmp_path / "new.ome.tif", STACK, text)), STACK)
    text = ome_xml(None, [("old.ome.tif", k, "u") for k in range(6)], (20, 24), 3, channels=2)
    with open_volume(write_pages(tmp_path / "two.ome.tif", STACK, text), channel=1) as volume:
        np.testing.assert_array_equal(volume.read(), STACK[3:])


# folders that hold the files of one OME-TIFF


NAMES = [f"z{k}.ome.tif" for k in range(6)]


def test_a_folder_with_the_files_of_one_image_is_that_image(tmp_path):
    """A microscope writes a file a plane, each of which names all others."""
    write_ome_set(tmp_path / "set", STACK, NAMES)
    with open_volume(tmp_path / "set") as volume:
        np.testing.assert_array_equal(volume.read(), STACK)
        assert len(volume.shape) == 3
    write_ome_set(tmp_path / "two", STACK, NAMES[:3])
    write_ome_set(tmp_path / "two", STACK, ["b0.ome.tif", "b1.ome.tif"])
    with pytest.raises(InputFileError, match=r"holds an image of 2 files, b0\.ome\.tif and so on, and other files"):
        open_volume(tmp_path / "two")
    jobs = plan_batch(tmp_path / "two", tmp_path / "out", {})
    assert [job.source.name for job in jobs] == ["b0.ome.tif", "z0.ome.tif"]


@pytest.mark.parametrize("files", [6, 2])
def test_in_a_folder_a_file_of_a_set_stands_for_its_own_planes(tmp_path, files):
    """Such a folder is segmented, learned from and evaluated file by file, by stem."""
    paths = write_ome_set(tmp_path / "set", STACK, NAMES[:files])
    each = 6 // files
    for k, path in enumerate(paths):
        np.testing.assert_array_equal(read_stack(path, own_planes=True), STACK[k * each : (k + 1) * each])
        np.testing.assert_array_equal(read_label_stack(path, own_planes=True), STACK[k * each : (k + 1) * each])
    (tmp_path / "labels").mkdir()
    for k in range(files):
        tifffile.imwrite(
            tmp_path / f"labels/z{k}_mask.tif", STACK[k * each : (k + 1) * each] % 2, photometric="minisblack"
        )
    slices = load_support(tmp_path / "set", tmp_path / "labels").slices
    np.testing.assert_array_equal(np.stack([s.image for s in slices]), STACK)
    np.testing.assert_array_equal(np.stack([s.labels for s in slices]), STACK % 2)
    paths[1].unlink()
    for route in (lambda: read_stack(paths[0], own_planes=True), lambda: as_volume(tmp_path / "set")):
        with pytest.raises(InputFileError, match=r"there is no z1\.ome\.tif beside it"):
            route()


@ROUTES
def test_a_file_of_a_set_states_another_size(tmp_path, route):
    """The width of the planes is damaged in the second file of an OME-TIFF."""
    first, second = write_ome_set(tmp_path, STACK, ["a.ome.tif", "b.ome.tif"])
    with tifffile.TiffFile(second, mode="r+") as file:
        file.pages[0].tags["ImageWidth"].overwrite(12)
    with pytest.raises(InputFileError, match=r"plane 3 in b\.ome\.tif is \(20, 12\) uint16, others are \(20, 24\)"):
        route(first)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_plane_of_a_folder_is_missing(tmp_path, caplog, suffix):
    """One of the numbered planes was not copied; every tenth plane alone is no gap."""
    for z in (0, 1, 2, 4, 5):
        write_labels(tmp_path / f"z{z}.{suffix}", STACK[z % 6].astype(np.uint8))
    with open_volume(tmp_path) as volume:
        assert volume.shape == (5, 20, 24)
    assert f"their numbers jump from z2.{suffix} to z4.{suffix}; a plane may be missing" in caplog.text
    caplog.clear()
    (tmp_path / "even").mkdir()
    for z in (0, 10, 20, 30):
        write_labels(tmp_path / f"even/z{z}.{suffix}", STACK[0].astype(np.uint8))
    open_volume(tmp_path / "even").close()
    assert caplog.text == ""


@pytest.mark.parametrize("shards", [(2, 32, 32), None])
def test_the_file_of_a_chunk_is_empty(tmp_path, shards):
    """The disk was full while a zarr was copied: files are there, and empty."""
    array = zarr.create_array(tmp_path / "a.zarr", shape=(6, 32, 32), chunks=(1, 16, 16), shards=shards, dtype="u2")
    array[:] = 7
    file = max(f for f in (tmp_path / "a.zarr" / "c").rglob("*") if f.is_file())
    file.write_bytes(b"")
    key = file.relative_to(tmp_path / "a.zarr").as_posix()
    with pytest.raises(InputFileError, match=f"the file of chunk {key} is empty" if shards else "empty|cannot be read"):
        as_volume(tmp_path / "a.zarr")
