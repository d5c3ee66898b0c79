"""Intensities that a student learned from, and those of an input: robust limits, and linear maps between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from distillfss_core.types import Array

F64 = npt.NDArray[np.float64]

PERCENTILES = (0.5, 99.5)
ARTIFACTS = 0.035
"""Share of the pixels that dust, a scale bar or saturation may take at either end without an effect on the limits."""

PROBABILITIES = (0.0, 0.005, 0.01, 0.02, 0.035, *(n / 40 for n in range(2, 39)), 0.965, 0.98, 0.99, 0.995, 1.0)
"""Of the quantiles on a card."""

CHECKED = 1 << 17  # pixels at most that are compared with a card
_FIT = slice(3, -3)  # quantiles from 0.02 to 0.98
_RARE = 0.0025  # a smaller share of pixels does not reach the percentiles
_NEAR = 0.25  # difference of two limits, in parts of their range, up to which volumes of one kind differ
_NEAR_PLANE = 0.45  # the same for planes of one volume
_TOLERANCE = 0.03  # of a quantile that a linear map explains, in parts of the range
_EXPLAINED = 0.75  # share of the quantiles that a linear map explains, where the ranges differ
_SURELY = 0.85  # the same, where one range lies within the other
_SAME_GAIN = 0.03  # difference from 1 up to which two scales differ by an offset alone
_SHIFT = 0.035  # of all gray values, in parts of the range; planes of one volume differ by up to 0.033
_STEPS = 8  # gray values between the limits at least
_CONSTANT = 1e-200  # quantiles that span no more are one value
_SWAPPED = 6  # channels at most whose order is compared


@dataclass(frozen=True)
class Intensities:
    """Intensities of a support set, as its card keeps them.

    Parameters
    ----------
    dtype : str
        Of the images, without their byte order.
    quantiles : rows of numbers, one a channel
        At `PROBABILITIES`, without artifacts.
    absolute : bool
        Whether they are Hounsfield units, which no map may change.
    """

    dtype: str
    quantiles: tuple[tuple[float, ...], ...]
    absolute: bool

    def to_json(self) -> dict[str, Any]:
        """Values for the card of a student; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Intensities:
        """Intensities from the values of a card.

        Raises
        ------
        ValueError, KeyError, TypeError
            If the values are damaged.
        """
        rows = tuple(tuple(float(v) for v in row) for row in values["quantiles"])
        if any(len(row) != len(PROBABILITIES) for row in rows):
            raise ValueError(f"a row of quantiles has {len(PROBABILITIES)} numbers")
        return cls(str(values["dtype"]), rows, bool(values["absolute"]))

    def mapped(self, gain: Sequence[float], offset: Sequence[float], dtype: np.dtype[Any]) -> Intensities:
        """Of an input of which each channel is a linear map of the support's."""
        rows = np.array(self.quantiles) * np.array(gain)[:, None] + np.array(offset)[:, None]
        return replace(self, dtype=dtype.newbyteorder("=").name, quantiles=_as_rows(rows))

    def pooled(self) -> tuple[float, ...]:
        """Quantiles of all channels together: from the darkest to the brightest."""
        rows = np.array(self.quantiles)
        return tuple(np.where(np.array(PROBABILITIES) < 0.5, rows.min(0), rows.max(0)).tolist())

    @property
    def range_text(self) -> str:
        """Type and range in words."""
        low, high = (_quantile(np.array(self.quantiles), p) for p in (0.005, 0.995))
        return f"{self.dtype}, {low.min():.4g} to {high.max():.4g}"


@dataclass(frozen=True)
class Match:
    """How the limits of a support set become those of an input, channel by channel, and a warning.

    ``gain`` and ``offset`` are None where the percentiles of the input take the place of the limits.
    """

    gain: tuple[float, ...] | None
    offset: tuple[float, ...] | None
    warning: str = ""

    @property
    def is_identity(self) -> bool:
        """Whether the limits of the support set are those of the input."""
        return self.gain is not None and set(self.gain) == {1.0} and set(self.offset or ()) == {0.0}


def intensities_of(samples: Array, dtype: np.dtype[Any]) -> Intensities:
    """What a card keeps of pixels "n c" without artifacts."""
    values = samples.astype(np.float64)
    rows = np.quantile(values, PROBABILITIES, axis=0).T
    return Intensities(dtype.newbyteorder("=").name, _as_rows(rows), _are_hounsfield(values))


