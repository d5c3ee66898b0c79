"""Files of images and labels to arrays and back: everything doubtful is found here, at the door.

Read: TIFF (tifffile), PNG, JPEG and BMP (Pillow), .npy. Written: TIFF and PNG, whole or not at all.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import shutil
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from distillfss_core.errors import ImageError, InputFileError, OutputError, SettingsError, SupportSetError
from distillfss_core.types import IGNORE, MAX_CLASSES, Array, LabelledSlice

log = logging.getLogger(__name__)

TIFF_SUFFIXES = (".tif", ".tiff")
PILLOW_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
READABLE = (*TIFF_SUFFIXES, *PILLOW_SUFFIXES, ".npy")
KINDS_READ = "TIFF, PNG, JPEG, BMP or .npy"

LABEL_MODES = ("binary", "classes", "scribbles")

LABEL_ENDINGS = ("masks", "mask", "labels", "label", "seg", "segmentation", "gt")
"""What a label file's stem may end in after "_" or "-", beyond the stem of its image."""

_MOST_PIXELS = 1 << 31
"""Of a PNG, JPEG or BMP, which is decoded whole: a small file can claim any size."""

PathLike = str | os.PathLike[str]

# What decoders raise on files that are cut short or damaged.
DECODER_FAULTS = (
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


@dataclass(frozen=True, eq=False)
class _Pixels:
    """What a file holds: (y x), (y x c), (z y x) or (z y x c), and which of them."""

    array: Array
    stack: bool
    channels: bool


def read_image(path: PathLike) -> Array:
    """Read one plane.

    Palettes become RGB; an alpha channel that is the same everywhere is dropped, any other is kept as a channel.

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
    pixels = _read(Path(path))
    return _single_plane(pixels, Path(path)).array


def read_stack(path: PathLike) -> Array:
    """Read a stack of planes; one plane is a stack of one. Errors are those of `read_image`.

    Returns
    -------
    array, shape (z, y, x) or (z, y, x, c)
    """
    pixels = _read(Path(path), npy_stack=True)
    return pixels.array if pixels.stack else pixels.array[None]


def read_labels(path: PathLike) -> Array:
    """Read one plane of labels; a palette image gives the palette's numbers.

    Returns
    -------
    integer array, shape (y, x)
        bool becomes uint8, floats that are whole numbers become uint32, grey RGB becomes its one channel.

    Raises
    ------
    InputFileError
        If the file is missing, of an unknown kind or damaged.
    ImageError
        If it is a stack, a colour picture, or holds fractions or negative numbers.
    """
    path = Path(path)
    return _whole_numbers(_single_plane(_read(path, palette_numbers=True), path), path.name)


def read_label_stack(path: PathLike) -> Array:
    """Read the labels of a stack, shape (z, y, x); one plane is a stack of one. As `read_labels` otherwise."""
    path = Path(path)
    pixels = _read(path, palette_numbers=True, npy_stack=True)
    labels = _whole_numbers(pixels, path.name)
    return labels if pixels.stack else labels[None]


def labels_from_image(
    array: Array, mode: str = "binary", n_classes: int | None = None, source: str = "labels"
) -> npt.NDArray[np.uint8]:
    """Turn the numbers of a label image into classes.

    Parameters
    ----------
    array : integer or bool array, shape (y, x)
    mode : str
        "binary": 0 is background, any other number (255, instance numbers) is class 1.
        "classes": numbers 0..K are taken as they are.
        "scribbles": 0 is not annotated, 1 is background, 2.. are classes 1.. .
    n_classes : int, optional
        K; by default as many as there are (up to 254). Not used by "binary".
    source : str
        Name for messages.

    Returns
    -------
    uint8 array, shape (y, x)
        0 background, 1..K classes, IGNORE (255) not annotated.

    Raises
    ------
    SettingsError
        If the mode is unknown.
    ImageError
        If a number stands for no class.
    """
    if mode not in LABEL_MODES:
        raise SettingsError(f"there is no label mode {mode!r}; choose one of: {', '.join(LABEL_MODES)}")
    if array.dtype.kind not in "bui":
        raise ImageError(f"{source}: labels have dtype {array.dtype}; give integers")
    if array.size and int(array.min()) < 0:
        raise ImageError(f"{source}: holds the label {int(array.min())}; labels start at 0")
    if mode == "binary":
        result: npt.NDArray[np.uint8] = (array != 0).astype(np.uint8)
        return result
    shift = 1 if mode == "scribbles" else 0
    known = MAX_CLASSES if n_classes is None else n_classes
    largest = int(array.max()) if array.size else 0
    if largest > known + shift:
        raise ImageError(
            f"{source}: holds the label {largest}, but there are {known} classes, so at most {known + shift} in mode "
            f"{mode!r}; name more classes, or use mode 'binary' if the numbers count objects or mean 'on'"
        )
    if mode == "classes":
        return array.astype(np.uint8)
    return np.where(array == 0, IGNORE, array.astype(np.int64) - 1).astype(np.uint8)


def pair_files(images: PathLike, labels: PathLike) -> list[tuple[Path, Path]]:
    """Find the image of every label file.

    Parameters
    ----------
    images, labels : path
        Two files, or two folders. In folders files belong together by stem; the label's may end in ``_mask``,
        ``_masks``, ``_label``, ``_labels``, ``_seg``, ``_segmentation`` or ``_gt``. Images without labels are left
        out; a line in the log says how many.

    Returns
    -------
    list of (image path, label path), sorted by name

    Raises
    ------
    InputFileError
        If something is missing, a label file has no image, or two images have one stem.
    """
    images, labels = Path(images), Path(labels)
    for path in (images, labels):
        if not path.exists():
            raise InputFileError(f"{path}: no such file or folder; check the name")
    if images.is_dir() != labels.is_dir():
        folder, file = (images, labels) if images.is_dir() else (labels, images)
        raise InputFileError(f"{folder} is a folder but {file} is a file; give two folders or two files")
    if images.is_file():
        return [(images, labels)]
    by_stem = _by_stem(images)
    if images.samefile(labels):  # one folder for both: what has a label's ending is a label
        wanted = [(f, s) for s, f in by_stem.items() if _without_ending(s) in by_stem and _without_ending(s) != s]
    else:
        wanted = [(f, s) for s, f in _by_stem(labels).items()]
    if not wanted:
        raise InputFileError(f"{labels}: no label image in this folder; put {KINDS_READ} files there")
    pairs = []
    lonely = []
    for file, stem in wanted:
        partner = None if images.samefile(labels) else by_stem.get(stem)
        partner = partner or by_stem.get(_without_ending(stem))
        if partner is None:
            lonely.append(file.name)
        else:
            pairs.append((partner, file))
    if lonely:
        names = ", ".join(lonely[:5]) + (", ..." if len(lonely) > 5 else "")
        raise InputFileError(
            f"{len(lonely)} of {len(wanted)} label files have no image of the same stem in {images}: {names}; "
            "name image and label alike (a label may end in _mask, _label or _seg)"
        )
    twice = [image.name for image, n in Counter(image for image, _ in pairs).items() if n > 1]
    if twice:
        raise InputFileError(f"{labels}: {twice[0]} has more than one label file; keep one")
    unlabelled = len(by_stem) - len(pairs) - (len(wanted) if images.samefile(labels) else 0)
    if unlabelled:
        log.warning("%d of %d images in %s have no label file; left out", unlabelled, unlabelled + len(pairs), images)
    return sorted(pairs)


def load_support_arrays(
    images: PathLike,
    labels: PathLike,
    planes: Sequence[int] | None = None,
    mode: str = "binary",
    n_classes: int | None = None,
) -> tuple[list[LabelledSlice], bool]:
    """Read annotated slices from folders, from one image and its labels, or from planes of a stack.

    Parameters
    ----------
    images, labels : path
        As for `pair_files`.
    planes : sequence of int, optional
        Planes of a stack, counted from 0; by default all that have any label. With a label file of one plane, the
        one plane it belongs to.
    mode, n_classes
        As for `labels_from_image`.

    Returns
    -------
    slices : list of LabelledSlice
    of_one_volume : bool
        Whether all are planes of one stack, so that one range of intensities serves them all.

    Raises
    ------
    InputFileError, ImageError
        As `pair_files`, `read_image`, `read_labels` and `labels_from_image` do, or if sizes differ.
    SettingsError
        If a plane is outside the stack, or planes are given and there is no stack.
    SupportSetError
        If a stack has no labelled plane.
    """
    pairs = pair_files(images, labels)
    if planes is not None and Path(images).is_dir():
        raise SettingsError(f"planes are given, but {images} is a folder; give one stack and its labels")
    slices: list[LabelledSlice] = []
    from_stack = False
    for image_path, label_path in pairs:
        found, from_stack = _slices_of_pair(image_path, label_path, planes, mode, n_classes)
        slices += found
    return slices, from_stack and len(pairs) == 1


def _slices_of_pair(
    image_path: Path, label_path: Path, planes: Sequence[int] | None, mode: str, n_classes: int | None
) -> tuple[list[LabelledSlice], bool]:
    """Slices of an image file, and whether it is a stack."""
    labels_in = _read(label_path, palette_numbers=True)
    # A .npy file does not say what its axes are; the labels beside it do.
    image_in = _read(image_path, npy_stack=labels_in.array.ndim == 3 and image_path.suffix.lower() == ".npy")
    if not image_in.stack:
        if planes is not None:
            raise SettingsError(f"planes are given, but {image_path.name} is a single plane; leave them out")
        numbers = _whole_numbers(_single_plane(labels_in, label_path), label_path.name)
        classes = labels_from_image(numbers, mode, n_classes, label_path.name)
        return [LabelledSlice(image_in.array, classes, image_path.name)], False
    stack = image_in.array
    if label_path.suffix.lower() == ".npy" and labels_in.array.ndim == 3:
        labels_in = _Pixels(labels_in.array, stack=True, channels=False)
    numbers = _whole_numbers(labels_in, label_path.name)
    if not labels_in.stack:
        if planes is None or len(planes) != 1:
            raise SettingsError(
                f"{label_path.name} is one plane, {image_path.name} a stack of {len(stack)}; "
                "say with planes which one it belongs to"
            )
        _check_plane(planes[0], len(stack), image_path.name)
        numbers = np.broadcast_to(numbers, (len(stack), *numbers.shape))
    if len(numbers) != len(stack):
        raise ImageError(
            f"{label_path.name} has {len(numbers)} planes, {image_path.name} has {len(stack)}; give a label stack of "
            "the same depth"
        )
    if planes is None:
        planes = [z for z in range(len(stack)) if numbers[z].any()]
        if not planes:
            raise SupportSetError(f"{label_path.name}: no plane has a label; paint at least one")
    slices = []
    for z in dict.fromkeys(planes):
        _check_plane(z, len(stack), image_path.name)
        classes = labels_from_image(numbers[z], mode, n_classes, f"{label_path.name} plane {z}")
        slices.append(LabelledSlice(stack[z], classes, f"{image_path.name} plane {z}"))
    return slices, True


def write_labels(path: PathLike, array: Array) -> None:
    """Write labels as TIFF (zlib) or PNG, by the path's suffix; whole or not at all.

    Parameters
    ----------
    path : path
        Ending in .tif, .tiff or (one plane only) .png.
    array : integer or bool array, shape (y, x) or (z, y, x)
        Written as uint8 if no label is larger than 255, else as uint16.

    Raises
    ------
    ImageError
        If the array is no label image, or holds a number outside 0..65535.
    OutputError
        If the suffix is another or the file cannot be written; an older file stays as it was.
    """
    path = Path(path)
    if array.ndim not in (2, 3) or array.dtype.kind not in "bui" or array.size == 0:
        raise ImageError(f"{path.name}: labels are integers y x or z y x, this is {array.dtype} {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{path.name}: holds the label {low if low < 0 else high}; labels must be within 0..65535")
    array = np.ascontiguousarray(array, np.uint8 if high <= 255 else np.uint16)
    suffix = path.suffix.lower()
    if suffix in TIFF_SUFFIXES:
        _write_tiff(path, array, "YX" if array.ndim == 2 else "ZYX")
    elif suffix == ".png" and array.ndim == 2:
        with atomic_path(path) as temporary:
            Image.fromarray(array).save(temporary, format="PNG")
    elif suffix == ".png":
        raise OutputError(f"{path.name}: a PNG holds one plane, these are {len(array)}; end the name in .tif")
    else:
        raise OutputError(f"{path.name}: cannot write {suffix or 'a file without suffix'!r}; end it in .tif or .png")


def write_float_tiff(path: PathLike, array: Array, axes: str | None = None) -> None:
    """Write probabilities or uncertainty as a float32 TIFF (zlib); whole or not at all.

    Parameters
    ----------
    path : path
        Ending in .tif or .tiff.
    array : floating array
        Any shape that ``axes`` names.
    axes : str, optional
        One letter a dimension; by default YX, CYX (probabilities of a plane) or ZCYX.

    Raises
    ------
    ImageError
        If the axes do not name the array's dimensions.
    OutputError
        If the suffix is another or the file cannot be written; an older file stays as it was.
    """
    path = Path(path)
    axes = axes or {2: "YX", 3: "CYX", 4: "ZCYX"}.get(array.ndim, "")
    if len(axes) != array.ndim or array.size == 0:
        raise ImageError(f"{path.name}: axes {axes!r} do not name the dimensions of an array of shape {array.shape}")
    if path.suffix.lower() not in TIFF_SUFFIXES:
        raise OutputError(f"{path.name}: floats are written as TIFF; end the name in .tif")
    _write_tiff(path, np.ascontiguousarray(array, np.float32), axes)


def write_stack(path: PathLike, array: Array) -> None:
    """Write a grey stack as TIFF (zlib) in its own type; whole or not at all.

    Parameters
    ----------
    path : path
        Ending in .tif or .tiff.
    array : integer or floating array, shape (z, y, x)

    Raises
    ------
    OutputError
        If the file cannot be written; an older file stays as it was.
    """
    _write_tiff(Path(path), np.ascontiguousarray(array), "ZYX")


def check_output(path: Path) -> None:
    """Find out now, not after hours, that a file could not be written.

    Raises
    ------
    OutputError
    """
    folder = _target(path).parent
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as fault:
        raise OutputError(f"cannot write {path}: {fault.strerror}; write elsewhere") from fault


def _target(path: Path) -> Path:
    """The file that a path stands for, through links; it can lie there."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {target.parent}; make it first")
    if target.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the name of a file")
    return target


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Write to the path this gives; at the end it takes the place of ``path``, whole or not at all.

    The temporary file lies in the same folder and has the same suffix. If anything is raised inside, it is removed
    and what was at ``path`` stays as it was.

    Raises
    ------
    OutputError
        In place of any OSError: no such folder, no permission, no space left, ...
    """
    named = Path(path)
    target = _target(named)
    temporary = target.with_name(f".{target.name[:60]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OutputError:
        raise
    except OSError as fault:
        raise OutputError(f"cannot write {named}: {fault_reason(fault)}") from fault
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def fault_reason(fault: OSError) -> str:
    """What went wrong and what to do, in a line."""
    advice = {
        errno.ENOSPC: "free some space or write elsewhere",
        errno.EDQUOT: "free some space or write elsewhere",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.EROFS: "choose a folder you may write to",
    }.get(fault.errno or 0, "nothing was changed")
    what = fault.strerror or " ".join(str(fault).split()) or type(fault).__name__
    return f"{what}; {advice}"


def _write_tiff(path: Path, array: Array, axes: str) -> None:
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            array,
            photometric="minisblack",
            planarconfig="separate" if axes.startswith("C") and len(array) > 1 else None,
            compression="zlib",
            metadata={"axes": axes},
            bigtiff=array.nbytes > 2**31,
        )


def _read(path: Path, palette_numbers: bool = False, npy_stack: bool = False) -> _Pixels:
    """Read any readable file; ``npy_stack``: the first of three axes of a .npy file is z."""
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputFileError(f"{path}: no such file; check the name")
    if path.is_dir():
        raise InputFileError(f"{path}: is a folder; give a file")
    if suffix not in READABLE:
        raise InputFileError(f"{path}: cannot read {suffix or 'a file without suffix'!r}; give {KINDS_READ}")
    try:
        if suffix in TIFF_SUFFIXES:
            return _read_tiff(path)
        if suffix == ".npy":
            return _read_npy(path, npy_stack)
        return _plane(_read_pillow(path, palette_numbers))
    except (ImageError, InputFileError):
        raise
    except MemoryError as fault:
        raise InputFileError(f"{path}: does not fit into memory; cut it into smaller files") from fault
    except DECODER_FAULTS as fault:
        why = " ".join(str(fault).split())[:160] or type(fault).__name__
        raise InputFileError(f"{path}: cannot be read ({why}); check that the file is whole") from fault


def _plane(array: Array) -> _Pixels:
    return _Pixels(array, stack=False, channels=array.ndim == 3)


def _read_tiff(path: Path) -> _Pixels:
    with tifffile.TiffFile(path) as file:
        if len(file.series) != 1:
            sizes = ", ".join("x".join(map(str, s.shape)) for s in list(file.series)[:4])
            raise ImageError(f"{path}: holds {len(file.series)} images ({sizes}); save the one you want on its own")
        series = file.series[0]
        axes = series.axes.upper()
        alpha = bool(getattr(series.keyframe, "extrasamples", ()))
        array = series.asarray()
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
    return _Pixels(array, stack=bool(depth), channels=array.ndim == 3 + bool(depth))


def _read_npy(path: Path, stack: bool) -> _Pixels:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise ImageError(f"{path}: holds an array of shape {np.shape(array)}; give y x, y x c, z y x or z y x c")
    if array.ndim == 4:
        return _Pixels(array, stack=True, channels=True)
    if array.ndim == 3 and (stack or array.shape[2] > 16):  # nobody has that many channels: z y x
        return _Pixels(array, stack=True, channels=False)
    return _plane(array)


def _read_pillow(path: Path, palette_numbers: bool) -> Array:
    with open(path, "rb") as file:
        head = file.read(26)
    # Pillow cuts 16-bit colour PNGs to 8 bits without a word.
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] == 16 and head[25] in (2, 4, 6):
        import imagecodecs  # large, and of use for such files alone

        array = np.asarray(imagecodecs.png_decode(path.read_bytes()))
        return _without_plain_alpha(array) if head[25] in (4, 6) else array
    with open(path, "rb") as file, _open_picture(file, head) as file_picture:
        if math.prod(file_picture.size) > _MOST_PIXELS:
            width, height = file_picture.size
            raise InputFileError(
                f"{path}: has {width} x {height} pixels, a {path.suffix[1:].upper()} may have at most {_MOST_PIXELS}; "
                "save it as TIFF"
            )
        picture: Image.Image = file_picture
        if picture.mode in ("P", "PA") and not palette_numbers:
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        elif picture.mode == "PA":
            return np.asarray(picture)[..., 0]
        elif picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F") and not picture.mode.startswith("I;16"):
            picture = picture.convert("RGB")  # CMYK, YCbCr, Lab, ...
        array = np.asarray(picture)
        return _without_plain_alpha(array) if picture.mode in ("LA", "RGBA") else array


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


def _single_plane(pixels: _Pixels, path: Path) -> _Pixels:
    if pixels.stack:
        raise ImageError(
            f"{path}: is a stack of {len(pixels.array)} planes where one plane is wanted; save one plane as a file, "
            "or give the stack together with a stack of labels"
        )
    return pixels


def _whole_numbers(pixels: _Pixels, source: str) -> Array:
    """Labels as integers without a channel axis."""
    array = pixels.array
    if pixels.channels:
        if (array[..., 1:] != array[..., :1]).any():
            raise ImageError(
                f"{source}: is a colour picture ({array.shape[-1]} differing channels); save labels with one number a "
                "pixel, as grey or palette image"
            )
        array = array[..., 0]
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array) | (array != np.rint(array))
        if bad.any():
            raise ImageError(f"{source}: holds {float(array[bad][0]):g}, labels are whole numbers; save integers")
        if array.min() < 0:
            raise ImageError(f"{source}: holds the label {float(array.min()):g}; labels start at 0")
        if array.max() >= 2**32:
            raise ImageError(f"{source}: holds the label {float(array.max()):g}; labels end at {2**32 - 1}")
        return array.astype(np.uint32)
    if array.dtype.kind not in "ui":
        raise ImageError(f"{source}: holds {array.dtype} values; labels are whole numbers")
    if array.dtype.kind == "i" and array.min() < 0:
        raise ImageError(f"{source}: holds the label {int(array.min())}; labels start at 0")
    return array


def _check_plane(z: int, depth: int, source: str) -> None:
    if not 0 <= z < depth:
        raise SettingsError(f"plane {z} is outside {source}, whose planes are 0 to {depth - 1}; choose others")


def _by_stem(folder: Path) -> dict[str, Path]:
    """Readable files of a folder by stem ("a.ome.tif" has the stem "a"); hidden files are passed over."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in READABLE or file.name.startswith(".") or not file.is_file():
            continue
        stem = file.stem.removesuffix(".ome")
        if stem in files:
            raise InputFileError(f"{folder}: {files[stem].name} and {file.name} have the same stem; keep one of them")
        files[stem] = file
    return files


def _without_ending(stem: str) -> str:
    for mark in "_-":
        head, found, tail = stem.rpartition(mark)
        if found and head and tail.lower() in LABEL_ENDINGS:
            return head
    return stem
