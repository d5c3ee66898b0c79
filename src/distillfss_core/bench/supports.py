"""Choice of support and test images by a seed, and scribbles made from the truth; the same for all models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distillfss_core.bench.datasets import Item, Split
from distillfss_core.errors import SettingsError
from distillfss_core.support.slice_selection import suggest_planes
from distillfss_core.support.support_set import SupportSet
from distillfss_core.types import IGNORE, AnnotatedSlice, Array, evenly

STROKES = 5  # a class and slice
STROKE_LENGTH = 8  # of the longer side of a slice, a stroke is at most one part
PUBLISHED = -1  # the seed of the published choice


def draw_support(split: Split, shots: int, seed: int) -> list[Item]:
    """Choose annotated images.

    Drawn by ``numpy.random.default_rng(seed)`` from the training part, where pictures are listed under classes the same
    number of each. The seed `PUBLISHED` takes the published rule instead: hierarchical uniform sampling over the sorted
    training part (of each class).

    Raises
    ------
    SettingsError
        If there are fewer pictures than shots, or fewer shots than classes.
    """
    groups = _groups(split, seed)
    if not len(groups) <= shots:
        raise SettingsError(f"{shots} shots do not show {len(groups)} classes; give --shots {len(groups)} or more")
    chosen = []
    rng = np.random.default_rng(seed if seed >= 0 else 0)
    for i, group in enumerate(groups):
        count = shots // len(groups) + (i < shots % len(groups))
        if not count <= len(group):
            raise SettingsError(f"{count} pictures of a kind are wanted, the training part has {len(group)}")
        where = suggest_planes(len(group), count) if seed == PUBLISHED else rng.choice(len(group), count, replace=False)
        chosen += [group[int(j)] for j in where]
    return chosen


def _groups(split: Split, seed: int) -> list[list[Item]]:
    items = sorted(split.training, key=lambda item: item.name) if seed == PUBLISHED else list(split.training)
    kinds = sorted({item.shows for item in items})
    return [[item for item in items if item.shows == kind] for kind in kinds]


def read_support(split: Split, shots: int, seed: int, *, scribbled: bool = False) -> SupportSet:
    """The support of a seed. Where a class is in no picture, the last ones make room for the next drawn that has it."""
    slices = [item.read() for item in draw_support(split, shots, seed)]
    absent = set(range(1, len(split.classes) + 1)) - _shown(slices)
    if absent and seed != PUBLISHED:
        names = {s.source for s in slices}
        order = np.random.default_rng([seed, 1]).permutation(len(split.training))
        more = (split.training[int(i)].read() for i in order)
        place = len(slices)
        for candidate in more:
            if not absent or not place:
                break
            if candidate.source not in names and absent & _shown([candidate]):
                place -= 1
                slices[place] = candidate
                absent = set(range(1, len(split.classes) + 1)) - _shown(slices)
    if scribbled:
        slices = [scribble(s, np.random.default_rng([max(seed, 0), i])) for i, s in enumerate(slices)]
    return SupportSet(tuple(slices), tuple(split.classes), planes_of_one_volume=split.one_scale)


def _shown(slices: Sequence[AnnotatedSlice]) -> set[int]:
    return {int(v) for s in slices for v in np.unique(s.labels)} - {0, IGNORE}


def spread_tests(split: Split, limit: int | None) -> list[Item]:
    """All test pictures, or so many spread evenly over their list."""
    return [split.test[i] for i in evenly(len(split.test), len(split.test) if limit is None else limit)]


def scribble(labeled: AnnotatedSlice, rng: np.random.Generator) -> AnnotatedSlice:
    """Strokes as a hand would draw them, in place of the whole truth.

    Of each class in the slice, the background too: the skeleton of its mask; from up to `STROKES` pixels of it, drawn
    at random, a walk along the skeleton that never turns back, at most an eighth of the longer side; three pixels wide
    where the class is. All other pixels become IGNORE.
    """
    from scipy.ndimage import binary_dilation
    from skimage.morphology import skeletonize

    labels = np.full_like(labeled.labels, IGNORE)
    length = max(1, max(labels.shape) // STROKE_LENGTH)
    for value in np.unique(labeled.labels):
        if value == IGNORE:
            continue
        mask = labeled.labels == value
        skeleton = skeletonize(mask)
        points = np.argwhere(skeleton if skeleton.any() else mask)
        left = {(int(y), int(x)) for y, x in points}
        strokes = np.zeros_like(mask)
        for _ in range(STROKES):
            if not left:
                break
            start = sorted(left)[rng.integers(len(left))]
            for point in _walk(start, left, length, rng):
                strokes[point] = True
        labels[binary_dilation(strokes, np.ones((3, 3))) & mask] = value
    return AnnotatedSlice(labeled.image, labels, labeled.source)


def _walk(
    point: tuple[int, int], left: set[tuple[int, int]], length: int, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Go from pixel to neighbor, taking each from ``left``."""
    for _ in range(length):
        left.discard(point)
        yield point
        y, x = point
        near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (y + dy, x + dx) in left]
        if not near:
            return
        point = near[int(rng.integers(len(near)))]


def share_annotated(support: SupportSet) -> float:
    """Share of the pixels that are annotated."""
    annotated = [np.count_nonzero(s.labels != IGNORE) for s in support.slices]
    return float(np.sum(annotated) / np.sum([s.labels.size for s in support.slices]))


def fingerprint(support: SupportSet) -> str:
    """Twelve hexadecimal digits that identify the pixels and labels of a support."""
    import hashlib

    digest = hashlib.sha256()
    for s in support.slices:
        parts: tuple[Array, ...] = (s.image, s.labels)
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:12]
