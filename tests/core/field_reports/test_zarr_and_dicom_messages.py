"""Plates, zipped and edited zarr, channels by name, and DICOM that is whole but not read."""

import csv
import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from distillfss_core import ImageError, InputFileError, SettingsError, open_volume, plan_batch
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.segmentation.batch import iter_batch
from medical_files import dicom_plane
from volumes import noise, write_ome_zarr

IMAGE = noise((3, 40, 36))


def write_plate(path: Path, version: str, fields=("A/1/0", "A/1/1", "B/2/0"), listed=()) -> Path:
    """An HCS plate of fields, each an image of other voxels."""
    wells = list(dict.fromkeys([*(f.rpartition("/")[0] for f in fields), *listed]))
    plate = {"wells": [{"path": w} for w in wells], "rows": [{"name": "A"}], "columns": [{"name": "1"}]}
    put_attributes(path, {"plate": plate}, version)
    for well in dict.fromkeys(f.rpartition("/")[0] for f in fields):
        put_attributes(path / well.split("/")[0], {}, version)
        images = [{"path": f.rpartition("/")[2]} for f in fields if f.startswith(well)]
        put_attributes(path / well, {"well": {"images": images}}, version)
    for k, field in enumerate(fields):
        write_ome_zarr(path / field, IMAGE + k, version=version)
    return path


def put_attributes(path: Path, attributes: dict, version: str) -> None:
    group = zarr.open_group(path, mode="a", zarr_format=3 if version == "0.5" else 2)
    group.attrs.update({"ome": {"version": "0.5", **attributes}} if version == "0.5" else attributes)


