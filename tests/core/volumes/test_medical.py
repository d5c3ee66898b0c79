"""MRC, NIfTI and DICOM open lazily, in the right order and size."""

from __future__ import annotations

import builtins
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from distillfss_core.errors import DistillFSSError, ImageError, InputFileError, SettingsError
from distillfss_core.volumes.opening import is_volume, stem_of
from distillfss_core.volumes.volume import open_volume
from volumes import noise

mrcfile = pytest.importorskip("mrcfile", reason="needs mrcfile: pip install mrcfile")
nibabel = pytest.importorskip("nibabel", reason="needs nibabel: pip install nibabel")
pydicom = pytest.importorskip("pydicom", reason="needs pydicom: pip install pydicom")

DATA = noise((6, 20, 24), "i2")


def write_mrc(path: Path, array: np.ndarray, voxel=(4.0, 3.0, 2.0)) -> Path:
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(array)
        file.voxel_size = voxel
    return path


def write_nifti(path: Path, array: np.ndarray, unit: str = "mm") -> Path:
    image = nibabel.Nifti1Image(array.transpose(), np.diag([0.5, 0.25, 2.0, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def write_dicom(folder: Path, array: np.ndarray, *, intercept: float = -1024, series: int = 1, names=None) -> Path:
    """One file a plane, named so that the order of names is not that of places."""
    folder.mkdir(exist_ok=True)
    for z, plane in enumerate(array):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.{series}.{z + 1}"
        data = pydicom.dataset.FileDataset(str(folder), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.SeriesNumber = f"1.2.{series}", series
        data.Rows, data.Columns = plane.shape
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 1, 1
        data.PhotometricInterpretation = "MONOCHROME2"
        data.PixelSpacing, data.SliceThickness = [0.7, 0.6], 9.0
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.5 * z - 100]
        data.RescaleSlope, data.RescaleIntercept = 1, intercept
        data.PixelData = plane.astype("<i2").tobytes()
        name = names(z) if names else f"{series}_{len(array) - z}.dcm"
        data.save_as(folder / name, enforce_file_format=True)
    return folder


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("stamp", "flags", "kind"), [(1146047817, 0, "u1"), (1146047817, 1, "i1"), (0, 0, "i1")])
def test_bytes_of_mrc_are_unsigned_where_imod_states_so(tmp_path, order, stamp, flags, kind):
    """https://bio3d.colorado.edu/imod/doc/mrc_format.txt"""
    stored = noise((3, 8, 9), "u1")
    stored[0, 0] = range(246, 255)
    path = write_mrc(tmp_path / "a.mrc", stored.view("i1"))
    content = bytearray(path.read_bytes())
    if order == ">":
        kinds = mrcfile.dtypes.HEADER_DTYPE
        content[:1024] = np.frombuffer(content[:1024], kinds).astype(kinds.newbyteorder(">")).tobytes()
        content[212:216] = b"\x11\x11\0\0"
    content[152:160] = np.array([stamp, flags], f"{order}i4").tobytes()
    path.write_bytes(content)
    with open_volume(path) as volume:
        assert volume.dtype == kind
        assert np.array_equal(volume.read(), stored.view(kind))


def test_mrc_is_mapped_with_its_voxel_size_and_axes(tmp_path):
    with open_volume(write_mrc(tmp_path / "a.mrc", DATA)) as volume:
        assert np.array_equal(volume.read(), DATA)
        assert np.array_equal(volume[2:4, 5, 1:], DATA[2:4, 5, 1:])
        assert volume.scale == pytest.approx((2e-4, 3e-4, 4e-4))
        assert volume.unit == "micrometer"
    with mrcfile.open(tmp_path / "a.mrc", mode="r+") as file:
        file.header.mapc, file.header.mapr, file.header.maps = 3, 2, 1  # columns run along z
    assert open_volume(tmp_path / "a.mrc").shape == (24, 20, 6)
    assert np.array_equal(open_volume(tmp_path / "a.mrc").read(), DATA.transpose())
    assert open_volume(write_mrc(tmp_path / "f.map", DATA.astype(np.float32), 0.0)).scale == (None, None, None)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_has_x_first_on_disk(tmp_path, name):
    with open_volume(write_nifti(tmp_path / name, DATA)) as volume:
        assert volume.shape == DATA.shape
        assert volume.dtype == DATA.dtype
        assert np.array_equal(volume.read(), DATA)
        assert np.array_equal(volume.plane(4), DATA[4])
        assert volume.scale == pytest.approx((2000.0, 250.0, 500.0))
    several = write_nifti(tmp_path / f"t{name}", np.stack([DATA, DATA + 1]))
    with pytest.raises(SettingsError, match="2 time points"):
        open_volume(several)
    assert np.array_equal(open_volume(several, time=1).read(), DATA + 1)
    assert open_volume(write_nifti(tmp_path / f"u{name}", DATA, "unknown")).unit is None


def test_nifti_values_are_scaled(tmp_path):
    image = nibabel.Nifti1Image(DATA.transpose(), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    assert volume.dtype == np.float32
    theirs = nibabel.load(tmp_path / "a.nii").get_fdata().transpose()
    assert np.allclose(volume.read(), theirs)


def test_a_dicom_series_is_in_the_order_of_places_in_hounsfield_units(tmp_path):
    with open_volume(write_dicom(tmp_path / "ct", DATA)) as volume:
        assert np.array_equal(volume.read(), DATA.astype(int) - 1024)
        assert np.array_equal(volume[3, 4:9, 2], DATA[3, 4:9, 2].astype(int) - 1024)
        assert volume.scale == pytest.approx((2500.0, 700.0, 600.0))
    plain = write_dicom(tmp_path / "plain", DATA, intercept=0, names=lambda z: f"{z:03}")  # without suffix
    assert open_volume(plain).dtype == np.int16
    assert np.array_equal(open_volume(plain).read(), DATA)
    single = sorted((tmp_path / "ct").iterdir())[0]
    assert open_volume(single).shape == (1, 20, 24)


def test_dicom_that_is_not_one_series_is_said(tmp_path, caplog):
    both = write_dicom(write_dicom(tmp_path / "both", DATA), DATA[:3], series=2)
    with pytest.raises(SettingsError, match="holds 2 series"):
        open_volume(both)
    assert open_volume(both, series=1).shape == (3, 20, 24)
    twice = write_dicom(write_dicom(tmp_path / "twice", DATA), DATA[:2], names=lambda z: f"again{z}.dcm")
    with pytest.raises(InputFileError, match="same place"):
        open_volume(twice)
    gap = write_dicom(tmp_path / "gap", DATA)
    (gap / "1_3.dcm").unlink()
    assert open_volume(gap).shape[0] == 5
    assert "some may be missing" in caplog.text
    (gap / "1_4.dcm").write_bytes(b"nothing")
    with pytest.raises(InputFileError, match=r"1_4\.dcm: is no DICOM"):
        open_volume(gap)
    with pytest.raises(SettingsError, match="leave axes out"):
        open_volume(both, axes="tyx")


def test_a_color_dicom_is_refused(tmp_path):
    folder = write_dicom(tmp_path / "c", DATA[:1])
    data = pydicom.dcmread(folder / "1_1.dcm")
    data.SamplesPerPixel = 3
    data.save_as(folder / "1_1.dcm")
    with pytest.raises(ImageError, match="color"):
        open_volume(folder)


@pytest.mark.parametrize("seed", range(12))
def test_a_file_cut_short_is_one_clear_error_and_never_silent_zeros(tmp_path, seed):
    rng = random.Random(seed)
    data = DATA + 1
    files = [write_mrc(tmp_path / "a.mrc", data), write_nifti(tmp_path / "a.nii", data)]
    files += [write_nifti(tmp_path / "b.nii.gz", data)]
    folder = write_dicom(tmp_path / "ct", data, intercept=0)
    files += [rng.choice(sorted(folder.iterdir()))]
    for file in files:
        file.write_bytes(file.read_bytes()[: rng.randrange(1, file.stat().st_size - 1)])
        source = folder if file.parent == folder else file
        message, found = None, data
        try:
            found = open_volume(source).read()
        except DistillFSSError as error:
            message = str(error)
        assert message is None or ("\n" not in message and source.name in message)
        assert np.array_equal(found, data), file


@pytest.mark.parametrize(("module", "name"), [("mrcfile", "a.mrc"), ("nibabel", "a.nii"), ("pydicom", "a.dcm")])
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingsError, match=rf"needs {module}: pip install"):
        open_volume(tmp_path / name)


def test_nothing_is_imported_for_other_formats(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", DATA)
    real = builtins.__import__

    def watched(name, *rest):
        assert name.partition(".")[0] not in ("mrcfile", "nibabel", "pydicom")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", watched)
    assert open_volume(tmp_path / "a.npy").shape == DATA.shape


def test_names_of_volumes(tmp_path):
    write_dicom(tmp_path / "ct.2", DATA[:1])
    assert is_volume(tmp_path / "ct.2")
    assert stem_of(tmp_path / "ct.2") == "ct.2"
    for name, stem in (("a.nii.gz", "a"), ("b.ome.tif", "b"), ("c.mrc", "c"), ("d.e.tif", "d.e")):
        (tmp_path / name).touch()
        assert is_volume(tmp_path / name)
        assert stem_of(tmp_path / name) == stem
    (tmp_path / "notes.txt").touch()
    assert not is_volume(tmp_path / "notes.txt")
    (tmp_path / "v.ome.zarr").mkdir()
    assert stem_of(tmp_path / "v.ome.zarr") == "v"


# enhanced files


def write_enhanced(path: Path, array: np.ndarray, *, places=None, slopes=None, shared: bool = True):
    """A file of many frames; what describes them is in functional groups, as of an enhanced CT."""
    data = pydicom.dataset.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SeriesInstanceUID = "1.2.9"
    data.NumberOfFrames, data.Rows, data.Columns = array.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    measures, values, orientation = (pydicom.dataset.Dataset() for _ in range(3))
    measures.PixelSpacing, measures.SliceThickness = ["0.5", "0.7"], "9"
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = "2", "-1024", "HU"
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    groups = pydicom.dataset.Dataset()
    groups.PixelMeasuresSequence, groups.PlaneOrientationSequence = [measures], [orientation]
    if shared:
        groups.PixelValueTransformationSequence = [values]
        data.SharedFunctionalGroupsSequence = [groups]
    each = []
    for z in range(len(array)):
        own = pydicom.dataset.Dataset()
        if places is not None:
            own.PlanePositionSequence = [pydicom.dataset.Dataset()]
            own.PlanePositionSequence[0].ImagePositionPatient = [0, 0, places[z]]
        if slopes is not None:
            own.PixelValueTransformationSequence = [pydicom.dataset.Dataset()]
            own.PixelValueTransformationSequence[0].RescaleSlope = str(slopes[z])
            own.PixelValueTransformationSequence[0].RescaleIntercept = "0"
        each.append(own)
    if places is not None or slopes is not None:
        data.PerFrameFunctionalGroupsSequence = each
    data.PixelData = array.astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)
    return data


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]])
def test_frames_of_an_enhanced_file_lie_in_the_order_of_their_places(tmp_path, order):
    write_enhanced(tmp_path / "e.dcm", DATA[order], places=[2.5 * z - 7 for z in order])
    with open_volume(tmp_path / "e.dcm") as volume:
        assert np.array_equal(volume.read(), DATA.astype(int) * 2 - 1024)
        assert np.array_equal(volume[3, 4:9, 2], DATA[3, 4:9, 2].astype(int) * 2 - 1024)
        assert volume.scale == pytest.approx((2500.0, 500.0, 700.0))


