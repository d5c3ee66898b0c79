"""Labels that are volumes of any size: paired with images or with the truth, and read in pieces."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from distillfss_core.errors import ImageError, InputFileError, SettingsError, SupportSetError
from distillfss_core.io.images import PILLOW_SUFFIXES, TIFF_SUFFIXES, Pixels, check_plane
from distillfss_core.io.label_checks import check_lossless
from distillfss_core.io.labels import image_stem, labels_from_image, pair_files, read_label_stack, whole_numbers
from distillfss_core.labelstore.layout import Box, Part, box_within
from distillfss_core.labelstore.store import check_finished
from distillfss_core.metrics import Counts, confusion
from distillfss_core.types import AnnotatedSlice, Array
from distillfss_core.volumes.opening import is_one_volume, is_volume, stem_of
from distillfss_core.volumes.remote import address_of
from distillfss_core.volumes.volume import Volume, count_choices, open_volume

log: logging.Logger = logging.getLogger(__name__)

_PIECE = 1 << 24
"""Voxels that are read at a time."""

_LARGE = 1 << 30
"""Bytes of a TIFF file from which it is read in pieces."""

_MEMORY = 0.5
"""Share of the machine's memory that slices may take."""


def pair_volumes(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """The image, or the prediction, of every file or volume of labels.

    Parameters
    ----------
    images, labels : path
        Two files or volumes (a zarr and a DICOM series are folders, but one volume), a folder of planes and one volume
        of labels, or two folders of files or volumes, paired by stem as `pair_files` does.

    Returns
    -------
    list of (image path, label path), sorted by name

    Raises
    ------
    InputFileError
        As `pair_files` does.
    """
    single = [is_one_volume(path) for path in (images, labels)]
    if all(single):
        return [(images, labels)]
    if any(single) and all(p.is_dir() or p.suffix.lower() not in PILLOW_SUFFIXES for p in (images, labels)):
        return [(images, labels)]  # a folder of planes beside one volume
    return pair_files(images, labels, _stem)


def are_images(*paths: Path) -> bool:
    """Whether all are image files that fit into memory, so that `distillfss_core.io` reads them."""
    return all(image_stem(path) is not None and path.stat().st_size < _LARGE for path in paths)


def check_no_threshold(path: Path, binary_threshold: float | None) -> None:
    """Masks of gray values are image files; volumes of labels hold numbers.

    Raises
    ------
    SettingsError
    """
    if binary_threshold is not None:
        raise SettingsError(f"{path}: is read as a volume, for which there is no binary threshold; give image files")


def _stem(path: Path) -> str | None:
    """The stem of an image file or volume in a folder; None of anything else."""
    if path.name.startswith(".") or not (is_one_volume(path) and is_volume(path)):
        return None
    return stem_of(path)


def load_volume_slices(
    image_path: Path,
    label_path: Path,
    *,
    planes: Sequence[int] | None,
    mode: str,
    n_classes: int,
    region: Part | None = None,
    opening: Mapping[str, Any],
) -> tuple[list[AnnotatedSlice], bool]:
    """Annotated planes of a volume, and whether it has several planes.

    Parameters
    ----------
    image_path, label_path : path
    planes : sequence of int, optional
        By default all that have any label; with labels of one plane, the one plane they belong to.
    mode, n_classes
        As for `labels_from_image`.
    region : part of the volume, optional
        Its planes are taken, cut to its rows and columns.
    opening : mapping
        Options of `open_volume`, for the image.

    Raises
    ------
    InputFileError, ImageError, SettingsError
        As `open_volume` does, if sizes differ, or if the slices take more than half of the machine's memory.
    SupportSetError
        If no plane has a label.
    """
    with ExitStack() as stack:
        image = stack.enter_context(open_volume(image_path, **opening))
        same_time = {name: value for name, value in opening.items() if name == "time"}
        labels = stack.enter_context(_open_labels(label_path, image, same_time))
        box = box_within(image.shape[:3], region, image.name)
        check_finished(labels.path, labels.name, labels.levels[0], None if labels.level else box)
        _check_planes(planes, image, box, image_path.name)
        of_one_plane = labels.shape[0] == 1 < image.shape[0]
        if of_one_plane and (planes is None or len(planes) != 1):
            raise SettingsError(
                f"{label_path.name} is one plane, {image_path.name} a stack of {image.shape[0]}; "
                "say with planes which one it belongs to"
            )
        if planes is None:
            planes = _labeled_planes(labels, box)
            if not planes:
                raise SupportSetError(f"{label_path.name}: no plane has a label; paint at least one")
        rows, columns = slice(*box[1]), slice(*box[2])
        _check_memory(image, len(set(planes)), box)
        slices = []
        for z in dict.fromkeys(planes):
            source = f"{label_path.name} plane {z}"
            index = 0 if of_one_plane else z
            numbers = _numbers(labels.read(slice(index, index + 1), rows, columns)[0], source)
            classes = labels_from_image(numbers, mode, n_classes, source)
            pixels = image.read(slice(z, z + 1), rows, columns)[0]
            slices.append(AnnotatedSlice(pixels, classes, f"{image_path.name} plane {z}"))
        return slices, image.shape[0] > 1


def compare_volumes(
    predicted_path: Path,
    true_path: Path,
    *,
    planes: Sequence[int] | None,
    modes: tuple[str, str],
    n_classes: int,
    region: Part | None = None,
    opening: Mapping[str, Any],
) -> Iterator[tuple[str, Counts]]:
    """Count voxels by true and predicted class, for each plane of two volumes of labels; they are read in pieces.

    Parameters
    ----------
    predicted_path, true_path : path
    planes : sequence of int, optional
        By default all.
    modes : (str, str)
        Of prediction and truth, as for `labels_from_image`.
    n_classes : int
    region : part of the volumes, optional
    opening : mapping
        Options of `open_volume`, for both as far as they have a choice.

    Yields
    ------
    (name of the plane, int64 array of shape (k + 1, k + 1))
        As `confusion` gives it.

    Raises
    ------
    InputFileError, ImageError, SettingsError
        As `open_volume` and `labels_from_image` do, or if sizes differ.
    """
    with ExitStack() as stack:
        predicted = stack.enter_context(_open_labels(predicted_path, None, opening))
        truth = stack.enter_context(_open_labels(true_path, predicted, opening))
        if predicted.shape[0] != truth.shape[0]:
            raise ImageError(
                f"{predicted_path.name} has {predicted.shape[0]} plane(s), {true_path.name} has {truth.shape[0]}; "
                "compare stacks of equal depth"
            )
        box = box_within(predicted.shape[:3], region, predicted.name)
        for volume in (predicted, truth):
            check_finished(volume.path, volume.name, volume.levels[0], None if volume.level else box)
        _check_planes(planes, predicted, box, predicted_path.name)
        chosen = sorted(set(planes)) if planes else range(*box[0])
        for zs, pieces in _pieces((predicted, truth), chosen, box):
            counts = [np.zeros((n_classes + 1, n_classes + 1), np.int64) for _ in zs]
            for rows, columns in pieces:
                span = slice(zs[0], zs[-1] + 1)
                blocks = [volume.read(span, rows, columns) for volume in (predicted, truth)]
                for k, z in enumerate(zs):
                    parts = []
                    for path, block, mode in zip((predicted_path, true_path), blocks, modes, strict=True):
                        source = _plane_name(path, z, predicted.shape[0])
                        numbers = _numbers(block[z - zs[0]], source)
                        parts.append(labels_from_image(numbers, mode, n_classes, source))
                    counts[k] += confusion(parts[0], parts[1], n_classes)
            for z, matrix in zip(zs, counts, strict=True):
                yield _plane_name(predicted_path, z, predicted.shape[0]), matrix


def _check_planes(planes: Sequence[int] | None, volume: Volume, box: Box, name: str) -> None:
    """Check that planes are those of a volume, and of a region of it.

    Raises
    ------
    SettingsError
    """
    for z in planes or ():
        check_plane(z, volume.shape[0], name)
        if not box[0][0] <= z < box[0][1]:
            raise SettingsError(
                f"plane {z} is outside the region of {name}, whose planes are {box[0][0]} to {box[0][1] - 1}; "
                "choose others, or another region"
            )


def _plane_name(path: Path, z: int, depth: int) -> str:
    return f"{path.name} plane {z}" if depth > 1 else path.name


def _open_labels(path: Path, like: Volume | None, opening: Mapping[str, Any]) -> Volume:
    """A volume of labels, if given of the size of another: of a pyramid the level that fits."""
    if address_of(path) is None and not path.exists():
        raise InputFileError(f"{path}: no such file or folder; check the name")
    _check_is_labels(path)
    if address_of(path) is None:
        check_lossless(path)
    if are_images(path) and (path.suffix.lower() not in TIFF_SUFFIXES or not opening):
        volume = open_volume(read_label_stack(path))
    else:
        choices = count_choices(path, axes=opening.get("axes"), series=opening.get("series"))
        letters = {"time": "t", "channel": "c"}
        options = {name: value for name, value in opening.items() if letters.get(name, "") in ("", *choices)}
        if "c" in choices and "channel" not in options:
            raise ImageError(
                f"{path}: has {choices['c']} channels, but labels are one number a voxel; save one channel on its own"
            )
        if like is not None:
            options.pop("level", None)
        volume = open_volume(path, **options)
        levels = [] if like is None else [n for n, shape in enumerate(volume.levels) if shape == like.shape[:3]]
        if levels and levels[0] != volume.level:
            volume.close()
            volume = open_volume(path, **{**options, "level": levels[0]})
    if like is not None and (volume.shape[1:3] != like.shape[1:3] or volume.shape[0] not in (1, like.shape[0])):
        volume.close()
        raise ImageError(_size_message(path, volume, like))
    if like is not None and volume.directions and like.directions and volume.directions != like.directions:
        log.warning(
            "%s: its axes z, y, x point to %s, those of %s to %s, and neither is turned; check that they lie on each "
            "other, or save both with one orientation",
            path,
            ", ".join(volume.directions),
            like.name,
            ", ".join(like.directions),
        )
    return volume


def _size_message(path: Path, volume: Volume, like: Volume) -> str:
    sizes = [" x ".join(map(str, v.shape[:3])) for v in (volume, like)]
    levels = [n for n, shape in enumerate(like.levels) if shape == volume.shape[:3]]
    advice = f"choose level {levels[0]}" if levels else "give volumes of the same size"
    return f"{path} has {sizes[0]} voxels (z y x), {like.name} has {sizes[1]}; {advice}"


def _check_is_labels(path: Path) -> None:
    """An OME-Zarr image that holds labels is not the labels."""
    inside = path / "labels"
    names = sorted(f.name for f in inside.iterdir() if f.is_dir()) if inside.is_dir() and is_one_volume(path) else []
    if names:
        raise InputFileError(f"{path}: is an image that holds labels ({', '.join(names)}); give {inside / names[0]}")


def _numbers(plane: Array, source: str) -> Array:
    return whole_numbers(Pixels(plane, stack=False, channels=plane.ndim == 3), source)


def _labeled_planes(labels: Volume, box: Box) -> list[int]:
    """Planes with any label within a box."""
    labeled = []
    for zs, pieces in _pieces((labels,), range(*box[0]), box):
        has_label = np.zeros(len(zs), bool)
        for rows, columns in pieces:
            block = labels.read(slice(zs[0], zs[-1] + 1), rows, columns)
            has_label |= [bool(plane.any()) for plane in block]
        labeled += [z for z, labeled_here in zip(zs, has_label, strict=True) if labeled_here]
    return labeled


def _pieces(
    volumes: Sequence[Volume], planes: Sequence[int], box: Box
) -> Iterator[tuple[list[int], list[tuple[slice, slice]]]]:
    """Groups of planes that lie in the same chunks, and the parts (rows, columns) in which each group is read."""
    height = max(volume.chunks[1] for volume in volumes)
    width = box[2][1] - box[2][0]
    depth = min(max(volume.chunks[0] for volume in volumes), max(1, _PIECE // (height * width)))
    rows = max(1, _PIECE // (depth * height * width)) * height
    first, end = box[1]
    starts = range(first - first % height, end, rows)
    parts = [(slice(max(first, y), min(y + rows, end)), slice(*box[2])) for y in starts]
    for _, group in groupby(planes, key=lambda z: z // depth):
        yield list(group), parts


def _check_memory(image: Volume, planes: int, box: Box) -> None:
    """Slices are held in memory while a model learns from them.

    Raises
    ------
    SettingsError
    """
    voxels = planes * math.prod(end - start for start, end in box[1:])
    needed = voxels * (image.dtype.itemsize * math.prod(image.shape[3:]) + 1)
    limit = memory_limit()
    if needed > limit:
        raise SettingsError(
            f"{image.name}: {planes} planes with labels take {needed / 1e9:.1f} GB, more than the {limit / 1e9:.1f} GB "
            "that slices may take on this machine; choose some with planes, or a region"
        )


def memory_limit() -> float:
    """Bytes that slices may take: half of the machine's memory, or 8 GB where that is not known."""
    try:
        return _MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8e9
