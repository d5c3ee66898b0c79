"""The outline of an object around a click or a stroke, or in a box, as a proposal to a person who annotates.

::

    strokes --> rays --> closed contours of several sizes --> the best, less neighbors --> watershed along it --> mask

Only a window around the strokes is read. All sizes are relative to it, so an image may be shifted, and its intensities
may be mapped linearly or inverted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import ImageError, SettingsError
from distillfss_core.types import Array, check_image

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Box = tuple[tuple[int, int], tuple[int, int]]

EVIDENCE_WEIGHT = 0.3
_RAYS, _STEPS = 64, 64
_SMALLEST, _LARGEST = 2.5, 48.0  # radius of the objects that a click finds, in pixels
_SIZES = 14
_BAND = 1.7  # how many times smaller or larger than its size a contour may be
_BAND_OF_STROKE = 1.4
_ASPECTS = (1.0, 1.4, 2.0, 2.8)  # length of an object along a stroke over its width
_BEYOND = 1.05  # half the length of an object over that of the stroke
_SHORTEST = 4.0  # pixels; shorter strokes are clicks
_SMALLEST_BOX = 3  # pixels a side
_AROUND_BOX = 0.3  # of its sides are looked at beyond them
_ASPECTS_OF_DIAGONALS = (2.0, 4.0)
_BOX_SIZES = np.array([0.6, 0.75, 0.9, 1.05])  # of an object, over half the side of its box
_RIM = 1.25  # outer over inner radius of the rims whose intensities are compared
_IMPOSSIBLE = -1e6
_BEND = 0.05  # cost of a contour that comes nearer or goes farther by a step
_WAIST = 0.15  # of the radius of the object: so much narrower is it where a neighbor begins
_NEIGHBOR = 0.3  # of the contour; a smaller part is none
_DIP = 0.85  # probability between two objects over that within them
_MARGIN = 0.15  # of the radius, on both sides of the contour, within which the watershed decides


@dataclass(frozen=True, eq=False)
class Proposal:
    """The outline of an object.

    Parameters
    ----------
    mask : bool array, shape (y, x)
        Pixels of the object; they are connected, by corners too.
    box : ((y0, y1), (x0, x1))
        Rows and columns of the mask, from the first to before which it ends.
    """

    mask: Mask
    box: tuple[tuple[int, int], tuple[int, int]]


def propose_object(
    image: Array,
    inside: Sequence[Array],
    *,
    outside: Sequence[Array] = (),
    taken: Array | None = None,
    evidence: Array | None = None,
    box: Box | None = None,
) -> Proposal:
    """Propose the outline of the object that a click or a stroke lies in, or that a box was drawn around.

    Contours around the first stroke are searched over several sizes. Each is the closed path over 64 rays with the
    strongest edges [1]_. The contour whose contrast is strongest, relative to the spread of the intensities in it, is
    taken. Where the evidence is weaker between touching objects, neighbors are cut off. A watershed from markers [2]_
    then decides between the pixels near that contour.

    Parameters
    ----------
    image : array, shape (y, x) or (y, x, c)
        A plane of any integer, bool or floating dtype. Of channels, the mixture that separates the first stroke from
        its surroundings is used.
    inside : sequence of arrays, each (n, 2)
        Points y x of the object, in pixels. One point is a click. Several points are a stroke; the first one should
        run through the whole length of the object. The others are added. With a box it may be empty: then the
        middle of the box is of the object.
    outside : sequence of arrays, each (n, 2)
        Points y x that are not of the object.
    taken : bool array, shape (y, x), optional
        Pixels of other objects: they are not in the result, unless they are in ``inside``.
    evidence : float array, shape (y, x), optional
        Probability, 0 to 1, that a pixel has the class of the object. Its edges count for 0.3 of all.
    box : ((y0, y1), (x0, x1)), optional
        Rows and columns from the first to before which they end. The object fills them about, and nothing outside
        of them is of it.

    Returns
    -------
    Proposal
        It holds all points of ``inside`` and none of ``outside``.

    Raises
    ------
    ImageError
        If the arrays do not fit one another, or the image has one value around the object.
    SettingsError
        If points are missing, lie outside of the image or contradict one another, the box is too small or lies
        outside of the image, or scikit-image is missing.

    References
    ----------
    .. [1] A. A. Amini, T. E. Weymouth, R. C. Jain, "Using dynamic programming for solving variational problems in
       vision", IEEE Transactions on Pattern Analysis and Machine Intelligence 12 (1990).
    .. [2] F. Meyer, "Topographic distance and watershed lines", Signal Processing 38 (1994).

    Examples
    --------
    >>> y, x = np.mgrid[:64, :64]
    >>> image = np.where((y - 30) ** 2 + (x - 20) ** 2 < 100, 200, 50)
    >>> proposal = propose_object(image, [np.array([[31, 22]])])
    >>> proposal.box
    ((21, 40), (11, 30))
    """
    for module in ("scipy", "skimage"):
        if find_spec(module) is None:
            raise SettingsError(f"outlines need {module}: pip install 'napari-distillfss[instances]'")
    _check(image, taken, evidence)
    shape = (int(image.shape[0]), int(image.shape[1]))
    strokes = [_stroke(points, shape) for points in inside]
    if box is not None:
        _check_box(box, shape)
        strokes = strokes or [np.array([[(low + high) // 2 for low, high in box]], np.float64)]
    if not strokes:
        raise SettingsError("there is no point inside of the object; give one at least")
    negative = [_stroke(points, shape) for points in outside]
    near = _window(strokes, shape) if box is None else _window_of_box(box, shape)
    window = _Window.of(image, near, strokes, negative, taken, evidence, box)
    mask = np.zeros(shape, bool)
    mask[near] = _separate(window, _own_part(window, _best_contour(window)))
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)
    return Proposal(mask, box)


@dataclass(frozen=True, eq=False)
class _Window:
    """What lies around the strokes, in pixels of a window.

    Parameters
    ----------
    values : array (y, x)
        Intensities, 0 to 1 in the window.
    evidence : array (y, x) or None
    strokes : list of arrays (n, 2)
    inside, forbidden : bool arrays (y, x)
        Pixels that are in the object, and that are not.
    corner : array (2,)
        y x of its first pixel in the image.
    box : array (2, 2), optional
        First row and column of the box of the object, and those before which it ends.
    """

    values: Floats
    evidence: Floats | None
    strokes: list[Floats]
    inside: Mask
    forbidden: Mask
    corner: npt.NDArray[np.intp]
    box: Floats | None = None

    @classmethod
    def of(
        cls,
        image: Array,
        near: tuple[slice, slice],
        strokes: list[Floats],
        negative: list[Floats],
        taken: Array | None,
        evidence: Array | None,
        box: Box | None = None,
    ) -> _Window:
        """Cut the window out of the image."""
        pixels = image[near]
        check_image(pixels)
        corner = np.array([near[0].start, near[1].start])
        moved = [stroke - corner for stroke in strokes]
        inside = _draw(moved, pixels.shape[:2])
        outside = _draw([stroke - corner for stroke in negative], pixels.shape[:2])
        sides = None if box is None else np.array(box, np.float64).T - corner
        if sides is not None:
            (y0, x0), (y1, x1) = sides.astype(int)
            beyond = np.ones_like(outside)
            beyond[y0:y1, x0:x1] = False
            outside |= beyond
        if (inside & outside).any():
            y, x = (np.argwhere(inside & outside)[0] + corner).tolist()
            raise SettingsError(f"pixel y {y}, x {x} is both inside and outside of the object; take one of them away")
        if taken is not None:
            outside |= np.asarray(taken[near], bool) & ~inside
        values = _one_channel(pixels.astype(np.float64), inside)
        low, high = float(values.min()), float(values.max())
        if not high > low:
            y, x = (moved[0][0] + corner).tolist()
            raise ImageError(f"the image has one value around y {y:.0f}, x {x:.0f}; no outline is there, paint it")
        likely = None if evidence is None else np.asarray(evidence[near], np.float64)
        return cls((values - low) / (high - low), likely, moved, inside, outside, corner, sides)


@dataclass(frozen=True, eq=False)
class _Rays:
    """Rays from a point, with steps that grow with the distance; those of a stroke are shorter across it.

    Parameters
    ----------
    center : array (2,)
    directions : array (rays, 2)
        y x of the first step of length 1.
    lengths : array (steps,)
    """

    center: Floats
    directions: Floats
    lengths: Floats

    @classmethod
    def around(cls, center: Floats, along: Floats, aspect: float, shortest: float, longest: float) -> _Rays:
        """Rays whose ends are on ellipses with an axis in the direction ``along`` (y x, of length 1)."""
        angles = np.arange(_RAYS) * 2 * np.pi / _RAYS
        across = np.array([along[1], -along[0]])
        directions = np.cos(angles)[:, None] * along + np.sin(angles)[:, None] * across / aspect
        return cls(center, directions, np.geomspace(shortest, longest, _STEPS))

    @property
    def growth(self) -> float:
        """Length of a step over that of the one before."""
        return float(self.lengths[1] / self.lengths[0])

    @property
    def borders(self) -> Floats:
        """Lengths between the steps: that of border k is between steps k - 1 and k."""
        return np.asarray(self.lengths / np.sqrt(self.growth))

    @property
    def places(self) -> Floats:
        """Places y x of all steps, shape (2, rays, steps)."""
        return np.moveaxis(self.center + self.directions[:, None] * self.lengths[:, None], -1, 0)

    def contour(self, path: npt.NDArray[np.intp]) -> Floats:
        """Corners y x, shape (rays, 2), of the contour through the border of each ray."""
        return np.asarray(self.center + self.directions * self.borders[path][:, None])

    def of_points(self, points: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
        """Number of the nearest ray of each point (n, 2), and the length on it."""
        along, across = self.directions[0], self.directions[_RAYS // 4]
        offsets = points - self.center
        u, v = offsets @ along, offsets @ across / (across @ across)
        rays = np.rint(np.arctan2(v, u) * _RAYS / (2 * np.pi)).astype(np.intp) % _RAYS
        return rays, np.hypot(u, v)


def _check(image: Array, taken: Array | None, evidence: Array | None) -> None:
    if image.ndim not in (2, 3):
        raise ImageError(f"an image has axes y x or y x c, this array has shape {image.shape}")
    for name, array in (("taken", taken), ("evidence", evidence)):
        if array is not None and array.shape != image.shape[:2]:
            raise ImageError(f"{name} has shape {array.shape}, but the image {image.shape[:2]}; give the same y x")
    if evidence is not None and not ((evidence >= 0) & (evidence <= 1)).all():
        raise ImageError("evidence has values that are no probabilities; give numbers from 0 to 1")


def _stroke(points: Array, shape: tuple[int, int]) -> Floats:
    """Points of a stroke that is valid."""
    stroke = np.asarray(points, np.float64)
    if stroke.ndim != 2 or stroke.shape[-1] != 2 or not len(stroke):
        raise SettingsError(f"a stroke has shape {stroke.shape}; give points y x, shape (n, 2)")
    is_in = (np.rint(stroke) >= 0).all(1) & (np.rint(stroke) < shape).all(1)
    if not is_in.all():
        y, x = stroke[~is_in][0].tolist()
        raise SettingsError(f"point y {y:g}, x {x:g} lies outside of the image of {shape[0]} x {shape[1]} pixels")
    return stroke


def _check_box(box: Box, shape: tuple[int, int]) -> None:
    for axis, (low, high), n in zip(("rows", "columns"), box, shape, strict=True):
        if not 0 <= low < high <= n:
            raise SettingsError(f"a box has {axis} {low} to {high}, but the image has {n}; keep it in the image")
        if high - low < _SMALLEST_BOX:
            raise SettingsError(f"a box has {high - low} {axis}; draw one of at least {_SMALLEST_BOX} pixels a side")


def _window_of_box(box: Box, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a box and of what is around it."""
    spans = []
    for (low, high), n in zip(box, shape, strict=True):
        margin = 4 + round(_AROUND_BOX * (high - low))
        spans.append(slice(max(0, low - margin), min(n, high + margin)))
    return spans[0], spans[1]


