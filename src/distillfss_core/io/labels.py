"""Label files as classes, and the pairs of images and labels in folders."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import ImageError, InputFileError, SettingsError, SupportSetError
from distillfss_core.io.images import (
    KINDS_READ,
    READABLE,
    PathLike,
    Pixels,
    check_plane,
    is_pickled,
    read_pixels,
    single_plane,
)
from distillfss_core.io.label_checks import check_lossless, warn_of_values
from distillfss_core.types import IGNORE, MAX_CLASSES, AnnotatedSlice, Array

log: logging.Logger = logging.getLogger(__name__)

LABEL_MODES = ("binary", "classes", "scribbles")

LABEL_ENDINGS = (
    *("masks", "mask", "labels", "label", "seg", "segmentation", "gt"),
    *("cp_masks", "simple segmentation", "object identities", "object predictions"),  # of Cellpose and ilastik
)
"""What a label file's stem may end in after "_" or "-", beyond the stem of its image."""


def read_labels(path: PathLike, *, binary_threshold: float | None = None) -> Array:
    """Read one plane of labels; a palette image gives the palette's numbers.

    Parameters
    ----------
    path : path
    binary_threshold : float, optional
        The file is a mask of gray values, also a JPEG: 1 from this value on, else 0.

    Returns
    -------
    integer array, shape (y, x)
        bool becomes uint8, floats that are whole numbers become uint32, gray RGB becomes its one channel.

    Raises
    ------
    InputFileError
        If the file is missing, of an unknown kind or damaged.
    ImageError
        If it is a stack, a color picture, a JPEG, or holds fractions or negative numbers.
    """
    path = Path(path)
    pixels = read_pixels(path, palette_numbers=binary_threshold is None)
    return _numbers_of(single_plane(pixels, path), path, binary_threshold)


def read_label_stack(path: PathLike, *, binary_threshold: float | None = None, own_planes: bool = False) -> Array:
    """Read the labels of a stack, shape (z, y, x); one plane is a stack of one. As `read_labels` otherwise.

    ``own_planes``: as for `read_stack`.
    """
    path = Path(path)
    pixels = read_pixels(path, palette_numbers=binary_threshold is None, npy_stack=True, own_planes=own_planes)
    labels = _numbers_of(pixels, path, binary_threshold)
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

    Examples
    --------
    >>> labels_from_image(np.array([[0, 7], [255, 0]], np.uint8))
    array([[0, 1],
           [1, 0]], dtype=uint8)
    >>> labels_from_image(np.array([[0, 1], [2, 0]], np.uint8), "scribbles")
    array([[255,   0],
           [  1, 255]], dtype=uint8)
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
    limit = MAX_CLASSES if n_classes is None else n_classes
    largest = int(array.max()) if array.size else 0
    if largest > limit + shift:
        raise ImageError(
            f"{source}: holds the label {largest}, but there are {limit} classes, so at most {limit + shift} in mode "
            f"{mode!r}; name more classes, or use mode 'binary' if the numbers count objects or mean 'on'"
        )
    if mode == "classes":
        return array.astype(np.uint8)
    return np.where(array == 0, IGNORE, array.astype(np.int64) - 1).astype(np.uint8)


def image_stem(path: Path) -> str | None:
    """The stem of a readable image file ("a.ome.tif" has the stem "a"); None for hidden files and anything else."""
    if path.suffix.lower() not in READABLE or path.name.startswith(".") or not path.is_file():
        return None
    return path.stem.removesuffix(".ome")


def check_threshold(mode: str, binary_threshold: float | None) -> None:
    """A threshold makes one class; classes and scribbles are numbers.

    Raises
    ------
    SettingsError
    """
    if binary_threshold is not None and mode != "binary":
        raise SettingsError(
            f"the binary threshold {binary_threshold:g} makes one class of a mask, so it does not go with {mode}"
        )