def kept_range(
    values: Array, support: Sequence[float] | None, objects: npt.NDArray[np.bool_] | None
) -> tuple[float, float]:
    """The lowest and the highest value that is no artifact.

    An artifact takes at most `ARTIFACTS` of the pixels and lies apart from all others: pixels of one value (saturation,
    a scale bar), pixels far beyond what the support showed (dust), or far beyond the others where labels are given.

    Parameters
    ----------
    values : array, shape (n,)
    support : sequence of float, optional
        Quantiles of the support at `PROBABILITIES`.
    objects : bool array, shape (n,), optional
        Pixels that are annotated as objects, which are no artifact.

    Returns
    -------
    (float, float)
        Infinite where no pixel is left out.
    """
    values, objects = _thinned(values).astype(np.float64), None if objects is None else _thinned(objects)
    mirrored = None if support is None else [-v for v in support][::-1]
    return -_ceiling(-values, mirrored, objects), _ceiling(values, support, objects)


def match_intensities(
    support: Intensities, sample: Array, *, scope: str, together: bool, is_plane: bool, source: str
) -> Match:
    """Compare the intensities of an input with those of the support.

    Parameters
    ----------
    support : Intensities
    sample : array, shape (n, c)
        Pixels of the input, of its own dtype.
    scope : {"image", "volume"}
        As for `Preprocess`: with "image" only the warning counts.
    together : bool
        One map for all channels.
    is_plane : bool
        Whether the input is a single plane, which may differ more from the support than a volume does.
    source : str
        Name of the input for the warning.

    Returns
    -------
    Match
    """
    names = (support.range_text, sample.dtype.newbyteorder("=").name)
    values = _thinned(sample).astype(np.float64)
    learned = np.array(support.quantiles)
    if scope == "volume":
        match = _match(support, values, sample.dtype, together, is_plane)
        is_explained = match.warning == "" or not (match.gain is None or match.is_identity)
        recorded = values if is_explained else _without_fill(values)
        if len(recorded) < len(values):
            match = _match(support, recorded, sample.dtype, together, is_plane)
    else:
        match = _match_contrast(learned, _quantiles(values, support))
    match = match if match.warning else replace(match, warning=_other_order(learned, _quantiles(values, support)))
    if not match.warning:
        return match
    low, high = np.percentile(values, PERCENTILES)
    text = match.warning.format(learned=names[0], own=f"{names[1]}, {low:.4g} to {high:.4g}")
    return replace(match, warning=f"{source}: {text}")


_STRETCHED = (
    "its intensities ({own}) are not on the scale that the student learned ({learned}), so its own range was stretched "
    "to it; check the labels, give the image on its original scale, or distill with slices of this kind"
)
_HOUNSFIELD = (
    "its intensities ({own}) are no Hounsfield units like those that the student learned ({learned}), which are kept; "
    "apply the rescale slope and intercept (often value - 1024), or distill with slices of this kind"
)
_COARSE = (
    "its intensities ({own}) take few of the steps that the student learned ({learned}), so its labels are coarse; "
    "record with more light, or save with more bits"
)
_INVERTED = (
    "its contrast seems to be inverted: its intensities ({own}) mirror those that the student learned ({learned}); "
    "invert the image, or distill with slices of this kind"
)
_ORDER = (
    "its channels seem to be in another order ({order}) than those that the student learned ({learned}; here {own}); "
    "give them in the order of the support"
)


def _match(support: Intensities, values: F64, dtype: np.dtype[Any], together: bool, is_plane: bool) -> Match:
    """`match_intensities` of a volume; the warning has places for both ranges."""
    near = _NEAR_PLANE if is_plane else _NEAR
    learned = np.array(support.quantiles)
    own = _quantiles(values, support)
    channels = len(learned)
    identity = Match((1.0,) * channels, (0.0,) * channels)
    if not np.ptp(own):
        return identity
    groups = [slice(0, channels)] if together else [slice(c, c + 1) for c in range(channels)]
    step = 0.0 if dtype.kind == "f" else 1.0
    gains, offsets = np.ones(channels), np.zeros(channels)
    warning, is_stretched = "", False
    for group in groups:
        reference, present = learned[group].ravel(), own[group].ravel()
        fits = _is_compatible(learned[group], own[group], np.dtype(support.dtype), dtype)
        gain, offset, explained = _linear_map(learned[group][:, _FIT], own[group][:, _FIT], step)
        mirrored = _mirrored(learned[group][:, _FIT], own[group][:, _FIT], step)
        low, high = _quantile(learned[group], 0.005).min(), _quantile(learned[group], 0.995).max()
        moved = max(abs(gain * v + offset - v) for v in (low, high)) / max(high - low, 1e-300)
        if mirrored >= _EXPLAINED and mirrored > explained + 0.1:
            warning = warning or _INVERTED
            is_stretched |= not fits
        elif support.absolute:
            is_scaled = explained >= _SURELY and not 0.5 < gain < 2
            warning = warning or ("" if fits and not is_scaled else _HOUNSFIELD)
        elif gain > 0 and explained >= (_SURELY if fits else _EXPLAINED) and (moved > near or not fits):
            gains[group], offsets[group] = gain, offset
            warning = warning or (_COARSE if gain * (high - low) < _STEPS * step else "")
        elif fits and not is_plane and abs(gain - 1) <= _SAME_GAIN:
            shift = _shift(learned[group][:, _FIT], own[group][:, _FIT], step)
            offsets[group] = shift if abs(shift) >= _SHIFT * (high - low) else 0.0
        elif not fits and np.ptp(reference) and np.ptp(present):
            warning, is_stretched = warning or _STRETCHED, True
    if is_stretched and not support.absolute:
        return Match(None, None, warning)
    return Match(tuple(gains.tolist()), tuple(offsets.tolist()), warning)


