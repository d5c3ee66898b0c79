"""MRC, NIfTI and DICOM as volumes, through their own libraries."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from distillfss_core.errors import ImageError, InputFileError, SettingsError
from distillfss_core.types import Array
from distillfss_core.volumes.source import (
    MICROMETER,
    UNITS,
    ArraySource,
    Opened,
    file_identity,
    files_digest,
    letters_of,
)

log: logging.Logger = logging.getLogger(__name__)

MRC = (".mrc", ".rec", ".st", ".map")
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom", ".ima")
_IMOD = 1146047817  # stamp of IMOD in the header of an MRC file
_UNEVEN = 0.01  # of the step between planes


def _library(module: str, path: Path) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{path}: reading it needs {module.partition('.')[0]}: pip install 'napari-distillfss[formats]'"
        ) from error


# MRC


def open_mrc(path: Path, axes: str | None, series: int | None) -> Opened:
    """Open an MRC file; its axes are those that its header maps to x, y, z, and its voxel size is in micrometers.

    Bytes are signed, as the standard of 2014 has it, except those that IMOD states to be unsigned.

    ``series`` is ignored: a file holds one volume.

    Raises
    ------
    SettingsError
        If mrcfile is missing, or the axes are not possible.
    ValueError, OSError
        If the file is damaged.
    """
    mrcfile = _library("mrcfile", path)
    with mrcfile.mmap(path, mode="r") as file:
        data, size, header = file.data, file.voxel_size, file.header
        order = "".join("?xyz"[int(header[name])] for name in ("maps", "mapr", "mapc"))
        stamp, flags = np.frombuffer(header.extra2.tobytes()[40:48], header.mode.dtype)
    if data.dtype == np.int8 and stamp == _IMOD and not flags & 1:
        data = data.view(np.uint8)
    if axes is None and data.ndim == 3 and sorted(order) == ["x", "y", "z"]:
        axes = order
    factor = UNITS["angstrom"]
    step = {a: float(size[a]) * factor for a in "zyx" if size[a] > 0}
    return Opened(
        ArraySource(data, letters_of(axes, data.shape, str(path))),
        file_identity("mrc", path.stat()),
        step=step,
        unit=MICROMETER if step else None,
    )


# NIfTI


class _NiftiSource(ArraySource):
    """nibabel's view of a file; the first axis of the array is the fastest on disk."""

    def __init__(self, proxy: Any, axes: str, dtype: np.dtype[Any]) -> None:
        super().__init__(proxy, axes)
        self.dtype = dtype
        self.chunks = tuple(1 if a in "tz" else n for a, n in zip(axes, self.shape, strict=True))

    def get(self, box: tuple[slice, ...]) -> Array:
        return np.asarray(self.array[box]).astype(self.dtype, copy=False)


def open_nifti(path: Path, axes: str | None, series: int | None) -> Opened:
    """Open a NIfTI file of axes x y [z [t]]; its values are scaled to float32 where the header has a slope.

    The voxel size is in micrometers where the header has a unit. ``series`` is ignored: a file holds one volume.

    Raises
    ------
    InputFileError
        If the file is no NIfTI file, damaged or cut short.
    SettingsError
        If nibabel is missing, or the axes are not possible.
    """
    nibabel = _library("nibabel", path)
    try:
        image: Any = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise InputFileError(f"{path}: is no NIfTI file, or damaged; copy it again") from error
    proxy, header = image.dataobj, image.header
    shape = tuple(int(n) for n in proxy.shape)
    if axes is None and 2 <= len(shape) <= 4:
        axes = "xyzt"[: len(shape)]
    letters = letters_of(axes, shape, str(path))
    plain = proxy.slope == 1 and proxy.inter == 0
    stored = np.dtype(header.get_data_dtype())
    needed = int(proxy.offset) + stored.itemsize * int(np.prod(shape))
    size = path.stat().st_size
    if path.suffix.lower() == ".nii" and size < needed:
        raise InputFileError(f"{path}: is cut short ({size} bytes, {needed} needed); copy it again")
    unit = UNITS.get(header.get_xyzt_units()[0])
    step = {a: float(s) * (unit or 1.0) for a, s in zip("xyz", header.get_zooms(), strict=False) if s > 0}
    return Opened(
        _NiftiSource(proxy, letters, stored if plain else np.dtype(np.float32)),
        file_identity("nifti", path.stat()),
        step=step,
        unit=MICROMETER if unit else None,
        directions=_nifti_directions(nibabel, image, letters),
    )