def pair_files(
    images: PathLike, labels: PathLike, stem_of: Callable[[Path], str | None] = image_stem
) -> list[tuple[Path, Path]]:
    """Find the image of every label file.

    Parameters
    ----------
    images, labels : path
        Two files, or two folders. In folders files belong together by stem; the label's may end in ``_mask``,
        ``_masks``, ``_label``, ``_labels``, ``_seg``, ``_segmentation``, ``_gt``, ``_cp_masks`` (Cellpose) or
        ``_Simple Segmentation`` (ilastik). Images without labels are left out; a line in the log says how many.
    stem_of : function
        The stem of an entry of a folder, or None if the entry has no part in it.

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
    by_stem = _by_stem(images, stem_of)
    if images.samefile(labels):  # one folder for both: what has a label's ending is a label
        wanted = [(f, s) for s, f in by_stem.items() if _without_ending(s) in by_stem and _without_ending(s) != s]
    else:
        wanted = [(f, s) for s, f in _by_stem(labels, stem_of).items()]
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
    pairs = _without_pickled_duplicates(pairs)
    twice = [image.name for image, n in Counter(image for image, _ in pairs).items() if n > 1]
    if twice:
        raise InputFileError(f"{labels}: {twice[0]} has more than one label file; keep one")
    unlabeled = len(by_stem) - len(pairs) - (len(wanted) if images.samefile(labels) else 0)
    if unlabeled:
        log.warning("%d of %d images in %s have no label file; left out", unlabeled, unlabeled + len(pairs), images)
    return sorted(pairs)


def _without_pickled_duplicates(pairs: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """The pairs without the _seg.npy of Cellpose, which is not read, where an image has another label file too."""
    counts = Counter(image for image, _ in pairs)
    dropped = [(image, file) for image, file in pairs if counts[image] > 1 and is_pickled(file)]
    if dropped:
        log.warning("%d pickled label file(s) beside others are left out: %s", len(dropped), dropped[0][1].name)
    return [pair for pair in pairs if pair not in dropped]


def load_pair(
    image_path: Path,
    label_path: Path,
    planes: Sequence[int] | None,
    mode: str,
    n_classes: int | None,
    binary_threshold: float | None = None,
    *,
    in_folder: bool = False,
) -> tuple[list[AnnotatedSlice], bool]:
    """Annotated slices of one image file and its labels, and whether it is a stack.

    Parameters
    ----------
    image_path, label_path : path
    planes : sequence of int, optional
        Planes of a stack, counted from 0; by default all that have any label. With a label file of one plane, the
        one plane it belongs to.
    mode, n_classes
        As for `labels_from_image`.
    binary_threshold : float, optional
        As for `read_labels`.
    in_folder : bool
        A file of an OME-TIFF of several files stands for its own planes.

    Raises
    ------
    InputFileError, ImageError
        As `read_image`, `read_labels` and `labels_from_image` do, or if sizes differ.
    SettingsError
        If a plane is outside the stack, or planes are given and there is no stack.
    SupportSetError
        If a stack has no labeled plane.
    """
    labels_in = read_pixels(label_path, palette_numbers=binary_threshold is None, own_planes=in_folder)
    # A .npy file does not say what its axes are; the labels beside it do.
    is_npy_stack = labels_in.array.ndim == 3 and image_path.suffix.lower() == ".npy"
    image_in = read_pixels(image_path, npy_stack=is_npy_stack, own_planes=in_folder)
    if not image_in.stack:
        if planes is not None:
            raise SettingsError(f"planes are given, but {image_path.name} is a single plane; leave them out")
        numbers = _numbers_of(single_plane(labels_in, label_path), label_path, binary_threshold)
        warn_of_values(numbers, label_path.name, mode)
        classes = labels_from_image(numbers, mode, n_classes, label_path.name)
        return [AnnotatedSlice(image_in.array, classes, image_path.name)], False
    stack = image_in.array
    if label_path.suffix.lower() == ".npy" and labels_in.array.ndim == 3:
        labels_in = Pixels(labels_in.array, stack=True, channels=False)
    numbers = _numbers_of(labels_in, label_path, binary_threshold)
    warn_of_values(numbers, label_path.name, mode)
    if not labels_in.stack:
        if planes is None or len(planes) != 1:
            raise SettingsError(
                f"{label_path.name} is one plane, {image_path.name} a stack of {len(stack)}; "
                "say with planes which one it belongs to"
            )
        check_plane(planes[0], len(stack), image_path.name)
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
        check_plane(z, len(stack), image_path.name)
        classes = labels_from_image(numbers[z], mode, n_classes, f"{label_path.name} plane {z}")
        slices.append(AnnotatedSlice(stack[z], classes, f"{image_path.name} plane {z}"))
    return slices, True


def _numbers_of(pixels: Pixels, path: Path, binary_threshold: float | None) -> Array:
    """Labels of a file as integers without a channel axis: 0 and 1 by a threshold, or whole numbers as they are."""
    if binary_threshold is None:
        check_lossless(path)
        return whole_numbers(pixels, path.name)
    gray = pixels.array[..., :3].mean(-1) if pixels.channels else pixels.array
    if 0 < gray.max() < binary_threshold:
        raise ImageError(
            f"{path}: no pixel reaches the binary threshold {binary_threshold:g}, the largest is {gray.max():g}; "
            "give a smaller one, or none where labels are numbers"
        )
    is_object: Array = gray >= binary_threshold
    return is_object.astype(np.uint8)


def whole_numbers(pixels: Pixels, source: str) -> Array:
    """Labels as integers without a channel axis."""
    array = pixels.array
    if pixels.channels:
        if (array[..., 1:] != array[..., :1]).any():
            raise ImageError(
                f"{source}: is a color picture ({array.shape[-1]} differing channels); save labels with one number a "
                "pixel, as gray or palette image"
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


def _by_stem(folder: Path, stem_of: Callable[[Path], str | None]) -> dict[str, Path]:
    """Entries of a folder by stem."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        stem = stem_of(file)
        if stem is None:
            continue
        if stem in files:
            raise InputFileError(f"{folder}: {files[stem].name} and {file.name} have the same stem; keep one of them")
        files[stem] = file
    return files


def _without_ending(stem: str) -> str:
    lower = stem.lower()
    for ending in sorted(LABEL_ENDINGS, key=len, reverse=True):
        if lower.endswith((f"_{ending}", f"-{ending}")) and len(stem) > len(ending) + 1:
            return stem[: -len(ending) - 1]
    return stem