def zip_folder(folder: Path, to: Path, inside: str, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(to, "w", compression) as file:
        for part in sorted(folder.rglob("*")):
            file.write(part, Path(inside) / part.relative_to(folder))
    return to


# plates


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_every_field_of_a_plate_is_a_volume_of_batch(tmp_path, version):
    """A user gives a plate of a screen to batch."""
    plate = write_plate(tmp_path / "screen.ome.zarr", version)
    jobs = plan_batch(plate, tmp_path / "out", {})
    assert [job.output.name for job in jobs] == [
        "screen_A_1_0.ome.zarr",
        "screen_A_1_1.ome.zarr",
        "screen_B_2_0.ome.zarr",
    ]
    for k, job in enumerate(jobs):
        np.testing.assert_array_equal(open_volume(job.source)[:], IMAGE + k)
    assert [job.source for job in plan_batch(tmp_path, tmp_path / "out", {})] == [job.source for job in jobs]
    (tmp_path / "t.csv").write_text("volume\nscreen.ome.zarr\n")
    assert [job.source for job in plan_batch(tmp_path / "t.csv", tmp_path / "out", {})] == [job.source for job in jobs]
    well = plan_batch(plate / "A" / "1", tmp_path / "out", {})
    assert [job.source for job in well] == [plate / "A" / "1" / "0", plate / "A" / "1" / "1"]
    (tmp_path / "t.csv").write_text("volume,output\nscreen.ome.zarr,a.ome.zarr\n")
    with pytest.raises(InputFileError, match=r"t\.csv line 2: .* holds 3 images; leave its output out"):
        plan_batch(tmp_path / "t.csv", tmp_path / "out", {})


def test_a_plate_is_segmented_and_a_well_that_is_missing_fails_alone(tmp_path, plain_student):
    """A user has copied a plate in part."""
    plate = write_plate(tmp_path / "screen.zarr", "0.4", ("A/1/0",), listed=["C/3"])
    (tmp_path / "out").mkdir()
    jobs = plan_batch(plate, tmp_path / "out", {})
    list(iter_batch(jobs, plain_student, tmp_path / "out" / "report.csv"))
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "C/3: no such file or folder" in rows[1]["error"]
    assert (tmp_path / "out" / "screen_A_1_0.ome.zarr" / "zarr.json").is_file()


def test_a_plate_opened_as_a_volume_names_an_image_of_it(tmp_path):
    """A user opens a plate, a well of one field, and one of several."""
    plate = write_plate(tmp_path / "p.zarr", "0.5")
    with pytest.raises(InputFileError, match=r"is a plate of 2 wells; give one of its images, e\.g\. .*p\.zarr/A/1/0"):
        open_volume(plate)
    np.testing.assert_array_equal(open_volume(plate / "B" / "2")[:], IMAGE + 2)
    np.testing.assert_array_equal(open_volume(plate / "A" / "1", series=1)[:], IMAGE + 1)
    with pytest.raises(InputFileError, match=r"is a well of 2 images \(0, 1\); give the path of one"):
        open_volume(plate / "A" / "1")
    with pytest.raises(SettingsError, match="has no series 2"):
        open_volume(plate / "A" / "1", series=2)


def test_a_collection_and_a_single_zarr_are_volumes_of_batch(tmp_path):
    """A user gives batch what bioformats2raw wrote, or one image."""
    collection = tmp_path / "c.zarr"
    put_attributes(collection, {"bioformats2raw.layout": 3}, "0.4")
    for k in range(2):
        write_ome_zarr(collection / str(k), IMAGE + k, version="0.4")
    assert [job.output.name for job in plan_batch(collection, tmp_path, {})] == ["c_0.ome.zarr", "c_1.ome.zarr"]
    (chosen,) = plan_batch(collection, tmp_path, {"series": 1})
    np.testing.assert_array_equal(open_volume(chosen.source, **chosen.options)[:], IMAGE + 1)
    single = write_ome_zarr(tmp_path / "one.zarr", IMAGE)
    assert [(job.source, job.output.name) for job in plan_batch(single, tmp_path, {})] == [(single, "one.ome.zarr")]


def test_a_plate_with_damaged_metadata_fails_alone(tmp_path):
    """A user has several plates in a folder, one of them damaged."""
    write_plate(tmp_path / "a.zarr", "0.4", ("A/1/0",))
    put_attributes(tmp_path / "b.zarr", {"plate": {"wells": 5}}, "0.4")
    jobs = plan_batch(tmp_path, tmp_path / "out", {})
    assert [job.output.name for job in jobs] == ["a_A_1_0.ome.zarr", "b.ome.zarr"]
    with pytest.raises(InputFileError, match="the metadata of its wells or images are damaged"):
        open_volume(tmp_path / "b.zarr")


# zip


@pytest.mark.parametrize("inside", ["", "i.zarr", "folder/i.zarr"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zipped_zarr_is_found_wherever_it_lies_in_the_file(tmp_path, inside, compression):
    """A user zips the folder instead of what is in it, as file managers do."""
    folder = write_ome_zarr(tmp_path / "i.zarr", IMAGE)
    (tmp_path / "zips").mkdir()
    path = zip_folder(folder, tmp_path / "zips" / "i.zarr.zip", inside, compression)
    volume = open_volume(path, level=1)
    np.testing.assert_array_equal(volume[:], IMAGE[:, ::2, ::2])
    assert volume.levels == ((3, 40, 36), (3, 20, 18))
    assert [job.output.name for job in plan_batch(path.parent, tmp_path, {})] == ["i.ome.zarr"]
    np.testing.assert_array_equal(open_volume(path.rename(tmp_path / "i.ozx"))[:], IMAGE)


def test_a_zip_of_a_plate_or_of_several_images_is_opened_by_the_path_inside(tmp_path):
    """A user has a zip with several images."""
    for k in range(2):
        write_ome_zarr(tmp_path / "both" / f"{k}.zarr", IMAGE + k)
    path = zip_folder(tmp_path / "both", tmp_path / "both.zip", "")
    with pytest.raises(InputFileError, match=r"holds 2 zarrs \(0\.zarr, 1\.zarr\); give .*both\.zip/0\.zarr"):
        open_volume(path)
    np.testing.assert_array_equal(open_volume(path / "1.zarr")[:], IMAGE + 1)
    plate = zip_folder(write_plate(tmp_path / "p.zarr", "0.5"), tmp_path / "p.zip", "p.zarr")
    with pytest.raises(InputFileError, match=r"is a plate of 2 wells; .* e\.g\. .*p\.zip/A/1/0"):
        open_volume(plate)
    np.testing.assert_array_equal(open_volume(plate / "A/1/1")[:], IMAGE + 1)
    with pytest.raises(InputFileError, match="has no zarr 'A/9/0' in it"):
        open_volume(plate / "A/9/0")


def test_a_chunk_that_is_missing_in_a_zip_is_counted(tmp_path, caplog):
    """A user has a zip that was made before all chunks were there."""
    folder = write_ome_zarr(tmp_path / "i.zarr", IMAGE + 1, chunks=(1, 40, 36), levels=1)
    (folder / "0" / "c" / "1" / "0" / "0").unlink()
    volume = open_volume(zip_folder(folder, tmp_path / "i.zip", "i.zarr"))
    with caplog.at_level(logging.WARNING):
        assert not volume[1].any()
    assert "1 of 1 chunks asked for have no file" in caplog.text
    assert volume.missing == {"c/1/0/0"}


def test_a_zip_without_zarr_states_what_it_holds(tmp_path):
    """A user gives the RoiSet.zip of ImageJ, or a zip that was cut short."""
    with zipfile.ZipFile(tmp_path / "RoiSet.zip", "w") as file:
        file.writestr("0001.roi", b"Iout")
    with pytest.raises(InputFileError, match=r"holds no zarr \(\.roi\); save the regions of interest as a mask"):
        open_volume(tmp_path / "RoiSet.zip")
    whole = zip_folder(write_ome_zarr(tmp_path / "i.zarr", IMAGE), tmp_path / "i.zip", "")
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(InputFileError, match="is no zip file, or cut short"):
        open_volume(whole)


# metadata


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_level_that_was_added_after_the_metadata_were_consolidated_is_read(tmp_path, version):
    """A user adds a level to an OME-Zarr with consolidated metadata, which then do not list it."""
    path = write_ome_zarr(tmp_path / "k.zarr", IMAGE, version=version, levels=1)
    zarr.consolidate_metadata(path)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    group.create_array("1", data=IMAGE[:, ::2, ::2], chunks=(1, 20, 18))
    attributes = group.attrs.asdict()
    multiscale = attributes.get("ome", attributes)["multiscales"][0]
    scale = {"type": "scale", "scale": [1.0, 2.0, 2.0]}
    multiscale["datasets"].append({"path": "1", "coordinateTransformations": [scale]})
    group.attrs.put(attributes)
    volume = open_volume(path, level=1)
    np.testing.assert_array_equal(volume[:], IMAGE[:, ::2, ::2])
    assert volume.scale == (1, 2, 2)


# channels


def test_a_channel_is_found_by_its_name(tmp_path, caplog):
    """A user names a channel by its wavelength, or in other letters."""
    image = noise((3, *IMAGE.shape))
    path = write_ome_zarr(tmp_path / "c.zarr", image, axes="czyx", channels=("405", "DAPI", "1"))
    for channel, number in ((405, 0), ("405", 0), ("dapi", 1), (2, 2), ("1", 2)):
        np.testing.assert_array_equal(open_volume(path, channel=channel)[:], image[number])
    with pytest.raises(SettingsError, match=r"has no channel 561 \(405, DAPI, 1\); choose 0 to 2, a name, or all"):
        open_volume(path, channel=561)
    assert not caplog.records
    np.testing.assert_array_equal(open_volume(path, channel=1)[:], image[1])
    assert "channel 1 is read by its number from 0, named 'DAPI'; the channel named '1' has number 2" in caplog.text


def test_two_channels_of_one_name_are_chosen_by_number(tmp_path):
    """A user has two channels of one name."""
    image = noise((2, *IMAGE.shape))
    path = write_ome_zarr(tmp_path / "c.zarr", image, axes="czyx", channels=("GFP", "GFP"))
    with pytest.raises(SettingsError, match=r"has several channels 'GFP' \(GFP, GFP\); give one by its number"):
        open_volume(path, channel="GFP")


# DICOM


@pytest.fixture
def pydicom():
    return pytest.importorskip("pydicom", reason="needs pydicom: pip install pydicom")


def test_a_segmentation_of_one_bit_is_labels(tmp_path, capsys, pydicom):
    """A user gives a DICOM segmentation to instances and evaluate."""
    mask = np.zeros((2, 32, 40), bool)
    mask[:, 3:9, 5:11] = mask[1, 20:25, 20:30] = True
    data = dicom_plane(mask, 0)
    data.NumberOfFrames = 2
    data.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    volume = open_volume(tmp_path / "seg.dcm")
    assert volume.dtype == np.uint8
    np.testing.assert_array_equal(volume[:], mask)
    np.save(tmp_path / "t.npy", mask[:, ::-1].copy())
    assert main(["evaluate", str(tmp_path / "seg.dcm"), str(tmp_path / "t.npy"), "--json"]) == FINE
    expected = (mask & mask[:, ::-1]).sum() / (mask | mask[:, ::-1]).sum()
    assert json.loads(capsys.readouterr().out)["iou"] == pytest.approx(expected)


def test_several_segments_in_a_file_are_not_stacked(tmp_path, pydicom):
    """A user gives a DICOM segmentation of two organs, whose frames are not planes of one volume."""
    data = dicom_plane(np.zeros((2, 32, 40), bool), 0)
    data.NumberOfFrames = 2
    data.SegmentSequence = [pydicom.Dataset(), pydicom.Dataset()]
    data.SegmentSequence[0].SegmentLabel, data.SegmentSequence[1].SegmentLabel = "liver", "spleen"
    data.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    with pytest.raises(ImageError, match=r"holds 2 segments \(liver, spleen\), .*save one segment a file"):
        open_volume(tmp_path / "seg.dcm")


def test_floating_pixels_are_read_as_they_are(tmp_path, pydicom):
    """A user gives a parametric map."""
    values = np.linspace(0, 1, 32 * 40, dtype=np.float32).reshape(32, 40)
    data = dicom_plane(np.zeros((32, 40), np.uint16), 0)
    data.FloatPixelData = values.tobytes()
    del data.PixelData, data.PixelRepresentation
    data.BitsAllocated = data.BitsStored = 32
    data.save_as(tmp_path / "map.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(open_volume(tmp_path / "map.dcm")[0], values)


def test_a_decoder_that_is_missing_is_named(tmp_path, capsys, monkeypatch, pydicom):
    """A user has compressed files, and not the package that decodes them."""
    import imagecodecs
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGLSLossless

    data = dicom_plane(IMAGE[0], 0, JPEGLSLossless)
    data.PixelData = encapsulate([imagecodecs.jpegls_encode(IMAGE[0])])
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    decoder = get_decoder(JPEGLSLossless)
    monkeypatch.setattr(decoder, "_available", {})
    monkeypatch.setattr(decoder, "_unavailable", {"gdcm": ("gdcm>=3.0.10",), "pyjpegls": ("numpy", "pyjpegls>=1.2")})
    assert main(["instances", str(tmp_path / "a.dcm"), "-o", str(tmp_path / "o.ome.zarr")]) == ERROR
    line = capsys.readouterr().err
    assert "a.dcm: is compressed as JPEG-LS Lossless Image Compression, and no decoder of it is installed" in line
    assert "pip install pyjpegls or python-gdcm; or save it plain" in line
    assert not (tmp_path / "o.ome.zarr").exists()