def _nifti_directions(nibabel: Any, image: Any, letters: str) -> str:
    """Where z, y and x increase to; empty where the file has no orientation."""
    if not (int(image.header.get("sform_code", 0)) or int(image.header.get("qform_code", 0))):
        return ""
    codes = dict(zip(letters, nibabel.aff2axcodes(image.affine), strict=False))
    return "".join(codes.get(a) or "" for a in "zyx") if len(codes) == 3 else ""


# DICOM


@dataclass(frozen=True)
class _Frame:
    """One plane: a frame of a file, and what the file states of this frame."""

    file: Path
    index: int
    header: Any

    @property
    def name(self) -> str:
        return f"{self.file.name} frame {self.index}" if self.header.get("NumberOfFrames", 1) > 1 else self.file.name


class _DicomSource:
    """Planes of a series; values are rescaled as each states (CT: Hounsfield units)."""

    axes = "zyx"

    def __init__(self, frames: Sequence[_Frame], dtype: np.dtype[Any]) -> None:
        first = frames[0].header
        self.frames, self.dtype = frames, dtype
        self.shape: tuple[int, ...] = (len(frames), int(first.Rows), int(first.Columns))
        self.chunks: tuple[int, ...] = (1, *self.shape[1:])
        self._decode = lru_cache(maxsize=4)(self._plane)

    def get(self, box: tuple[slice, ...]) -> Array:
        return np.stack([self._decode(z)[box[1:]] for z in range(box[0].start, box[0].stop)])

    def _plane(self, z: int) -> Array:
        pydicom, pixels = import_module("pydicom"), import_module("pydicom.pixels")
        frame = self.frames[z]
        try:
            stored = pixels.pixel_array(frame.file, index=frame.index)
        except pydicom.errors.InvalidDicomError as error:
            raise InputFileError(f"{frame.file}: is no DICOM file any more; copy it again") from error
        if stored.shape != self.shape[1:]:
            raise InputFileError(f"{frame.file}: is {stored.shape}, but {self.frames[0].file.name} is {self.shape[1:]}")
        if "ModalityLUTSequence" in frame.header:
            table: Array = pixels.apply_modality_lut(stored, frame.header).astype(self.dtype)
            return table
        slope, intercept = _rescale(frame.header)
        result: Array = (stored * slope + intercept).astype(self.dtype)
        return result

    def close(self) -> None:
        self._decode.cache_clear()


_TAGS = [
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SpacingBetweenSlices",
    "SliceThickness",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "BitsAllocated",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "SegmentSequence",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]
