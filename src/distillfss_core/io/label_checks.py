"""Label files whose numbers are not those that were painted: lossy compression, smoothed edges, color tables."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import tifffile

from distillfss_core.errors import ImageError
from distillfss_core.io.images import DECODER_ERRORS, TIFF_SUFFIXES
from distillfss_core.types import Array

log: logging.Logger = logging.getLogger(__name__)

THICK = 3  # of the four neighbors, as many have the value of a pixel that is no part of an edge
_LOSSY_TIFF = (6, 7, 33007, 34892)  # JPEG in its forms
_REMEDY = "save it as PNG or TIFF from where it was painted"


def check_lossless(path: Path) -> None:
    """Refuse labels that were compressed as JPEG, which changes numbers around every edge.

    Raises
    ------
    ImageError
    """
    if is_lossy(path):
        raise ImageError(
            f"{path}: is compressed as JPEG, which changes the numbers of labels; {_REMEDY}, or, if it was black and "
            "white, give --binary-threshold 128"
        )


def is_lossy(path: Path) -> bool:
    """Whether a file, or one in a folder, holds pixels compressed as JPEG, whatever its name."""
    if path.is_dir():
        return any(is_lossy(file) for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    try:
        with open(path, "rb") as file:
            if file.read(3) == b"\xff\xd8\xff":
                return True
        if path.suffix.lower() not in TIFF_SUFFIXES:
            return False
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            return int(page.compression) in _LOSSY_TIFF and page.bitspersample == 8
    except DECODER_ERRORS:
        return False  # the reader has the error for it


def warn_of_values(labels: Array, source: str, mode: str) -> None:
    """Log what values of labels look like, if they are unlikely to be what was painted.

    Parameters
    ----------
    labels : integer array, shape (y, x) or (z, y, x)
    source : str
        Name of the file.
    mode : {"binary", "classes", "scribbles"}
        As for `labels_from_image`.
    """
    if labels.dtype != np.uint8 or not labels.size:
        return
    counts = np.bincount(labels.reshape(-1), minlength=256)
    values = np.flatnonzero(counts)
    values = values[values > 0]
    is_numbered = values.size < 64 and np.array_equal(values, np.arange(1, values.size + 1))
    if len(values) < 2 or (is_numbered and counts[0]):
        return
    shown = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
    if _has_soft_edges(labels, counts):
        log.warning(
            "%s: holds %d values (%s), most of them in thin edges, which look like compression or anti-aliasing; every "
            "value but 0 counts as a label; %s, or give --binary-threshold 128",
            source,
            len(values),
            shown,
            _REMEDY,
        )
    elif mode == "binary" and len(values) <= 12 and values[0] >= 20 and np.diff(values).min() >= 10:
        log.warning(
            "%s: holds the values %s, which look like the grays of a color table; all count as one class; if they are "
            "classes, number them 1, 2, ... and give --classes",
            source,
            shown,
        )
    elif mode == "binary" and not counts[0]:
        log.warning(
            "%s: holds the values %s but no 0, so that all pixels count as object; if 1 is background, subtract 1 from "
            "all",
            source,
            shown,
        )


def _has_soft_edges(labels: Array, counts: Array) -> bool:
    """Whether values beside 0 and the most frequent label lie in edges, where painted ones fill areas."""
    largest = int(counts[1:].argmax()) + 1
    between = (labels != 0) & (labels != largest)
    number, labeled = int(between.sum()), int(counts[1:].sum())
    if number < max(16, 0.01 * labeled) or (counts[1:] > 0).sum() < 4:
        return False
    equal = np.zeros(labels.shape, np.uint8)
    for axis in (-2, -1):
        same = np.diff(labels, axis=axis) == 0
        first, second = ([(0, 0)] * labels.ndim for _ in range(2))
        first[axis], second[axis] = (1, 0), (0, 1)
        equal += np.pad(same, first)
        equal += np.pad(same, second)
    thick = float((equal[between] >= THICK).mean())
    return thick < 0.3 and (int(counts[largest]) > 0.3 * labeled or thick < 0.1)
