"""Image files as arrays: planes and stacks, TIFF, PNG, JPEG, BMP and .npy."""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import ExifTags, Image

from distillfss_core.errors import ImageError, InputFileError, SettingsError
from distillfss_core.io.tiff import TiffImage, open_tiff_file
from distillfss_core.types import Array

log: logging.Logger = logging.getLogger(__name__)

TIFF_SUFFIXES = (".tif", ".tiff")
PILLOW_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
READABLE = (*TIFF_SUFFIXES, *PILLOW_SUFFIXES, ".npy")
KINDS_READ = "TIFF, PNG, JPEG, BMP or .npy"

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_PIXELS = 1 << 31
"""Of a PNG, JPEG or BMP, which is decoded whole: a small file can claim any size."""

PathLike = str | os.PathLike[str]

# What decoders raise on files that are cut short or damaged.
DECODER_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    SyntaxError,
    MemoryError,
    struct.error,
    zlib.error,
    tifffile.TiffFileError,
    Image.DecompressionBombError,
)


class _PickledError(InputFileError):
    """Error for a .npy file that holds pickled objects."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """What a file holds: (y x), (y x c), (z y x) or (z y x c), and which of them."""

    array: Array
    stack: bool
    channels: bool


def read_image(path: PathLike) -> Array:
    """Read one plane.

    Palettes of PNG and BMP become RGB. Of a TIFF the numbers are read, as its palette mostly is a lookup table by which
    ImageJ shows intensities. An alpha channel that is the same everywhere is dropped, any other is kept as a channel.
    A PNG or JPEG is turned as its EXIF orientation states; a TIFF is read as it is stored, and the log names an
    orientation.

    Returns
    -------
    array, shape (y, x) or (y, x, c)
        The dtype is the file's.

    Raises
    ------
    InputFileError
        If the file is missing, of an unknown kind or damaged.
    ImageError
        If it holds a stack, or several images of different sizes.
    """
    pixels = read_pixels(Path(path))
    return single_plane(pixels, Path(path)).array


def read_stack(path: PathLike, *, own_planes: bool = False) -> Array:
    """Read a stack of planes; one plane is a stack of one. Errors are those of `read_image`.

    Parameters
    ----------
    path : path
    own_planes : bool
        Of a file of an OME-TIFF of several files, read only the planes that lie in this file.

    Returns
    -------
    array, shape (z, y, x) or (z, y, x, c)
    """
    pixels = read_pixels(Path(path), npy_stack=True, own_planes=own_planes)
    return pixels.array if pixels.stack else pixels.array[None]


def read_pixels(path: Path, palette_numbers: bool = False, npy_stack: bool = False, own_planes: bool = False) -> Pixels:
    """Read any readable file; ``npy_stack``: the first of three axes of a .npy file is z.

    ``own_planes``: as for `read_stack`.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputFileError(f"{path}: no such file; check the name")
    if path.is_dir():
        raise InputFileError(f"{path}: is a folder; give a file")
    if suffix not in READABLE:
        raise InputFileError(f"{path}: cannot read {suffix or 'a file without suffix'!r}; give {KINDS_READ}")
    try:
        if suffix in TIFF_SUFFIXES:
            return _read_tiff(path, own_planes)
        if suffix == ".npy":
            return _read_npy(path, npy_stack)
        return _plane(_read_pillow(path, palette_numbers))
    except (ImageError, InputFileError):
        raise
    except MemoryError as error:
        raise InputFileError(f"{path}: does not fit into memory; cut it into smaller files") from error
    except DECODER_ERRORS as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputFileError(f"{path}: cannot be read ({why}); check that the file is whole") from error


def _plane(array: Array) -> Pixels:
    return Pixels(array, stack=False, channels=array.ndim == 3)


def _read_tiff(path: Path, own_planes: bool) -> Pixels:
    with open_tiff_file(path) as file:
        if len(file.series) != 1:
            sizes = ", ".join("x".join(map(str, s.shape)) for s in list(file.series)[:4])
            raise ImageError(f"{path}: holds {len(file.series)} images ({sizes}); save the one you want on its own")
        image = TiffImage(file, path)
        axes, alpha = image.axes, image.has_alpha
        array = image.read_own() if own_planes else image.read()
    if array.ndim != len(axes) or 0 in array.shape:
        raise InputFileError(f"{path}: cannot be read (shape {array.shape} for axes {axes}); save it anew")
    keep = [i for i, (a, n) in enumerate(zip(axes, array.shape, strict=True)) if a in "YX" or n > 1]
    array = array.reshape([array.shape[i] for i in keep])
    axes = "".join(axes[i] for i in keep)
    channel = [i for i, a in enumerate(axes) if a in "CS"]
    depth = [i for i, a in enumerate(axes) if a not in "CSYX"]
    if sorted(a for a in axes if a in "YX") != ["X", "Y"] or len(channel) > 1 or len(depth) > 1:
        raise ImageError(f"{path}: has axes {axes} {array.shape}; give y x, y x c, z y x or z y x c (one time point)")
    array = array.transpose([*depth, axes.index("Y"), axes.index("X"), *channel])
    if channel and alpha:
        array = _without_plain_alpha(array)
    return Pixels(array, stack=bool(depth), channels=array.ndim == 3 + bool(depth))