def _match_contrast(learned: F64, own: F64) -> Match:
    """Of single images, which have limits of their own, only the contrast is compared."""
    channels = len(learned)
    mirrored = []
    for reference, present in zip(learned, own, strict=True):
        _, _, direct = _linear_map(reference[None, _FIT], present[None, _FIT], 0.0)
        inverse = _mirrored(reference[None, _FIT], present[None, _FIT], 0.0)
        is_opposite = _skewness(reference) * _skewness(present) < 0
        mirrored.append(is_opposite and inverse >= _EXPLAINED and inverse > direct + _NEAR)
    return Match((1.0,) * channels, (0.0,) * channels, _INVERTED if all(mirrored) else "")


def _is_compatible(learned: F64, own: F64, learned_dtype: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    """Whether intensities may be those of another part of what the support shows: an empty plane, say."""
    reference, present = learned.ravel(), own.ravel()
    low, high = _quantile(learned, 0.005).min(), _quantile(learned, 0.995).max()
    span = high - low
    is_narrower = dtype.kind != "f" and dtype.itemsize < learned_dtype.itemsize
    is_unit = dtype.kind == "f" and present.max() <= 1 < reference.max() and present.min() >= 0
    if (is_narrower or is_unit) and np.ptp(own[:, _FIT]) < span / 4:
        return False
    inside = _quantile(own, 0.25).min() >= _quantile(learned, 0.01).min() - 0.01 * span
    inside &= _quantile(own, 0.75).max() <= _quantile(learned, 0.99).max() + 0.01 * span
    inside &= _quantile(own, 0.1).min() >= low - span / 2
    return bool(inside and _quantile(own, 0.9).max() <= high + span / 2)


def _linear_map(reference: F64, present: F64, step: float) -> tuple[float, float, float]:
    """Gain and offset from quantiles to quantiles by least absolute deviations, and the share that they explain.

    Iteratively reweighted least squares (Schlossmacher, JASA 68, 1973). Quantiles between a dark and a bright part of
    the histogram depend on how much there is of either, so they are the outliers here. One value explains nothing.
    """
    x, y = reference.ravel(), present.ravel()
    if np.ptp(y) <= _CONSTANT:
        return 0.0, float(y[0]), 0.0
    floor = 1e-3 * float(np.ptp(y))
    weights = np.ones_like(x)
    gain = offset = 0.0
    for _ in range(60):
        total = weights.sum()
        middle = (weights * x).sum() / total, (weights * y).sum() / total
        spread = (weights * (x - middle[0]) ** 2).sum()
        gain = float((weights * (x - middle[0]) * (y - middle[1])).sum() / spread) if spread > 0 else 0.0
        offset = float(middle[1] - gain * middle[0])
        weights = 1 / np.maximum(np.abs(y - gain * x - offset), floor)
    tolerance = _TOLERANCE * min(float(np.ptp(y)), abs(gain) * float(np.ptp(x))) + step / 2
    return gain, offset, float((np.abs(y - gain * x - offset) <= tolerance).mean())


def _shift(reference: F64, present: F64, step: float) -> float:
    """The offset that nearly all quantiles have in common, to a quarter of it; 0 where they have none."""
    offsets = (present - reference).ravel()
    middle = float(np.median(offsets))
    shares_it = np.abs(offsets - middle) <= max(step, abs(middle) / 4)
    return middle if shares_it.mean() >= _SURELY else 0.0


def _mirrored(reference: F64, present: F64, step: float) -> float:
    """The share of the quantiles that a map with dark and bright exchanged explains."""
    gain, _, explained = _linear_map(reference[:, ::-1], present, step)
    return explained if -gain * np.ptp(reference) > np.ptp(present) / 2 else 0.0


def _other_order(learned: F64, own: F64) -> str:
    """A warning where the channels of an input are those of the support in another order, else nothing."""
    channels = len(learned)
    if not 2 <= channels <= _SWAPPED:
        return ""
    spans = np.maximum(np.ptp(learned[:, _FIT], axis=1), 1e-300)
    apart = np.abs(learned[:, None, _FIT] - own[None, :, _FIT]).mean(-1) / spans[:, None]
    costs = {order: float(sum(apart[c, k] for c, k in enumerate(order))) for order in permutations(range(channels))}
    plain = tuple(range(channels))
    best = min(costs, key=lambda order: costs[order])
    if costs[plain] < 0.4 * channels or costs[best] > costs[plain] / 4:
        return ""
    return _ORDER.replace("{order}", ", ".join(map(str, best)))


def _ceiling(values: F64, support: Sequence[float] | None, objects: npt.NDArray[np.bool_] | None) -> float:
    """The highest value that is no artifact."""
    core_low, core = np.percentile(values, (100 * ARTIFACTS, 100 * (1 - ARTIFACTS)))
    top, spread = float(values.max()), float(core - core_low)
    tail = np.sort(values[values > core])
    kept = np.inf
    if spread <= 0 or not len(tail):
        return kept
    for limit in _candidates(tail, top, spread, float(core_low), support, is_labeled=objects is not None):
        beyond = values > limit
        share = beyond.mean()
        is_object = objects is not None and objects[beyond].mean() > 0.5
        if _RARE <= share <= ARTIFACTS and not is_object:
            kept = min(kept, limit)
    return kept


def _candidates(
    tail: F64, top: float, spread: float, core_low: float, support: Sequence[float] | None, *, is_labeled: bool
) -> list[float]:
    """Values above which artifacts may lie; ``tail`` are the highest pixels, ascending."""
    below = tail[tail < top]
    lowest, highest = (-np.inf, np.inf) if support is None else (support[1], support[-2])
    span = highest - lowest
    is_learned = support is not None and top <= highest + span / 10
    limits = []
    if len(below) and top - below[-1] > 0.1 * spread and not is_learned:
        limits.append(float(below[-1]))  # many pixels of one value
    if support is not None and lowest - span / 4 <= core_low and core_low + spread <= highest + span / 4:
        limits.append(float(highest + span / 4))
    if is_labeled and len(tail) > 1:
        widest = int(np.diff(tail).argmax())
        if tail[widest + 1] - tail[widest] > 2 * (tail[widest] - core_low):
            limits.append(float(tail[widest]))
    return limits


def _are_hounsfield(values: F64) -> bool:
    """Whether pixels are X-ray densities of Hounsfield's scale: air near -1000 beside tissue near 0, no less but one
    value of padding. Tomograms of electrons, also signed, have one broad peak: their bimodality (Sarle) is 1/3."""
    low = float(values.min())
    if values.shape[1] != 1 or not -3100 <= low <= -300 or values.max() > 32767:
        return False
    inside = values[(values >= -1100) & (values < 2000)]
    padding = np.unique(values[values < -1100])
    if len(padding) > 1 or (inside < -300).mean() < 0.02 or inside.std() < 1:
        return False
    z = (inside - inside.mean()) / inside.std()
    return bool(((z**3).mean() ** 2 + 1) / (z**4).mean() > 0.42)


def _quantiles(values: F64, support: Intensities) -> F64:
    """Of pixels "n c", shape (c, p), without artifacts."""
    rows = []
    for c, learned in enumerate(support.quantiles):
        low, high = kept_range(values[:, c], learned, None)
        kept = values[(values[:, c] >= low) & (values[:, c] <= high), c]
        rows.append(np.quantile(kept, PROBABILITIES))
    return np.array(rows)


def _without_fill(values: F64) -> F64:
    """Without pixels that all have the lowest, or the highest, value: the surroundings of what was recorded."""
    for extreme in (values.min(), values.max()):
        is_fill = (values == extreme).all(axis=1)
        if ARTIFACTS < is_fill.mean() < 0.95:
            values = values[~is_fill]
    return values


def _thinned(sample: Array) -> Array:
    return sample[:: -(-len(sample) // CHECKED)]


def _skewness(quantiles: F64) -> float:
    """Where the middle lies between dark and bright: positive where bright pixels are the fewer."""
    low, middle, high = quantiles[3], quantiles[len(quantiles) // 2], quantiles[-4]
    return float((high - middle) - (middle - low))


def _quantile(quantiles: F64, probability: float) -> F64:
    """The quantile of each row at a probability."""
    column: F64 = quantiles[:, PROBABILITIES.index(probability)]
    return column


def _as_rows(values: F64) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in values)