def _draw(strokes: Sequence[Floats], shape: tuple[int, ...]) -> Mask:
    """Pixels that strokes run through; those outside of the shape are left out."""
    from skimage.draw import line

    drawn = np.zeros(shape, bool)
    for stroke in strokes:
        corners = np.rint(stroke).astype(int)
        for a, b in zip(corners, [*corners[1:], corners[-1]], strict=True):
            rows, columns = line(*a, *b)
            valid = (rows >= 0) & (columns >= 0) & (rows < shape[0]) & (columns < shape[1])
            drawn[rows[valid], columns[valid]] = True
    return drawn


def _size_of(strokes: Sequence[Floats]) -> tuple[Floats, Floats, float, float]:
    """Center, direction, half the length of the first stroke (0 for a click), and distance to the farthest point."""
    first = strokes[0]
    steps = np.r_[0.0, np.linalg.norm(np.diff(first, axis=0), axis=1).cumsum()]
    center = np.array([np.interp(steps[-1] / 2, steps, first[:, axis]) for axis in (0, 1)])
    reach = float(max(np.linalg.norm(stroke - center, axis=1).max() for stroke in strokes))
    half = float(np.linalg.norm(first - center, axis=1).max())
    chord = first[-1] - first[0]
    along = chord / np.linalg.norm(chord) if chord.any() else np.array([0.0, 1.0])
    return center, along, half if 2 * half >= _SHORTEST else 0.0, reach


