"""Scores of a segmentation: IoU, Dice, precision and recall of each class, pooled and averaged over images.

A class that is neither predicted nor true has no score (NaN) and is not counted in any mean. A class that is one but
not the other scores 0 in all four measures, so that a missed or an invented object costs something.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import ImageError
from distillfss_core.types import IGNORE, MAX_CLASSES, Array

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measures:
    """Four measures, each a float64 array of shape (k,) for classes 1..K; NaN where a class never occurred."""

    iou: Floats
    dice: Floats
    precision: Floats
    recall: Floats


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of classes 1..K (the background is not scored).

    Parameters
    ----------
    pooled : Measures
        Of all pixels of all images put together.
    mean : Measures
        Mean over the images in which the class occurs, in truth or prediction.
    images : int
        Images compared.
    counted : int64 array, shape (k,)
        Images that each class's mean is over.
    matrix : int64 array, shape (k + 1, k + 1)
        Pixels; rows true class, columns predicted class, 0 background.
    """

    pooled: Measures
    mean: Measures
    images: int
    counted: Counts
    matrix: Counts

    @property
    def iou(self) -> float:
        """Mean of the pooled IoU over the classes that occur; NaN if none does."""
        return _mean(self.pooled.iou)

    @property
    def dice(self) -> float:
        """Mean of the pooled Dice over the classes that occur; NaN if none does."""
        return _mean(self.pooled.dice)

    def table(self, class_names: Sequence[str] = ()) -> str:
        """Plain text, two lines a class (pooled, mean over images), fit for a terminal."""
        names = [class_names[k] if k < len(class_names) else f"class {k + 1}" for k in range(len(self.counted))]
        width = max([len("class"), *map(len, names)])
        lines = [f"{'class':{width}}  {'over':12}  {'IoU':>6}  {'Dice':>6}  {'prec.':>6}  {'recall':>6}"]
        for k, name in enumerate(names):
            for over, m in (("all pixels", self.pooled), (f"{self.counted[k]} images", self.mean)):
                values = "  ".join(_cell(float(v[k])) for v in (m.iou, m.dice, m.precision, m.recall))
                lines.append(f"{name:{width}}  {over:12}  {values}")
        return "\n".join(lines)


class Tally:
    """Collect one confusion matrix for each image, and compute the `Scores` from them.

    Parameters
    ----------
    n_classes : int, optional
        K; by default the largest class met.
    ignore : int, optional
        True label of pixels to leave out; None leaves out none.
    """

    def __init__(self, n_classes: int | None = None, ignore: int | None = IGNORE) -> None:
        self.n_classes = n_classes
        self.ignore = ignore
        self._matrices: list[Counts] = []

    def add(self, predicted: Array, truth: Array) -> None:
        """Add one image; errors are those of `confusion`."""
        n_classes = self.n_classes
        if n_classes is None:
            n_classes = max(1, _largest(predicted, None), _largest(truth, self.ignore))
            if n_classes > MAX_CLASSES:
                raise ImageError(
                    f"holds the label {n_classes}, classes are 1 to {MAX_CLASSES}; if labels count objects, "
                    "turn them into classes first (mode 'binary')"
                )
        self.add_counts(confusion(predicted, truth, n_classes, self.ignore))

    def add_counts(self, matrix: Counts) -> None:
        """Add one image that `confusion` has counted, or the sum over its parts."""
        self._matrices.append(matrix)

    def scores(self) -> Scores:
        """Scores of all images added so far; ImageError if there is none."""
        if not self._matrices:
            raise ImageError("there is nothing to compare; give at least one prediction and its truth")
        size = max(len(m) for m in self._matrices)
        each = np.stack([np.pad(m, (0, size - len(m))) for m in self._matrices])
        matrix = each.sum(0)
        single = [_measures(m) for m in each]
        by_image = [np.stack([getattr(m, name) for m in single]) for name in ("iou", "dice", "precision", "recall")]
        counted = (~np.isnan(by_image[0])).sum(0).astype(np.int64)
        means = [np.where(counted > 0, np.nansum(v, 0) / np.maximum(counted, 1), np.nan) for v in by_image]
        return Scores(_measures(matrix), Measures(*means), len(each), counted, matrix)


def evaluate(pairs: Iterable[tuple[Array, Array]], n_classes: int | None = None, ignore: int | None = IGNORE) -> Scores:
    """Compare predictions with truths.

    Parameters
    ----------
    pairs : iterable of (predicted, truth)
        Integer arrays of one shape (any number of axes): 0 background, 1..K classes. Read one at a time.
    n_classes : int, optional
        K; by default the largest class met.
    ignore : int, optional
        True label of pixels to leave out; None leaves out none.

    Raises
    ------
    ImageError
        If there is no pair, shapes differ, or a label is no class.

    Examples
    --------
    >>> predicted, truth = np.array([[1, 1, 0]]), np.array([[1, 0, 0]])
    >>> evaluate([(predicted, truth)]).pooled.iou
    array([0.5])
    """
    tally = Tally(n_classes, ignore)
    for predicted, truth in pairs:
        tally.add(predicted, truth)
    return tally.scores()


def confusion(predicted: Array, truth: Array, n_classes: int, ignore: int | None = IGNORE) -> Counts:
    """Count pixels by true (rows) and predicted (columns) class.

    Parameters
    ----------
    predicted, truth : integer or bool arrays of one shape
        0 background, 1..K classes; ``ignore`` may stand in the truth.
    n_classes : int
        K, the background not counted.
    ignore : int, optional
        True label of pixels to leave out; None leaves out none.

    Returns
    -------
    int64 array, shape (k + 1, k + 1)

    Raises
    ------
    ImageError
        If shapes differ or a label is no class.
    """
    if predicted.shape != truth.shape:
        raise ImageError(f"the prediction has shape {predicted.shape}, its truth {truth.shape}; compare equal sizes")
    for name, array in (("prediction", predicted), ("truth", truth)):
        if array.dtype.kind not in "bui":
            raise ImageError(f"the {name} has dtype {array.dtype}; give integer labels")
    seen = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    size = n_classes + 1
    p, t = predicted[seen].astype(np.int64), truth[seen].astype(np.int64)
    for name, values in (("prediction", p), ("truth", t)):
        if values.size and not (values.min() >= 0 and values.max() <= n_classes):
            bad = values.min() if values.min() < 0 else values.max()
            raise ImageError(f"the {name} holds the label {bad}, classes are 0 to {n_classes}; give class labels")
    return np.bincount(t * size + p, minlength=size * size).reshape(size, size).astype(np.int64)


def _measures(matrix: Counts) -> Measures:
    true_pos = np.diag(matrix)[1:].astype(np.float64)
    predicted = matrix.sum(0)[1:].astype(np.float64)
    actual = matrix.sum(1)[1:].astype(np.float64)
    occurs = predicted + actual > 0

    def ratio(part: Floats, whole: Floats) -> Floats:
        return np.where(occurs, part / np.maximum(whole, 1), np.nan)

    return Measures(
        iou=ratio(true_pos, predicted + actual - true_pos),
        dice=ratio(2 * true_pos, predicted + actual),
        precision=ratio(true_pos, predicted),
        recall=ratio(true_pos, actual),
    )


def _largest(array: Array, ignore: int | None) -> int:
    kept = array if ignore is None else array[array != ignore]
    return int(kept.max()) if kept.size else 0


def _mean(values: Floats) -> float:
    return float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else float("nan")


def _cell(value: float) -> str:
    return f"{'-':>6}" if np.isnan(value) else f"{value:6.3f}"