def test_each_frame_has_the_rescaling_that_its_own_group_states(tmp_path):
    write_enhanced(tmp_path / "e.dcm", DATA, slopes=[1, 2, 3, 4, 5, 0.5])
    expected = DATA * np.array([1, 2, 3, 4, 5, 0.5])[:, None, None]
    with open_volume(tmp_path / "e.dcm") as volume:
        assert np.allclose(volume.read(), expected)
        assert volume.scale == pytest.approx((9000.0, 500.0, 700.0))


def test_several_files_of_many_frames_are_one_series(tmp_path):
    write_enhanced(tmp_path / "b.dcm", DATA[:3], places=[0, 1, 2])
    write_enhanced(tmp_path / "a.dcm", DATA[3:], places=[3, 4, 5])
    with open_volume(tmp_path) as volume:
        assert np.array_equal(volume.read(), DATA.astype(int) * 2 - 1024)


def test_frames_that_are_no_stack_are_an_error(tmp_path):
    write_enhanced(tmp_path / "e.dcm", DATA, places=[0, 1, 2, 0, 1, 2])
    with pytest.raises(InputFileError, match=r"frame \d and another frame lie at the same place"):
        open_volume(tmp_path / "e.dcm")
    data = write_enhanced(tmp_path / "f.dcm", DATA, places=range(6))
    del data.PerFrameFunctionalGroupsSequence[5]
    data.save_as(tmp_path / "f.dcm", enforce_file_format=True)
    with pytest.raises(InputFileError, match="states 6 frames, and describes 5"):
        open_volume(tmp_path / "f.dcm")


def test_a_table_of_values_is_applied(tmp_path):
    data = write_enhanced(tmp_path / "t.dcm", DATA, shared=False)
    table = pydicom.dataset.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [int(DATA.max()) + 1, 0, 16], "US"
    values = np.arange(int(DATA.max()) + 1, dtype="<u2") * 3 + 5
    table.LUTData = values.tobytes()
    data.ModalityLUTSequence = [table]
    data.save_as(tmp_path / "t.dcm", enforce_file_format=True)
    with open_volume(tmp_path / "t.dcm") as volume:
        assert volume.dtype == np.uint16
        assert np.array_equal(volume.read(), DATA.astype(int) * 3 + 5)
