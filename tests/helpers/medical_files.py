"""NIfTI, MRC and DICOM files, written without any code of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """A volume z y x as NIfTI, whose arrays are x y z."""
    import nibabel

    nibabel.save(nibabel.Nifti1Image(array.transpose(), np.eye(4) if affine is None else affine), path)
    return path


def save_mrc(path: Path, array: np.ndarray) -> Path:
    import mrcfile

    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(array)
    return path


def dicom_plane(array: np.ndarray, number: int, syntax: str | None = None):
    """A plane of uint8, uint16 or bool (1 bit) as a DICOM data set."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    bits = 1 if array.dtype == bool else array.dtype.itemsize * 8
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 1}"
    data.SeriesInstanceUID, data.InstanceNumber = "1.2.3", number + 1
    data.Rows, data.Columns = array.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation = bits - 1, 0
    packed = np.packbits(array.ravel(), bitorder="little") if bits == 1 else array
    data.PixelData = packed.tobytes() + b"\0" * (packed.nbytes % 2)
    return data


def save_dicom(folder: Path, array: np.ndarray) -> Path:
    """A series: one file a plane."""
    folder.mkdir()
    for z, plane in enumerate(array):
        dicom_plane(plane, z).save_as(folder / f"{z}.dcm", enforce_file_format=True)
    return folder
