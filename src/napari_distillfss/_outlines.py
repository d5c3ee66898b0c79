"""Strokes over an object or a box around it, and the outline that is proposed for it; no Qt."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

import distillfss_core as core
from napari_distillfss._annotations import BACKGROUND, FIRST_CLASS, UNLABELED

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]
Box = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Draft:
    """An object that is being outlined.

    Parameters
    ----------
    plane : int
    label : int
        As painted: 1 background, 2.. classes.
    inside, outside : tuple of arrays (n, 2)
        Strokes over the object, and over what is not of it: points y x in pixels of the plane.
    box : ((y0, y1), (x0, x1)), optional
        Drawn around the object.
    """

    plane: int
    label: int
    inside: tuple[Points, ...] = ()
    outside: tuple[Points, ...] = ()
    box: Box | None = None

    def with_stroke(self, stroke: Points, *, take_away: bool) -> Draft:
        """The draft with one stroke more."""
        if take_away:
            return replace(self, outside=(*self.outside, stroke))
        return replace(self, inside=(*self.inside, stroke))


@dataclass(frozen=True, eq=False)
class Outlined:
    """A draft and the outline that is proposed for it."""

    draft: Draft
    proposal: core.Proposal

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column of the first pixel of `mask` in the plane."""
        (y0, _), (x0, _) = self.proposal.box
        return y0, x0

    @property
    def mask(self) -> Mask:
        """The mask within its box."""
        rows, columns = (slice(*span) for span in self.proposal.box)
        return self.proposal.mask[rows, columns]


class PlaneCache:
    """The plane of a volume that was read last."""

    def __init__(self) -> None:
        self._key: tuple[Any, int] | None = None
        self._image: Any = None

    def read(self, volume: Any, z: int) -> Any:
        """A plane, shape (y, x) or (y, x, c)."""
        if self._key is None or self._key[0] is not volume or self._key[1] != z:
            self._image = volume.plane(z)
            self._key = (volume, z)
        return self._image


def taken_by_others(painted: npt.NDArray[np.uint8], *, preserve: bool) -> Mask:
    """Pixels that no new object may take: those of objects, or all labeled ones if labels are preserved.

    Parameters
    ----------
    painted : uint8 array, shape (y, x)
        As painted: 0 not labeled, 1 background, 2.. classes.
    preserve : bool
        napari's setting of the layer (*preserve labels*).
    """
    return np.asarray(painted != UNLABELED if preserve else painted >= FIRST_CLASS)


def probability_of(label: int, probabilities: Any) -> npt.NDArray[np.float32] | None:
    """Probability of a painted label, shape (y, x), 0 to 1; None if there is none.

    Parameters
    ----------
    label : int
        As painted: 1 background, 2.. classes.
    probabilities : float array, shape (k + 1, y, x), or None
        Background first.
    """
    channel = label - BACKGROUND
    if probabilities is None or not 0 <= channel < len(probabilities):
        return None
    return np.asarray(np.clip(probabilities[channel], 0, 1), np.float32)  # a sum of exponentials may be rounded up


def iter_outline(
    image: Callable[[], Any],
    draft: Draft,
    painted: Callable[[], npt.NDArray[np.uint8]],
    evidence: Any,
    stop: Event,
    *,
    preserve: bool,
) -> Generator[Outlined, None, None]:
    """Propose the outline of a draft.

    Parameters
    ----------
    image, painted : functions
        Return the plane and its labels as painted.
    draft : Draft
    evidence : float array, shape (y, x), or None
        Probability of the class.
    preserve : bool
        Whether labels of background are kept too.

    Raises
    ------
    core.DistillFSSError
        If none can be proposed.
    """
    plane = image()
    if stop.is_set():
        return
    taken = taken_by_others(painted(), preserve=preserve)
    proposal = core.propose_object(
        plane, draft.inside, outside=draft.outside, taken=taken, evidence=evidence, box=draft.box
    )
    yield Outlined(draft, proposal)


def within(points: Sequence[Sequence[float]], shape: tuple[int, int]) -> Points:
    """The points y x of a stroke that lie in a plane, without repetitions; shape (n, 2), n may be 0."""
    stroke = np.asarray(points, np.float64).reshape(-1, 2)
    pixels = np.rint(stroke)
    is_in = (pixels >= 0).all(1) & (pixels < shape).all(1)
    stroke, pixels = stroke[is_in], pixels[is_in]
    is_new = np.r_[True, (np.diff(pixels, axis=0) != 0).any(1)][: len(pixels)]
    return np.asarray(stroke[is_new])


def box_between(first: Sequence[float], last: Sequence[float], shape: tuple[int, int]) -> Box:
    """The pixels of a plane between two corners y x, with those under them; they may lie outside of the plane."""
    spans = []
    for a, b, n in zip(first, last, shape, strict=True):
        low, high = (min(max(round(v), 0), n - 1) for v in sorted((a, b)))
        spans.append((low, high + 1))
    return spans[0], spans[1]


def pixels_to_paint(outlined: Outlined, painted: npt.NDArray[np.uint8], *, preserve: bool) -> tuple[Any, Any]:
    """Rows and columns that take the label of an accepted outline. Labels that are preserved are left out."""
    mask = outlined.mask
    if preserve:
        y, x = outlined.corner
        mask = mask & (painted[y : y + mask.shape[0], x : x + mask.shape[1]] == UNLABELED)
    rows, columns = np.nonzero(mask)
    return rows + outlined.corner[0], columns + outlined.corner[1]
