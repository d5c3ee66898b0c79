"""Scores of predicted labels over many images: IoU, Dice and the F1 of boundaries."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from distillfss_core.metrics import Tally
from distillfss_core.types import IGNORE, Array

TOLERANCE = 0.0075
"""Largest distance of a right boundary pixel, as a share of the diagonal of the image (`boundary_f1`)."""


@dataclass(frozen=True)
class Accuracy:
    """Means over the classes, 0..1; NaN where no class occurs.

    Parameters
    ----------
    pooled, dice : float
        IoU and Dice of all test pixels counted together (the published measure).
    mean, boundary : float
        Mean over images of the IoU and of the boundary F1.
    images : int
    by_class : tuple of float
        Pooled IoU of classes 1..K.
    """

    pooled: float
    mean: float
    dice: float
    boundary: float
    images: int
    by_class: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        """Fields by name, as JSON stores them."""
        return asdict(self)


class Judge:
    """Collect labels and truths, and compute their scores.

    Parameters
    ----------
    classes : int
        K, without background.
    side : int or None
        Labels and truth are first brought to this size, y and x, by nearest neighbor.
    """

    def __init__(self, classes: int, side: int | None = None) -> None:
        self.classes: int = classes
        self.side: int | None = side
        self._tally = Tally(classes)
        self._boundaries: list[list[float]] = []

    def add(self, labels: Array, truth: Array) -> None:
        """Add labels uint8 "y x" and their truth."""
        labels, truth = at_side(labels, self.side), at_side(truth, self.side)
        self._tally.add(labels, truth)
        seen = truth != IGNORE
        self._boundaries.append([boundary_f1(labels == k, truth == k, seen) for k in range(1, self.classes + 1)])

    def accuracy(self) -> Accuracy:
        """Scores over all images added so far, rounded to four decimals."""
        scores = self._tally.scores()
        by_class = [_mean(column) for column in zip(*self._boundaries, strict=True)]
        return Accuracy(
            _mean(scores.pooled.iou),
            _mean(scores.mean.iou),
            _mean(scores.pooled.dice),
            _mean(by_class),
            scores.images,
            tuple(round(float(v), 4) for v in scores.pooled.iou),
        )


def boundary_f1(labels: Array, truth: Array, seen: Array | None = None) -> float:
    """F1 of the boundaries of two masks [1]_ (section 3).

    A boundary is what of a mask touches a pixel outside (4 neighbors; the border of the image does not count). A pixel
    of one is right if the other comes within `TOLERANCE` of the diagonal; precision and recall are shares of right
    pixels.

    Parameters
    ----------
    labels, truth : bool arrays, shape (y, x)
    seen : bool array, optional
        Boundary pixels outside of it do not count.

    Returns
    -------
    float
        0..1; NaN if neither mask has a pixel, 0 if one has none, 1 if both fill the image (no boundaries).

    References
    ----------
    .. [1] Csurka, Larlus, Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013.

    Examples
    --------
    >>> mask = np.zeros((100, 100), bool)
    >>> mask[20:60, 20:60] = True
    >>> boundary_f1(mask, mask)
    1.0
    """
    if not labels.any() or not truth.any():
        return math.nan if not labels.any() and not truth.any() else 0.0
    f, t = _boundary(labels), _boundary(truth)
    if seen is not None:
        f, t = f & seen, t & seen
    if not f.any() or not t.any():
        return 1.0 if not f.any() and not t.any() else 0.0
    reach = TOLERANCE * math.hypot(*truth.shape)
    precision, recall = _near(f, t, reach), _near(t, f, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: Array) -> Array:
    from scipy.ndimage import binary_erosion

    return np.asarray(mask & ~binary_erosion(mask, border_value=1))


def _near(these: Array, those: Array, reach: float) -> float:
    """Share of the pixels of one mask that are within ``reach`` of the other."""
    from scipy.ndimage import distance_transform_edt

    return float((distance_transform_edt(~those)[these] <= reach).mean())


def at_side(labels: Array, side: int | None) -> Array:
    """Labels at ``side`` x ``side`` by nearest neighbor; None leaves them."""
    if side is None:
        return labels
    return np.asarray(Image.fromarray(labels).resize((side, side), Image.Resampling.NEAREST))


def _mean(values: object) -> float:
    array: Array = np.asarray(values, float)
    finite = array[~np.isnan(array)]
    return round(float(finite.mean()), 4) if finite.size else math.nan