_GROUPS = {  # of an enhanced file, and what of them is used
    "PixelMeasuresSequence": ("PixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PlanePositionSequence": ("ImagePositionPatient",),
}


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, by name: those with a suffix of DICOM, or without any but with its mark."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".") and f.name != "DICOMDIR")
    return [f for f in files if f.suffix.lower() in DICOM or (not f.suffix.strip(".0123456789") and _has_mark(f))]


def _has_mark(file: Path) -> bool:
    """DICOM files often have no suffix; this is what they begin with."""
    with open(file, "rb") as data:
        return data.read(132)[128:] == b"DICM"


def open_dicom(path: Path, axes: str | None, series: int | None) -> Opened:
    """Open a DICOM file, or one series of a folder, as "z y x" in the order of the positions of its planes.

    Values are rescaled as the headers state (CT: Hounsfield units). The voxel size is in micrometers.

    Parameters
    ----------
    path : Path
    axes : str or None
        Only "zyx" is possible.
    series : int or None
        Which series of the folder, from 0; needed where there are several.

    Raises
    ------
    InputFileError
        If a file is damaged or holds no image.
    ImageError
        If pictures are in color, or a file holds several segments.
    SettingsError
        If pydicom or a decoder is missing, the series has to be chosen, or the axes are others.
    """
    pydicom = _library("pydicom", path)
    if axes not in (None, "zyx"):
        raise SettingsError(f"{path}: a DICOM series has axes zyx, not {axes}; leave axes out")
    files = dicom_files(path) if path.is_dir() else [path]
    headers = []
    for file in files:
        try:
            headers.append(pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS))
        except pydicom.errors.InvalidDicomError as error:
            raise InputFileError(f"{file}: is no DICOM file; remove it from the series, or copy it again") from error
    pairs = _one_series(path, list(zip(files, headers, strict=True)), series)
    for file, header in pairs:
        if "Rows" not in header or "Columns" not in header:
            raise InputFileError(f"{file}: holds no image; remove it from the series")
        if header.get("SamplesPerPixel", 1) != 1:
            raise ImageError(f"{file}: is a color picture; give a series of gray values")
        _check_decoder(file, header)
        segments = header.get("SegmentSequence") or ()
        if len(segments) > 1:
            listed = ", ".join(str(s.get("SegmentLabel", i)) for i, s in enumerate(segments, 1))
            raise ImageError(
                f"{file}: holds {len(segments)} segments ({listed}), each with its own planes; save one segment a file"
            )
    frames, gap = _in_order(path, [frame for file, header in pairs for frame in _frames_of(file, header)])
    header = frames[0].header
    step = {"z": gap or header.get("SpacingBetweenSlices") or header.get("SliceThickness")}
    step |= dict(zip("yx", header.get("PixelSpacing") or (), strict=False))
    scale = {a: float(s) * UNITS["mm"] for a, s in step.items() if s and float(s) > 0}
    return Opened(
        _DicomSource(frames, _dicom_dtype([f.header for f in frames])),
        {"kind": "dicom", "files": files_digest(list(dict.fromkeys(f.file for f in frames)))},
        step=scale,
        unit=MICROMETER if scale else None,
        directions=_dicom_directions(header),
    )


def _dicom_directions(header: Any) -> str:
    """Where z, y and x increase to, by the orientation of the first plane; empty where it has none."""
    orientation = header.get("ImageOrientationPatient")
    if orientation is None or len(orientation) != 6:
        return ""
    x, y = np.array(orientation[:3], float), np.array(orientation[3:], float)
    toward = []
    for vector in (np.cross(x, y), y, x):
        axis = int(np.abs(vector).argmax())
        toward.append(("LR", "PA", "SI")[axis][int(vector[axis] < 0)])
    return "".join(toward)


def _frames_of(file: Path, header: Any) -> list[_Frame]:
    """The planes of a file, each with what its functional groups state of it: its own ones before those of all."""
    count = int(header.get("NumberOfFrames") or 1)
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    each = list(header.get("PerFrameFunctionalGroupsSequence") or ())
    if each and len(each) != count:
        raise InputFileError(f"{file}: states {count} frames, and describes {len(each)}; copy it again")
    if shared is None and not each:
        if count > 1 and "ImagePositionPatient" in header:  # one place cannot be that of all frames
            del header.ImagePositionPatient
        return [_Frame(file, index, header) for index in range(count)]
    frames = []
    for index in range(count):
        own = import_module("pydicom.dataset").Dataset()
        own.update({element.tag: element for element in header if element.VR != "SQ"})
        for groups in (shared, each[index] if each else None):
            for group, names in _GROUPS.items():
                stated = (groups.get(group) or [{}])[0] if groups is not None else {}
                for name in names:
                    if stated.get(name) is not None:
                        own.pop(name, None)  # the element is that of all frames
                        setattr(own, name, stated.get(name))
        frames.append(_Frame(file, index, own))
    return frames