def _window(strokes: Sequence[Floats], shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns within which the outline is searched."""
    center, _, half, reach = _size_of(strokes)
    radius = _BAND_OF_STROKE * max(_BEYOND * half, reach) if half else max(_BAND * _LARGEST, _BAND * reach)
    low = np.maximum(np.floor(center - 1.3 * radius - 4), 0).astype(int)
    high = np.minimum(np.ceil(center + 1.3 * radius + 5), shape).astype(int)
    return slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))


def _one_channel(pixels: Floats, inside: Mask) -> Floats:
    """The linear mixture of the channels that separates the strokes from the window (Fisher's discriminant)."""
    from scipy import ndimage

    if pixels.ndim == 2:
        return pixels
    smooth = ndimage.gaussian_filter(pixels, (1, 1, 0))
    flat = smooth.reshape(-1, pixels.shape[-1])
    spread = np.cov(flat, rowvar=False).reshape(pixels.shape[-1], -1)
    weights = np.linalg.pinv(spread) @ (smooth[inside].mean(0) - flat.mean(0))
    return np.asarray(pixels @ weights)


def _best_contour(window: _Window) -> Mask:
    """The contour with the strongest contrast, relative to the spread of the intensities in it, filled."""
    from scipy import ndimage
    from skimage.draw import polygon

    smooth = ndimage.gaussian_filter(window.values, 0.6)
    scores = []
    for rays, sizes, band in _plan(window):
        for score, path in _contours(window, smooth, rays, sizes, band):
            contour = rays.contour(path)
            scores.append((score - _unfilled(window.box, contour), contour))
    _, best = max(scores, key=lambda pair: pair[0])
    mask = np.zeros(window.values.shape, bool)
    mask[polygon(best[:, 0], best[:, 1], mask.shape)] = True
    return mask


def _unfilled(box: Floats | None, contour: Floats) -> float:
    """Share of a box that the box around a contour leaves free; 0 without a box."""
    if box is None:
        return 0.0
    filled = (contour.max(0) - contour.min(0)) / (box[1] - box[0])
    return float(1 - np.clip(filled, 0, 1).prod())


def _plan(window: _Window) -> Iterator[tuple[_Rays, Floats, float]]:
    """Rays, sizes along them, and how many times smaller and larger a contour may be."""
    if window.box is not None:
        yield from _plan_in_box(window.box)
        return
    center, along, half, reach = _size_of(window.strokes)
    if not half:
        largest = max(_LARGEST, reach)
        sizes = np.geomspace(_SMALLEST, largest, _SIZES)
        yield _Rays.around(center, along, 1.0, 1.2, _BAND * largest), sizes, _BAND
        return
    size = _BEYOND * half
    sizes = np.array([size]) if reach <= 1.2 * size else np.geomspace(size, reach, 3)
    for aspect in _ASPECTS:
        longest = 1.2 * _BAND_OF_STROKE * aspect * sizes[-1] if reach > size else 1.2 * _BAND_OF_STROKE * size
        yield _Rays.around(center, along, aspect, max(0.6, size / 4), longest + 2), sizes, _BAND_OF_STROKE


def _plan_in_box(box: Floats) -> Iterator[tuple[_Rays, Floats, float]]:
    """Rays for objects along a side of a box, and for long ones along its diagonals."""
    sides, middle = box[1] - box[0], (box[0] + box[1] - 1) / 2
    along = np.array([1.0, 0.0] if sides[0] > sides[1] else [0.0, 1.0])
    kinds = [(along, float(sides.max()) / 2, min(float(sides.max() / sides.min()), _ASPECTS[-1]))]
    length = float(np.linalg.norm(sides))
    for turn in (1.0, -1.0):
        kinds += [(sides * (1.0, turn) / length, length / 2, aspect) for aspect in _ASPECTS_OF_DIAGONALS]
    for direction, half, aspect in kinds:
        yield _Rays.around(middle, direction, aspect, max(0.6, half / 5), 1.5 * half + 2), half * _BOX_SIZES, _BAND


def _contours(
    window: _Window, smooth: Floats, rays: _Rays, sizes: Floats, band: float
) -> Iterator[tuple[float, npt.NDArray[np.intp]]]:
    """Score and path of the best contour of every size, for objects that are brighter and darker than what is near."""
    profile = _sample(smooth, rays)
    edges = _differences(profile, rays)
    likely = None if window.evidence is None else _differences(_sample(window.evidence, rays), rays)
    allowed = _allowed(window, rays)
    noise = float(np.median(np.abs(np.diff(profile, axis=1)))) / 2 + 1e-6
    numbers, gains, signs = np.arange(_RAYS), [], []
    for size in sizes:
        is_near = (rays.lengths > size / band) & (rays.lengths < size * band)
        for sign in (1.0, -1.0):
            typical = max(float(np.percentile((sign * edges[:, is_near]).max(1), 30)), noise)
            gain = _mix(np.tanh(sign * edges / typical), likely)
            gains.append(np.where(is_near & allowed, gain, _IMPOSSIBLE))
            signs.append(sign)
    for path, gain, sign in zip(_closed_paths(np.stack(gains)), gains, signs, strict=True):
        contrast = sign * edges[numbers, path]
        spread = _spread(profile, rays, path) + 1.5 * float(contrast.std()) + noise
        ratio = max(0.0, float(contrast.mean()) / spread) * float(rays.lengths[path].mean()) ** 0.1
        score = ratio / (1 + ratio)
        if likely is not None:
            score = (1 - EVIDENCE_WEIGHT) * score + EVIDENCE_WEIGHT * float(likely[numbers, path].mean())
        yield score + float((gain[numbers, path] <= _IMPOSSIBLE).mean()) * _IMPOSSIBLE, path


def _mix(edges: Floats, likely: Floats | None) -> Floats:
    return edges if likely is None else (1 - EVIDENCE_WEIGHT) * edges + EVIDENCE_WEIGHT * likely


def _sample(values: Floats, rays: _Rays) -> Floats:
    """Values along the rays, shape (rays, steps), a little smoothed across them."""
    from scipy import ndimage

    sampled = ndimage.map_coordinates(values, rays.places, order=1, mode="nearest")
    return np.asarray(ndimage.gaussian_filter1d(sampled, 0.8, axis=0, mode="wrap"))


def _differences(profile: Floats, rays: _Rays) -> Floats:
    """Mean of the rim within each border minus that of the rim around it, shape (rays, steps)."""
    width = max(1, round(np.log(_RIM) / np.log(rays.growth)))
    sums = np.cumsum(np.pad(profile, ((0, 0), (1, 0))), 1)
    at = np.arange(_STEPS)
    low, high = np.maximum(at - width, 0), np.minimum(at + width, _STEPS)
    differences = (sums[:, at] - sums[:, low]) / np.maximum(1, at - low) - (sums[:, high] - sums[:, at]) / (high - at)
    differences[:, :2] = differences[:, -2:] = 0
    return np.asarray(differences)


def _allowed(window: _Window, rays: _Rays) -> Mask:
    """Borders, shape (rays, steps), that lie beyond all points inside and before all points outside."""
    low, high = np.zeros(_RAYS), np.full(_RAYS, np.inf)
    numbers, lengths = rays.of_points(np.argwhere(window.inside).astype(np.float64))
    np.maximum.at(low, numbers, lengths)
    numbers, lengths = rays.of_points(np.argwhere(window.forbidden).astype(np.float64))
    np.minimum.at(high, numbers, lengths)
    borders = rays.borders
    return (borders >= low[:, None]) & ((borders <= high[:, None]) | (high <= low)[:, None])


def _closed_paths(gains: Floats) -> npt.NDArray[np.intp]:
    """The closed path of largest gain, for each of "paths rays steps"; from ray to ray it changes by a step at most.

    The rays are gone around twice. The half of the way in the middle does not depend on where it began.
    """
    count, rays, steps = gains.shape
    total = np.zeros((count, steps))
    moves = np.zeros((2 * rays, count, steps), np.int8)
    bend = np.array([_BEND, 0, _BEND])[:, None, None]
    for k in range(2 * rays):
        padded = np.pad(total, ((0, 0), (1, 1)), constant_values=-np.inf)
        options = np.stack([padded[:, i : i + steps] for i in range(3)]) - bend
        best = options.argmax(0)
        moves[k] = best - 1
        total = np.take_along_axis(options, best[None], 0)[0] + gains[:, k % rays]
    at, numbers = total.argmax(1), np.arange(count)
    paths = np.zeros((count, rays), np.intp)
    for k in reversed(range(rays // 2, 2 * rays)):
        if k < rays // 2 + rays:
            paths[:, k % rays] = at
        at = at + moves[k, numbers, at]
    return paths


def _spread(profile: Floats, rays: _Rays, path: npt.NDArray[np.intp]) -> float:
    """Standard deviation of the values within a contour, each of which stands for its area."""
    weights = np.where(np.arange(_STEPS) < path[:, None], rays.lengths**2, 0.0)
    total = float(weights.sum())
    if not total:
        return 0.0
    mean = float((weights * profile).sum()) / total
    return float(np.sqrt((weights * (profile - mean) ** 2).sum() / total))


def _own_part(window: _Window, contour: Mask) -> Mask:
    """The contour without a neighbor that touches the object, where the probabilities tell them apart.

    Likely pixels are cut by a watershed on their distance to unlikely ones [2]_. The cut counts where it is narrow and
    less likely than both of its sides, and parts a good deal of the contour.
    """
    from scipy import ndimage
    from skimage.morphology import h_maxima
    from skimage.segmentation import watershed

    likely = window.evidence
    if likely is None:
        return contour
    body = (likely > 0.5) | window.inside
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(np.pad(body, 1))[1:-1, 1:-1], 0.7)
    height = max(0.5, _WAIST * float(depth[window.inside].max()))
    around = np.ones((3, 3))
    middles, count = ndimage.label(h_maxima(depth, height), around)
    basins = watershed(-depth, middles, mask=body) if count > 1 else np.asarray(body, np.intp)
    own = np.isin(basins, basins[window.inside & (basins > 0)])
    foreign = contour & (basins > 0) & ~own
    if not own.any() or foreign.sum() < _NEIGHBOR * contour.sum():
        return contour
    seam = (ndimage.binary_dilation(own, around) & foreign) | (ndimage.binary_dilation(foreign, around) & own)
    sides = [np.median(likely[side]) for side in (own & contour, foreign) if side.any()]
    if seam.any() and np.median(likely[seam]) > _DIP * min(sides):
        return contour
    pieces, _ = ndimage.label(contour & ~foreign)
    kept = np.isin(pieces, pieces[window.inside & (pieces > 0)])
    return np.asarray(kept) if kept.any() else contour


def _separate(window: _Window, contour: Mask) -> Mask:
    """Pixels of the object by a watershed from markers, which decides near the contour only."""
    from scipy import ndimage
    from skimage.segmentation import watershed

    depth = ndimage.distance_transform_edt(np.pad(contour, 1))[1:-1, 1:-1]
    away = ndimage.distance_transform_edt(~contour) if contour.any() else np.full(contour.shape, np.inf)
    radius = float(depth.max())
    seed = tuple(np.rint(window.strokes[0][0]).astype(int).tolist())
    deepest = np.unravel_index(depth.argmax(), depth.shape)
    way = _draw([np.array([seed, deepest], float)], contour.shape)
    core = ((depth > max(0.5, _MARGIN * radius)) | way | window.inside) & ~window.forbidden
    markers = np.where(window.forbidden | (away > max(1.0, _MARGIN * radius)), 2, 0)
    markers[_joined(core, seed, window)] = 1
    edges = _mix(_slope(window.values), None if window.evidence is None else _slope(window.evidence))
    return np.asarray(watershed(edges, markers) == 1)


def _slope(values: Floats) -> Floats:
    """Magnitude of the gradient over its largest value."""
    from scipy import ndimage

    slope = ndimage.gaussian_gradient_magnitude(values, 0.7)
    return np.asarray(slope / max(float(slope.max()), 1e-12))


def _joined(core: Mask, seed: tuple[int, ...], window: _Window) -> Mask:
    """The part of a mask that is connected with the seed, and ways from there to all points inside."""
    from scipy import ndimage
    from skimage.graph import MCP

    def connected(mask: Mask) -> Mask:
        pieces, _ = ndimage.label(mask, np.ones((3, 3)))
        return np.asarray(pieces == pieces[seed])

    part = connected(core)
    if (part | ~window.inside).all():
        return part
    ways = MCP(np.where(window.forbidden, -1.0, np.where(core, 0.1, 1.0)))
    costs, _ = ways.find_costs([seed])
    for point in np.argwhere(window.inside & ~part):
        if not np.isfinite(costs[tuple(point)]):
            y, x = (point + window.corner).tolist()
            raise SettingsError(f"point y {y}, x {x} is cut off from the first one; take points outside away")
        for step in ways.traceback(tuple(point)):
            core[step] = True
    return connected(core)