def load_npy(path: Path, *, mapped: bool = False) -> Any:
    """The array of a .npy file, in memory or mapped from the file.

    Raises
    ------
    InputFileError
        If it holds pickled objects, as the _seg.npy of Cellpose does: to open a pickle runs what is in it. If it is a
        .npz archive.
    """
    with path.open("rb") as file:
        if file.read(4) in _ZIP:
            raise InputFileError(f"{path}: is a .npz archive; save the array that you want with numpy.save")
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except ValueError as error:
        if not re.search("pickle|Python objects", str(error)):
            raise
        raise _PickledError(
            f"{path}: holds pickled Python objects, which are not opened because a pickle can run any program; of a "
            "_seg.npy of Cellpose, save the masks as TIFF or PNG (in Cellpose: File, Save masks)"
        ) from error


def is_pickled(path: Path) -> bool:
    """Whether a .npy file holds pickled objects instead of an array."""
    if path.suffix.lower() != ".npy":
        return False
    try:
        load_npy(path, mapped=True)
    except _PickledError:
        return True
    except (InputFileError, *DECODER_ERRORS):
        return False
    return False


def _read_npy(path: Path, stack: bool) -> Pixels:
    array = load_npy(path)
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise ImageError(f"{path}: holds an array of shape {np.shape(array)}; give y x, y x c, z y x or z y x c")
    if array.ndim == 4:
        return Pixels(array, stack=True, channels=True)
    if array.ndim == 3 and (stack or array.shape[2] > 16):  # nobody has that many channels: z y x
        return Pixels(array, stack=True, channels=False)
    return _plane(array)


def _read_pillow(path: Path, palette_numbers: bool) -> Array:
    """A picture as viewers show it: turned as its EXIF data state."""
    with open(path, "rb") as file:
        head = file.read(26)
    with open(path, "rb") as file, _open_picture(file, head) as file_picture:
        if math.prod(file_picture.size) > _MOST_PIXELS:
            width, height = file_picture.size
            raise InputFileError(
                f"{path}: has {width} x {height} pixels, a {path.suffix[1:].upper()} may have at most {_MOST_PIXELS}; "
                "save it as TIFF"
            )
        array = _decode_picture(path, head, file_picture, palette_numbers)
        return _turned(array, _orientation_of(file_picture, path))


def _decode_picture(path: Path, head: bytes, file_picture: Image.Image, palette_numbers: bool) -> Array:
    depth, color = (head[24], head[25]) if head[:8] == _PNG and len(head) == 26 else (8, 0)
    if depth == 16 and color in (2, 4, 6):  # Pillow cuts these to 8 bits without a word
        import imagecodecs  # large, and of use for such files alone

        array = np.asarray(imagecodecs.png_decode(path.read_bytes()))
        return _without_plain_alpha(array) if color in (4, 6) else array
    picture = file_picture
    if picture.mode in ("P", "PA") and not palette_numbers:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    elif picture.mode == "PA":
        return np.asarray(picture)[..., 0]
    elif picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F") and not picture.mode.startswith("I;16"):
        picture = picture.convert("RGB")  # CMYK, YCbCr, Lab, ...
    array = np.asarray(picture)
    if palette_numbers and color == 0 and depth in (2, 4):  # Pillow stretches these grays to 0..255
        return array // np.uint8(255 // (2**depth - 1))
    return _without_plain_alpha(array) if picture.mode in ("LA", "RGBA") else array


def _orientation_of(picture: Image.Image, path: Path) -> int:
    """The orientation that the EXIF data of a picture state; 1 where there is none."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_ERRORS as error:
        log.warning("%s: its EXIF data are damaged (%s); rows and columns are read as they are stored", path, error)
        return 1


def _turned(array: Array, orientation: int) -> Array:
    """An image (y, x[, c]) turned and mirrored as an orientation 1 to 8 of EXIF states; others leave it as it is."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _open_picture(file: BinaryIO, head: bytes) -> Image.Image:
    """As `Image.open`, without its limit of pixels: that one is the whole process's, and scans of slides are larger."""
    Image.preinit()
    for kind in ("PNG", "JPEG", "BMP"):
        factory, accepts = Image.OPEN[kind]
        if accepts is not None and accepts(head) is True:
            return factory(file, "")
    return Image.open(file)


def _without_plain_alpha(array: Array) -> Array:
    """Without the last channel if it is the same everywhere; one channel that is left loses its axis."""
    if array.shape[-1] not in (2, 4) or (array[..., -1] != array[..., -1].flat[0]).any():
        return array
    array = array[..., :-1]
    return array[..., 0] if array.shape[-1] == 1 else array


def single_plane(pixels: Pixels, path: Path) -> Pixels:
    """The pixels unchanged, if they are one plane "y x [c]" and no stack.

    Raises
    ------
    ImageError
        If they are a stack.
    """
    if pixels.stack:
        raise ImageError(
            f"{path}: is a stack of {len(pixels.array)} planes where one plane is wanted; save one plane as a file, "
            "or give the stack together with a stack of labels"
        )
    return pixels


def check_plane(z: int, depth: int, source: str) -> None:
    """Check that plane ``z``, from 0, is one of the ``depth`` planes of a stack.

    Raises
    ------
    SettingsError
        If it is not; the message names ``source``.
    """
    if not 0 <= z < depth:
        raise SettingsError(f"plane {z} is outside {source}, whose planes are 0 to {depth - 1}; choose others")