def _one_series(path: Path, pairs: list[tuple[Path, Any]], series: int | None) -> list[tuple[Path, Any]]:
    """The files of one series; which of several has to be said."""
    groups: dict[str, list[tuple[Path, Any]]] = {}
    for file, header in pairs:
        groups.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
    ordered = sorted(groups.values(), key=lambda g: (int(g[0][1].get("SeriesNumber") or 0), g[0][0].name))
    if series is None and len(ordered) > 1:
        listed = ", ".join(f"{i}: {g[0][1].get('SeriesDescription', '')} {len(g)}" for i, g in enumerate(ordered[:6]))
        raise SettingsError(
            f"{path}: holds {len(ordered)} series ({listed}); choose one, series 0 to {len(ordered) - 1}"
        )
    if not 0 <= (series or 0) < len(ordered):
        raise SettingsError(f"{path}: has no series {series}; it has {len(ordered)}")
    return ordered[series or 0]


def _in_order(path: Path, frames: list[_Frame]) -> tuple[list[_Frame], float | None]:
    """Planes by their place along their normal (else by number), and the step between them in mm."""
    if len(frames) == 1:
        return frames, None
    if not all("ImagePositionPatient" in f.header and "ImageOrientationPatient" in f.header for f in frames):
        return sorted(frames, key=lambda f: int(f.header.get("InstanceNumber") or 0)), None
    orientation = np.array(frames[0].header.ImageOrientationPatient, float)
    normal = np.cross(orientation[:3], orientation[3:])
    places = np.array([normal @ np.array(f.header.ImagePositionPatient, float) for f in frames])
    order = np.argsort(places, kind="stable")
    gaps = np.diff(places[order])
    gap = float(np.median(gaps))
    if gaps.min() < _UNEVEN * max(gap, 1e-6):
        first = frames[order[int(gaps.argmin())]].name
        other = "frame" if len({f.file for f in frames}) == 1 else "file"
        raise InputFileError(
            f"{path}: {first} and another {other} lie at the same place; a series has one {other} a plane "
            "(one time point)"
        )
    if gaps.max() - gaps.min() > _UNEVEN * gap:
        widest = int(gaps.argmax())
        log.warning(
            "%s: planes are %g to %g mm apart; some may be missing, most likely after %s",
            path,
            gaps.min(),
            gaps.max(),
            frames[order[widest]].name,
        )
    return [frames[k] for k in order], gap


def _check_decoder(file: Path, header: Any) -> None:
    """A compressed file is whole, but cannot be read without its decoder.

    Raises
    ------
    SettingsError
    """
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    if syntax is None or not syntax.is_transfer_syntax or not syntax.is_encapsulated:
        return
    try:
        decoder = import_module("pydicom.pixels").get_decoder(syntax)
    except NotImplementedError as error:
        raise InputFileError(f"{file}: is compressed as {syntax.name}, which is not read; save it plain") from error
    if not decoder.is_available:
        needs = [line.partition(" - requires ")[2] for line in decoder.missing_dependencies]
        choices = [_package_names(need) for need in needs]
        raise SettingsError(
            f"{file}: is compressed as {syntax.name}, and no decoder of it is installed; pip install "
            f"{' or '.join(sorted(choices, key=len))}; or save it plain"
        )


def _package_names(need: str) -> str:
    """ "numpy and gdcm>=3.0.10" of pydicom as what pip installs: "python-gdcm"."""
    names = [name for name in re.findall(r"[a-z][\w-]*", need) if name not in ("and", "numpy")]
    return " ".join("python-gdcm" if name == "gdcm" else name for name in names)


def _rescale(header: Mapping[str, Any] | Any) -> tuple[float, float]:
    slope, intercept = float(header.get("RescaleSlope") or 1), float(header.get("RescaleIntercept") or 0)
    return slope, intercept


def _dicom_dtype(headers: Sequence[Any]) -> np.dtype[Any]:
    """The type that holds every value: integers where the rescaling leaves them whole."""
    first = headers[0]
    bits = int(first.get("BitsAllocated", 16))
    if bits >= 32 and "PixelRepresentation" not in first:  # floating pixels have no such element
        return np.dtype(f"f{bits // 8}")
    if any("ModalityLUTSequence" in h for h in headers):
        return np.dtype(np.uint16)
    scales = {_rescale(h) for h in headers}
    if scales == {(1.0, 0.0)}:
        return np.dtype(f"{'i' if first.get('PixelRepresentation') else 'u'}{max(bits // 8, 1)}")
    return np.dtype(np.int32 if all(value.is_integer() for pair in scales for value in pair) else np.float32)
